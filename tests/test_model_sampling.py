"""What `sample` is asked for beside a number: seeds, sizes, pieces of runs, noise, strengths, what is known."""

import keras
import numpy as np
import pytest
from keras import ops

import kdiff
from kdiff import Sampler, analytic, blocks, circular_padding, codecs, random, schedules, times
from kdiff.guidance import DPS, Clip, Inpaint, MomentMatching, PiGDM, Seamless
from kdiff.networks import UNet
from kdiff.sampling import initial_noise
from tests.toys import compiled_model, draw_weights, exact_denoiser, images, mostly_once, numpy, tiny_network

pytestmark = pytest.mark.eager

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


def built(network, shape):
    network.build({"image": (None, *shape), "time": (None,)})
    return network


@pytest.fixture(scope="module")
def model():
    return model_of()


def test_a_seed_a_sample(model):
    """Each is the first of its own seed, in any batch size."""
    options = {"sampler": "ddpm", "steps": 4}
    each = np.concatenate([model.sample(1, seed=seed, **options) for seed in (5, 7, 5)])
    for batch_size in (2, 64):
        received = model.sample(3, seed=[5, 7, 5], batch_size=batch_size, **options)
        np.testing.assert_allclose(received, each, atol=1e-5)
    assert np.abs(each[0] - each[1]).max() > 0.1


@pytest.mark.once
def test_one_model_begins_and_another_ends(model):
    """Two pieces are the whole run, a stochastic one too: a step's noise is that of its place in the grid."""
    options = {"sampler": Sampler("ddpm", "trailing", 10), "seed": 3}
    half = model.sample(2, stop=0.4, **options)
    np.testing.assert_allclose(model.sample(2, x=half, start=0.4, **options), model.sample(2, **options), atol=1e-5)
    assert [step.t for step in model.sample_steps(1, stop=0.75, **options)] == pytest.approx([0.9, 0.75])
    assert [step.t for step in model.sample_steps(1, x=half[:1], start=0.16, **options)] == pytest.approx([0.1, 0])


@pytest.mark.once
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


def test_noise_of_each_step(model):
    """A function's, as `Sampler` takes it: that of the seed in its place is the same run; all samples are one batch."""
    key, asked = random.key_of(3), []

    def noise(step, shape):
        asked.append((step, shape))
        return numpy(random.normal(random.fold_in(key, np.int32(step), random.STEPS), shape, np.int32(0)))

    options = {"sampler": "ddpm", "steps": 3, "seed": 3}
    wanted = model.sample(2, **options)
    np.testing.assert_allclose(model.sample(2, noise=noise, **options), wanted, atol=1e-5)
    assert asked == [(step, (2, *SHAPE)) for step in range(3)]
    *_, last = model.sample_steps(2, noise=noise, x=numpy(initial_noise((2, *SHAPE), 3)), **options)
    np.testing.assert_allclose(last.x, wanted, atol=1e-3)  # sigma(1) is 1
    assert np.abs(model.sample(2, noise=lambda step, shape: np.zeros(shape), **options) - wanted).max() > 0.01
    np.testing.assert_array_equal(model.sample(2, **options), wanted)  # it is not kept
    with pytest.raises(ValueError, match="all 2 samples at once, so `batch_size` must be at least that; received: 1"):
        model.sample(2, noise=noise, batch_size=1, **options)


@pytest.mark.once
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


@pytest.mark.once
def test_what_is_known_is_kept():
    """The rest is drawn; a mask is where it is, or where there is no number."""
    model, known = model_of((4,)), np.array([0.5, np.nan, -0.3, np.nan], "float32")
    received = model.sample(500, known=known, sampler=Sampler("dpm_solver_pp", "uniform_log_snr", 20))
    np.testing.assert_allclose(received[:, [0, 2]], np.tile(known[[0, 2]], (500, 1)), atol=5e-3)
    assert received[:, [1, 3]].mean() == pytest.approx(0.2, abs=0.03)
    assert received[:, [1, 3]].std() == pytest.approx(0.25, rel=0.06)
    mask = np.isnan(known)
    np.testing.assert_array_equal(model.sample(2, known=np.nan_to_num(known), mask=mask), model.sample(2, known=known))


class Series(keras.layers.Layer):
    """The exact denoiser of an autoregressive series of first order, (batch, length, 1)."""

    data = analytic.Gaussian(np.zeros((8, 1)), 0.25 * 0.8 ** np.abs(np.arange(8)[:, None] - np.arange(8)))

    def call(self, inputs):
        return self.data(inputs["image"], COSINE.at(inputs["time"][0] / 1000.0))


@pytest.mark.once
def test_a_series_is_filled_in():
    """A gap, and what follows, against the exact conditional. Of the bounds the chance of 400 draws is a half, and the
    rest the bias of the method: a network sees noise where numbers are known, and jumps make up for it by and by.
    """
    missing = [2, 3, 4, 7]
    model = kdiff.DiffusionModel(Series(), prediction="data", codec="identity", ema=None)
    model.build((None, 8, 1))
    series, c = Series.data.sample(1, seed=4)[0], Series.data.covariance
    there = np.setdiff1d(np.arange(8), missing)
    weights = np.linalg.solve(c[np.ix_(there, there)], c[np.ix_(there, missing)]).T
    mean, covariance = weights @ series[there, 0], c[np.ix_(missing, missing)] - weights @ c[np.ix_(there, missing)]
    known = series.copy()
    known[missing] = np.nan
    sampler = Sampler("ddpm", times.Jumps("trailing", 4, 8), 32)
    drawn = model.sample(400, known=known, sampler=sampler, batch_size=400)[:, missing, 0]
    assert np.abs(mean).max() > 0.25  # of which an unconditional draw knows nothing
    np.testing.assert_allclose(drawn.mean(0), mean, atol=0.12)
    np.testing.assert_allclose(drawn.std(0), np.sqrt(np.diag(covariance)), rtol=0.2)


# Sizes


@pytest.mark.parametrize("codec", ["identity", codecs.Haar(1)], ids=repr)
def test_images_of_any_size(codec):
    """Those of what is asked for, or of what the run begins with; a codec may change them."""
    model = model_of((None, None, 1), codec)
    assert model.sample(2, height=4, width=6).shape == (2, 4, 6, 1)
    half = 1 if codec == "identity" else 2
    shape = (2, 8 // half, 4 // half, half**2)
    for options in (
        {"size": (8, 4)},
        {"image": images(2, (8, 4, 1)), "strength": 0.5},
        {"image": images(1, (8, 4, 1))[0]},
        {"noise": np.zeros(shape)},
        {"x": np.zeros(shape[1:])},
        {"known": images(2, (8, 4, 1)), "mask": np.ones(shape[:-1])},
    ):
        assert next(iter(model._run(2, **options).steps())).x.shape == shape


@pytest.mark.once
def test_a_batch_of_noise_has_a_size():
    model = model_of((None, 1))
    x = model.sample(2, x=np.zeros((2, 5, 1)))
    assert x.shape == (2, 5, 1)
    assert model.invert(x, sampler="ddim").shape == (2, 5, 1)


@pytest.mark.once
def test_the_size_of_examples_is_known_after_loading():
    model = model_of((None, None, 1), codecs.Haar(1))
    other = kdiff.DiffusionModel(Exact(), prediction="data", codec=codecs.Haar(1), ema=None, sampler=DDIM)
    other.build_from_config(model.get_build_config())
    assert other.sample(1, height=4, width=8).shape == (1, 4, 8, 1)


# Without a seam


@pytest.mark.parametrize(
    "layer",
    [
        blocks.Conv2D(3, 3, 2, padding="same"),
        blocks.Conv2D(3, 4, padding="same"),
        blocks.MPConv(3),
        blocks.DepthwiseConv2D(4, padding="same"),
        blocks.ConvNeXtBlock(normalization="group_norm"),
        blocks.FIRDownsample(convolution=True),
        blocks.Upsample("transposed"),
        blocks.Upsample("bilinear"),
    ],
    ids=lambda layer: layer.name,
)
def test_circular_padding(layer):
    """A layer moves with what it is given, over the edges too, along the axes that are closed and no others."""
    x = np.random.default_rng(0).normal(size=(1, 6, 8, 2)).astype("float32")
    layer.build(x.shape)
    draw_weights(layer)

    def called(x):
        with circular_padding.switched_on((1,)):
            return numpy(layer(ops.convert_to_tensor(x)))

    there = called(x)
    moved = there.shape[2] // 4  # as far as two pixels are
    np.testing.assert_allclose(called(np.roll(x, 2, 2)), np.roll(there, moved, 2), atol=1e-5)
    moved = there.shape[1] // 3
    assert np.abs(called(np.roll(x, 2, 1)) - np.roll(there, moved, 1)).max() > 1e-3


def test_seamless():
    network = draw_weights(built(UNet.basic(8, 2, 1), (8, 8, 1)))
    model = kdiff.DiffusionModel(network, ema=None)
    model.build((None, 8, 8, 1))
    x, one = np.random.default_rng(0).normal(size=(1, 8, 8, 1)).astype("float32"), Sampler("ddim", steps=1)
    x = np.concatenate([x, np.roll(x, 2, 1)])
    a, b = model.sample(2, sampler=one, x=x, guidance=[Clip(), Seamless()])
    np.testing.assert_allclose(b, np.roll(a, 2, 0), atol=1e-4)
    a, b = model.sample(2, sampler=one, x=x)
    assert np.abs(b - np.roll(a, 2, 0)).max() > 1e-3
    with pytest.raises(ValueError, match="No layer of the network"):
        model_of().sample(1, guidance=Seamless())


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": [1, 2, 3]}, "`seed` must be a number, or 2"),
        ({"seed": [1, -2]}, "`seed`"),
        ({"start": 0.5}, "`start` needs"),
        ({"x": images(2, SHAPE), "start": 0.0}, r"`start`.*received: 0.0"),
        ({"stop": 1.0}, "`stop` must be below 1.0"),
        ({"image": images(2, SHAPE), "strength": 0.3, "stop": 0.3}, "`stop` must be below 0.3"),
        ({"x": images(2, SHAPE), "noise": images(2, SHAPE)}, "`x`, which is noisy already"),
        ({"noise": images(2, (4, 4, 2))}, r"`noise`.*\(4, 4, 1\)"),
        ({"mask": np.ones((4, 4))}, "needs `known` examples"),
        ({"known": np.full(SHAPE, np.nan), "mask": np.zeros((4, 4))}, "NaN"),
        ({"image": images(2, SHAPE), "strength": np.full((4, 4), 1.5)}, r"in \[0, 1\]"),
        ({"image": images(2, SHAPE), "strength": np.ones((4, 5))}, r"`mask`.*\(4, 5\)"),
        ({"height": 8, "width": 8}, r"\(4, 4, 1\).*`size` cannot be \(8, 8\)"),
        ({"height": 4}, "`height` and `width`, both or neither; received: 4 and None"),
        ({"x": np.ones((2, *SHAPE), "uint8")}, "`x` is a noisy batch.*received: uint8"),
        ({"noise": np.ones((2, *SHAPE), int)}, "`noise` is standard normal.*received: int"),
        ({"noise": 255.0 * images(2, SHAPE)}, "`noise` must be standard normal, and reaches"),
        ({"noise": lambda step, shape: np.full(shape, np.nan), "sampler": "ddpm"}, "must be finite"),
        ({"cfg_scale": 3.0}, "Did you mean 'guidance'"),
    ],
)
def test_bad_requests(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.sample(2, **options)


@pytest.mark.once
def test_one_example_is_no_batch_to_invert():
    model = model_of()
    with pytest.raises(ValueError, match=r"must be a batch.*`image\[None\]`"):
        model.invert(images(4, SHAPE)[0])
    with pytest.raises(ValueError, match=r"received: \['batch_size'\]$"):
        next(model.sample_steps(2, batch_size=1))


@pytest.mark.once
def test_a_measurement_of_pictures_in_0_to_255():
    """`operator(x)` of images in 0 ... 255, of which white samples would come; of a table it is nothing strange."""
    model, x = model_of(codec="pixels"), images(2, SHAPE)
    for operator in (kdiff.operators.Downsample(2), kdiff.operators.Mask(np.eye(4))):
        for rule in (PiGDM, DPS, MomentMatching):
            with pytest.raises(ValueError, match=r"`measurement` reaches.*at most about 1"):
                model.sample(2, steps=2, guidance=rule(operator, operator(127.5 * (x + 1))))
        model.sample(2, steps=2, guidance=PiGDM(operator, operator(0.5 * (x + 1))))
    model_of().sample(2, steps=2, guidance=PiGDM("downsample", 100.0 * np.ones((2, 2, 1))))


@pytest.mark.once
def test_a_size_that_is_not_known():
    with pytest.raises(ValueError, match=r"any size, \(any, any, 1\): give `height` and `width`"):
        model_of((None, None, 1)).sample(2)


@pytest.mark.once
def test_no_seed_is_one_that_keras_seeds():
    model = compiled_model(tiny_network((4, 4, 1)))
    model.build((None, 4, 4, 1))
    drawn = []
    for seed in (3, 3, 4):
        keras.utils.set_random_seed(seed)
        drawn += [model.sample(1, steps=1, seed=None), model.sample(1, steps=1, seed=None)]
    np.testing.assert_array_equal(drawn[0], drawn[2])
    np.testing.assert_array_equal(drawn[1], drawn[3])
    assert len({one.tobytes() for one in drawn}) == 4


@pytest.mark.parametrize("change", mostly_once(["lora", "values", "averages", "int8"], ["lora", "values"]))
def test_a_compiled_step_sees_what_has_changed(change):
    """Other values, also within a run, averages, weights that were added, and those of another precision."""
    network = kdiff.networks.DiT(16, 1, 2)
    model = kdiff.DiffusionModel(network, ema=0.5 if change == "averages" else None)
    model.build({"image": (None, 4, 4, 1)})
    draw_weights(network)
    options = {"steps": 2, "ema": change == "averages"}
    before, run = model.sample(2, **options), model.sample_steps(2, **options)
    first = next(run).x
    if change == "lora":
        dense = next(
            layer for layer in network._flatten_layers() if layer.name == "hidden"
        )  # by Keras' own, of which the model is not told
        dense.enable_lora(2)
        dense.lora_kernel_b.assign(np.full(dense.lora_kernel_b.shape, 0.5, "float32"))
    elif change == "int8":
        model.quantize("int8")
    else:
        draw_weights(network, seed=1)
    if change == "averages":
        model.update_ema()
    after, (last,) = model.sample(2, **options), [step.x for step in run]
    model._compiled_steps.clear()
    np.testing.assert_allclose(model.sample(2, **options), after, atol=1e-6)
    assert np.abs(after - before).max() > 1e-4
    if change == "values":  # the second step is of the new ones, after a first of the old
        assert np.abs(last - before).max() > 1e-4
        assert np.abs(last - after).max() > 1e-4
        assert np.isfinite(first).all()
