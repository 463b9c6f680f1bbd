"""What `sample` is asked for beside a number: seeds, sizes, pieces of runs, noise, strengths, what is known."""

import keras
import numpy as np
import pytest
from keras import ops

import kdiff
from kdiff import Sampler, closed_edges, codecs, schedules
from kdiff.blocks import ConvNeXtBlock, FIRDownsample, Upsample
from kdiff.guidance import Inpaint, Seamless
from kdiff.networks import UNet
from kdiff.sampling import initial_noise
from tests.toys import draw_weights, exact_denoiser, images, numpy

SHAPE = (4, 4, 1)
COSINE = schedules.Cosine()
DDIM = Sampler("ddim", "trailing", 10)


class Exact(keras.layers.Layer):
    """A network that knows the data: E[x | x_t] for a Gaussian, as the prediction "data"."""

    def call(self, inputs):
        m = COSINE.at(inputs["time"] / 1000.0).like(inputs["image"])
        return exact_denoiser(0.2, 0.25)(inputs["image"], m)


def model_of(shape=SHAPE, codec="identity"):
    model = kdiff.DiffusionModel(Exact(), prediction="data", codec=codec, ema=None, sampler=DDIM)
    model.build((None, *shape))
    return model


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_a_seed_a_sample(model, solver):
    """Each is the first of its own seed, in any batch size."""
    options = {"sampler": solver, "steps": 4}
    each = np.concatenate([model.sample(1, seed=seed, **options) for seed in (5, 7, 5)])
    for batch_size in (1, 2, 64):
        received = model.sample(3, seed=[5, 7, 5], batch_size=batch_size, **options)
        np.testing.assert_allclose(received, each, atol=1e-5)
    assert np.abs(each[0] - each[1]).max() > 0.1


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_one_model_begins_and_another_ends(model, solver):
    """Two pieces are the whole run, a stochastic one too: a step's noise is that of its place in the grid."""
    options = {"sampler": Sampler(solver, "trailing", 10), "seed": 3}
    half = model.sample(2, stop=0.4, **options)
    np.testing.assert_allclose(model.sample(2, x=half, start=0.4, **options), model.sample(2, **options), atol=1e-5)
    assert [step.t for step in model.sample_steps(1, stop=0.75, **options)] == pytest.approx([0.9, 0.75])
    assert [step.t for step in model.sample_steps(1, x=half[:1], start=0.16, **options)] == pytest.approx([0.1, 0])


def test_noise_of_ones_own(model):
    noise = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype("float32")
    drawn = numpy(initial_noise((2, *SHAPE), 0))
    np.testing.assert_allclose(model.sample(2, noise=drawn), model.sample(2), atol=1e-5)
    np.testing.assert_allclose(model.sample(2, noise=noise), model.sample(2, x=noise), atol=1e-3)  # sigma(1) is 1
    image = images(2, SHAPE)
    m = COSINE.at(np.float32(0.5))
    noisy = float(m.alpha) * image + float(m.sigma) * noise
    received = model.sample(2, noise=noise, image=image, strength=0.5)
    np.testing.assert_allclose(received, model.sample(2, x=noisy, start=0.5), atol=1e-5)


def test_a_strength_a_pixel(model):
    """Where pixels are independent, each is as in a run of its own strength."""
    image = images(2, SHAPE)
    strength = np.repeat([[0.0, 0.3, 0.7, 1.0]], 4, axis=0)
    received = model.sample(2, image=image, strength=strength)
    for column, value in enumerate(strength[0]):
        whole = model.sample(2, image=image, strength=value) if value else image
        np.testing.assert_allclose(received[:, :, column], whole[:, :, column], atol=5e-3 if value == 0 else 1e-4)
    masked = model.sample(2, guidance=Inpaint(image, strength))
    np.testing.assert_allclose(masked, received, atol=5e-4)  # which begins with a thousandth of the image


def test_what_is_known_is_kept():
    """The rest is drawn; a mask is where it is, or where there is no number."""
    model, known = model_of((4,)), np.array([0.5, np.nan, -0.3, np.nan], "float32")
    received = model.sample(500, known=known, sampler=Sampler("dpm_solver_pp", "uniform_log_snr", 20))
    np.testing.assert_allclose(received[:, [0, 2]], np.tile(known[[0, 2]], (500, 1)), atol=5e-3)
    assert received[:, [1, 3]].mean() == pytest.approx(0.2, abs=0.03)
    assert received[:, [1, 3]].std() == pytest.approx(0.25, rel=0.06)
    mask = np.isnan(known)
    np.testing.assert_array_equal(model.sample(2, known=np.nan_to_num(known), mask=mask), model.sample(2, known=known))


# Sizes


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"height": 4, "width": 6}, (4, 6)),
        ({"size": (4, 2)}, (4, 2)),
        ({"image": images(2, (6, 4, 1)), "strength": 0.5}, (6, 4)),
        ({"image": images(1, (6, 4, 1))[0]}, (6, 4)),
        ({"noise": images(2, (2, 4, 1))}, (2, 4)),
        ({"known": images(2, (2, 4, 1)), "mask": np.ones((2, 4))}, (2, 4)),
    ],
)
@pytest.mark.parametrize("codec", ["identity", codecs.Haar(1)], ids=repr)
def test_images_of_any_size(options, size, codec, tmp_path):
    if codec != "identity" and {"noise", "known"} & set(options):
        pytest.skip("of this codec these have another shape")
    model = model_of((None, None, 1), codec)
    assert model.sample(2, **options).shape == (2, *size, 1)


def test_a_batch_of_noise_has_a_size():
    model = model_of((None, 1))
    x = model.sample(2, x=np.zeros((2, 5, 1)))
    assert x.shape == (2, 5, 1)
    assert model.invert(x, sampler="ddim").shape == (2, 5, 1)


def test_the_size_of_examples_is_known_after_loading():
    model = model_of((None, None, 1), codecs.Haar(1))
    other = kdiff.DiffusionModel(Exact(), prediction="data", codec=codecs.Haar(1), ema=None, sampler=DDIM)
    other.build_from_config(model.get_build_config())
    assert other.sample(1, height=4, width=8).shape == (1, 4, 8, 1)


# Without a seam


def test_seamless():
    """A network of convolutions alone moves with what it is given, over the edges too, along the axes that are closed."""
    x, time = np.random.default_rng(0).normal(size=(1, 8, 8, 1)).astype("float32"), np.ones(1, "float32")
    for options in (
        {"downsample": FIRDownsample(convolution=True), "upsample": Upsample("transposed")},
        {"block": ConvNeXtBlock(normalization="group_norm"), "upsample": Upsample("bilinear")},
    ):
        network = UNet.composed(**{"block": "conv_block", "width": 8, "levels": 2, "depth": 1, **options})
        network.build({"image": x.shape, "time": (1,)})
        draw_weights(network)

        def called(x, axes, network=network):
            with closed_edges.switched_on(axes):
                return numpy(network({"image": ops.convert_to_tensor(x), "time": time}))

        for axis in (0, 1):
            moved = np.roll(called(x, (axis,)), 2, axis + 1)
            np.testing.assert_allclose(called(np.roll(x, 2, axis + 1), (axis,)), moved, atol=1e-4)
            other = np.roll(called(x, (1 - axis,)), 2, axis + 1)
            assert np.abs(called(np.roll(x, 2, axis + 1), (1 - axis,)) - other).max() > 1e-2
    model = kdiff.DiffusionModel(network)
    model.build((None, 8, 8, 1))
    one = Sampler("ddim", steps=1)
    a = model.sample(1, sampler=one, x=x, guidance=Seamless())
    b = model.sample(1, sampler=one, x=np.roll(x, 2, 1), guidance=Seamless())
    np.testing.assert_allclose(b, np.roll(a, 2, 1), atol=1e-4)
    assert np.abs(model.sample(1, sampler=one, x=x) - a).max() > 1e-3
    with pytest.raises(ValueError, match="No layer of the network"):
        model_of().sample(1, guidance=Seamless())


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": [1, 2, 3]}, "`seed` must be one number, or 2"),
        ({"seed": [1, -2]}, "`seed`"),
        ({"start": 0.5}, "`start` needs"),
        ({"x": images(2, SHAPE), "start": 0.0}, r"`start`.*received: 0.0"),
        ({"stop": 1.0}, "`stop` must be below 1.0"),
        ({"image": images(2, SHAPE), "strength": 0.3, "stop": 0.3}, "`stop` must be below 0.3"),
        ({"x": images(2, SHAPE), "noise": images(2, SHAPE)}, "`x` has its noise"),
        ({"noise": images(2, (4, 4, 2))}, r"`noise`.*\(4, 4, 1\)"),
        ({"mask": np.ones((4, 4))}, "what is `known`"),
        ({"known": np.full(SHAPE, np.nan), "mask": np.zeros((4, 4))}, "NaN"),
        ({"image": images(2, SHAPE), "strength": np.full((4, 4), 1.5)}, r"in \[0, 1\]"),
        ({"image": images(2, SHAPE), "strength": np.ones((4, 5))}, r"`mask`.*\(4, 5\)"),
        ({"height": 8, "width": 8}, r"\(4, 4, 1\).*`size` cannot be \(8, 8\)"),
        ({"height": 4}, "`size` must be a whole number.*None"),
    ],
)
def test_bad_requests(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.sample(2, **options)


@pytest.mark.once
def test_a_size_that_is_not_known():
    with pytest.raises(ValueError, match=r"any size, \(any, any, 1\): give `height` and `width`"):
        model_of((None, None, 1)).sample(2)
