"""Autoencoders: sizes as published, both halves, precisions, files; and the codec that they make."""

import keras
import numpy as np
import pytest
from keras import ops

import kdiff
from kdiff import networks, random
from kdiff.codecs import Latent
from kdiff.networks import VQ, AutoencoderKL, AutoencoderTiny
from tests.helpers_gradients import perturb, value_and_gradients
from tests.toys import draw_weights, images, numpy

pytestmark = pytest.mark.eager

SMALL = {
    "kl": lambda **options: AutoencoderKL((8, 16), 4, 1, **options),
    "kl_bare": lambda **options: AutoencoderKL(
        (8, 8, 8), 2, 1, attention=False, attention_at=[1], quant=False, post_quant=False, **options
    ),
    "vq": lambda **options: VQ((8, 16), 3, 1, codes=16, code_width=5, **options),
    "tiny": lambda **options: AutoencoderTiny(8, 4, (1, 1), (1, 1), **options),
}
LATENTS = {"kl": (8, 8, 4), "kl_bare": (4, 4, 2), "vq": (8, 8, 5), "tiny": (8, 8, 4)}
X = images(2, (16, 16, 3))


def made(name, **options):
    network = SMALL[name](**options)
    network.build()
    return draw_weights(network)


@pytest.mark.once
@pytest.mark.parametrize(
    ("network", "count"),
    [
        (AutoencoderKL.sd, 83_653_863),  # of diffusers' models of these configurations
        (AutoencoderKL.sd3, 83_819_683),
        (AutoencoderTiny, 2_445_063),
    ],
)
def test_published_sizes(network, count):
    """Without a weight in memory."""
    network = network()
    assert networks.parameters(network, (None, None, 3)) == count
    assert not network.built


@pytest.mark.once
def test_flops():
    """Of each half; AutoencoderTiny's by hand: 8 channels, 3x3 kernels, no attention."""
    conv = 9 * 8 * 8
    encoder = 256 * 9 * 3 * 8 + 3 * 256 * conv + 64 * (conv + 3 * conv + 9 * 8 * 4)
    decoder = 64 * (9 * 4 * 8 + 3 * conv) + 256 * (conv + 3 * conv + 9 * 8 * 3)
    assert networks.flops(SMALL["tiny"](), (16, 16, 3)) == encoder + decoder
    lines = []
    networks.summary(SMALL["kl"](), (16, 16, 3), print_fn=lines.append)
    assert [line.split()[0] for line in lines[1:]] == ["encoder", "to_moments", "from_latents", "decoder", "total"]


@pytest.mark.once
@pytest.mark.parametrize("name", SMALL)
def test_both_halves(name, tmp_path):
    """Shapes, the mean in `call`, any size that fits, and files."""
    network = made(name)
    mean, log_variance = network.encode(X)
    assert mean.shape[1:] == LATENTS[name] == network.latent_shape((16, 16, 3))
    assert (log_variance is None) == (not name.startswith("kl"))
    y = numpy(network(X))
    np.testing.assert_allclose(y, numpy(network.decode(mean)), atol=1e-5)
    assert network(images(1, (8, 32, 3))).shape == (1, 8, 32, 3)
    assert network.compute_output_shape((None, 16, 16, 3)) == (None, 16, 16, 3)
    network.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras")
    np.testing.assert_allclose(numpy(loaded(X)), y, atol=1e-5)
    assert numpy(network.clone()(X)).shape == y.shape


@pytest.mark.once
@pytest.mark.parametrize("name", SMALL)
def test_every_weight_has_a_gradient(name):
    """The codes have none from the image, only from `lookup`."""
    _, gradients = value_and_gradients(made(name), X)
    for path, gradient in gradients.items():
        assert (np.abs(gradient).max() > 0) == ("codebook" not in path), path


@pytest.mark.once
@pytest.mark.parametrize("name", ["kl", "vq"])
def test_half_precision(name):
    network = made(name, dtype="mixed_bfloat16")
    y = numpy(network(X))
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, numpy(made(name)(X)), atol=0.1 * np.abs(y).max())


@pytest.mark.once
def test_series_and_volumes():
    """The rank is that of what it is built for."""
    assert AutoencoderKL((8, 16), 4, 1)(images(1, (8, 3))).shape == (1, 8, 3)
    assert AutoencoderKL((8, 16), 4, 1).encode(images(1, (4, 4, 4, 3)))[0].shape == (1, 2, 2, 2, 4)


@pytest.mark.once
def test_codebook():
    network = made("vq")
    table = numpy(network.codebook.table)
    x = np.random.default_rng(0).normal(size=(3, 7, 5)).astype("float32")
    codes, index = network.nearest(ops.convert_to_tensor(x))
    expected = np.argmin(((x[..., None, :] - table) ** 2).sum(-1), axis=-1)
    np.testing.assert_array_equal(numpy(index), expected)
    np.testing.assert_allclose(numpy(codes), table[expected], atol=1e-6)
    np.testing.assert_array_equal(numpy(network.codebook.lookup(index)), table[expected])
    exact = numpy(network.decode(ops.convert_to_tensor(table[numpy(network.nearest(network.encode(X)[0])[1])])))
    np.testing.assert_allclose(numpy(network(X)), exact, atol=1e-5)


WRONG = [
    (lambda: AutoencoderKL(()), "`widths` must be the channels"),
    (lambda: AutoencoderKL((8, 0)), "a width"),
    (lambda: AutoencoderKL((8,), attention_at=[1]), r"`attention_at` must be levels in 0\.\.0; received: \[1\]"),
    (lambda: AutoencoderTiny(8, depths=(1,)), "the same number of levels"),
    (lambda: VQ(codes=0), "`codes`"),
    (lambda: made("kl").encode(images(1, (16, 15, 3))), "a width divisible by 2; received: 15"),
    (lambda: made("kl").encode(images(1, (16, 16, 1))), r"images must have the shape .*received: \(16, 16, 1\)"),
    (lambda: made("kl").decode(images(1, (8, 8, 3))), "latents must have 4 channels"),
    (lambda: Latent(made("kl"), 0.0), "`scale` must not be 0"),
    (lambda: Latent(made("kl"), np.nan), "`scale` must be a finite number"),
    (lambda: Latent(made("kl"), tiles=12), "`tiles` must be a multiple of 8"),
    (lambda: Latent.fitted(made("kl"), []), "needs examples"),
]


@pytest.mark.once
@pytest.mark.parametrize(("call", "message"), WRONG)
def test_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.once
def test_what_is_no_autoencoder():
    with pytest.raises(TypeError, match="a Keras layer with"):
        Latent(keras.layers.Dense(3))


# The codec


@pytest.mark.once
def test_a_codec_draws_around_the_mean():
    """x = (mean + std noise - shift) scale, with the noise of the key; no noise without one."""
    network, key = made("kl"), random.key_of(3)
    codec = Latent(network, [1.0, 2.0, 3.0, -4.0], 0.5)
    mean, log_variance = (numpy(one) for one in network.encode(X))
    scale = np.array([1.0, 2.0, 3.0, -4.0])
    np.testing.assert_allclose(numpy(codec.encode(X)), (mean - 0.5) * scale, rtol=1e-4, atol=1e-4)
    noise = numpy(random.normal(key, mean.shape))
    drawn = (mean - 0.5) * scale + np.exp(0.5 * log_variance) * np.abs(scale) * noise
    np.testing.assert_allclose(numpy(codec.encode(X, key)), drawn, rtol=1e-3, atol=1e-3)
    decoded = np.clip(numpy(network.decode(mean)), -1, 1)
    np.testing.assert_allclose(numpy(codec.decode(codec.encode(X))), decoded, atol=1e-3)
    whole = np.round(127.5 * (X + 1)).astype("uint8")
    np.testing.assert_allclose(numpy(codec.encode(whole)), numpy(codec.encode(whole / 127.5 - 1)), atol=1e-3)


@pytest.mark.once
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_fitted_scale(per_channel):
    """What is drawn has variance 1, in the channels each or in all."""
    network, x = made("kl"), images(24, (16, 16, 3))
    codec = Latent.fitted(network, [x[:16], {"image": x[16:]}, x[:1]], per_channel=per_channel, batches=2)
    drawn = numpy(codec.encode(x, random.key_of(0))).reshape(-1, 4)
    if per_channel:
        np.testing.assert_allclose(drawn.mean(0), 0, atol=0.1)
        np.testing.assert_allclose(drawn.std(0), 1, atol=0.1)
    else:
        assert drawn.std() == pytest.approx(1, abs=0.05)
        assert codec.shift == 0
    assert not codec.trainable_variables


@pytest.mark.once
def test_a_model_on_latents(tmp_path):
    """Trained by `fit` on images, sampled, saved and loaded; the autoencoder stays what it was."""
    codec = Latent(made("kl"), 0.1)
    before = [numpy(weight).copy() for weight in codec.weights]
    model = kdiff.DiffusionModel(networks.UNet.residual(8, levels=1, depth=1), codec=codec)
    model.compile("adam")
    losses = model.fit(images(16, (16, 16, 3)), batch_size=8, epochs=2, verbose=0).history["loss"]
    assert np.isfinite(losses).all()
    assert model.shapes["image"] == (None, 8, 8, 4)
    for weight, value in zip(codec.weights, before, strict=True):
        np.testing.assert_array_equal(numpy(weight), value)
    samples = model.sample(2, steps=2)
    assert samples.shape == (2, 16, 16, 3)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.codec.scale == 0.1
    assert len(loaded.trainable_variables) == len(model.trainable_variables) < len(loaded.weights)
    assert int(numpy(loaded.optimizer.iterations)) == 4
    np.testing.assert_allclose(loaded.sample(2, steps=2), samples, atol=1e-4)


@pytest.mark.once
def test_previews():
    """`sample_steps` decodes by another codec if it is told so."""
    model = kdiff.DiffusionModel(networks.UNet.residual(8, levels=1, depth=1), codec=Latent(made("kl")))
    model.build((None, 16, 16, 3))
    perturb(model.network)
    tiny = Latent(made("tiny"))
    latents = kdiff.DiffusionModel(model.network, codec="identity")
    latents.build((None, 8, 8, 4))
    for step, plain in zip(model.sample_steps(2, steps=2, preview=tiny), latents.sample_steps(2, steps=2), strict=True):
        np.testing.assert_allclose(step.x_hat, numpy(tiny.decode(plain.x_hat)), atol=1e-4)
    with pytest.raises(ValueError, match="Unknown Codec"):
        model.sample_steps(2, preview="teeny")
