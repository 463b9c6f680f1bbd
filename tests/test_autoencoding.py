"""Training autoencoders: the terms of the loss, the one sum of two players, files and two learning rates."""

import keras
import numpy as np
import pytest
from keras import ops

from kdiff import autoencoding, networks
from kdiff.autoencoding import (
    LPIPS,
    MSSSIM,
    AutoencoderTrainer,
    Features,
    Gradients,
    Laplacian,
    PatchDiscriminator,
    ReconstructionCallback,
    vgg16,
)
from kdiff.autoencoding.trainer import balanced
from tests.helpers_gradients import perturb
from tests.toys import draw_weights, images, mostly_once, numpy

pytestmark = pytest.mark.eager

SHAPE = (16, 16, 3)
X, Y = images(4, SHAPE, 0), images(4, SHAPE, 1)


# Terms


@pytest.mark.once
def test_gradients():
    e = (X - Y).astype("float64")
    expected = np.abs(np.diff(e, axis=1)).mean((1, 2, 3)) + np.abs(np.diff(e, axis=2)).mean((1, 2, 3))
    np.testing.assert_allclose(numpy(Gradients()(X, Y)), expected, rtol=1e-5)


@pytest.mark.once
def test_laplacian():
    """What is no difference costs nothing; a constant is in the last band alone, and noise in the first."""
    np.testing.assert_allclose(numpy(Laplacian()(X, X)), 0, atol=1e-6)
    np.testing.assert_allclose(numpy(Laplacian()(X, X + 0.25)), 0.25, rtol=1e-4)
    board = np.indices((16, 16)).sum(0)[None, ..., None] % 2 * 0.5 - 0.25  # its 2 x 2 averages are 0
    np.testing.assert_allclose(numpy(Laplacian()(X, X + board.astype("float32"))), 0.25, rtol=1e-4)
    with pytest.raises(ValueError, match="32 must divide height and width"):
        Laplacian(5)(X, Y)


@pytest.mark.once
@pytest.mark.parametrize(("levels", "window"), [(1, 11), (2, 7), (3, 4)])
def test_ms_ssim(levels, window):
    """TensorFlow's, which clips each scale's mean as this does."""
    tf = pytest.importorskip("tensorflow")
    near = np.clip(X + 0.3 * Y, -1, 1)
    weights = autoencoding.terms.SCALES[:levels]
    expected = tf.image.ssim_multiscale(
        X, near, 2.0, [w / sum(weights) for w in weights], filter_size=window, filter_sigma=1.5
    )
    np.testing.assert_allclose(numpy(MSSSIM(levels, window)(X, near)), 1 - expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(numpy(MSSSIM(levels, window)(X, X)), 0, atol=1e-5)


@pytest.mark.once
def test_what_terms_refuse():
    with pytest.raises(ValueError, match="at most 5"):
        MSSSIM(6)
    with pytest.raises(ValueError, match="multiples of 4 and at least 28"):
        MSSSIM(3, 7)(X, Y)
    with pytest.raises(TypeError, match="a built Keras model"):
        Features(keras.layers.Dense(3))
    with pytest.raises(ValueError, match=r"returns maps of \[4\] channels, but the heads are for \[5\]"):
        LPIPS(vgg16(stages=[[4]]), [np.ones(5)])


STAGES = ((4, 4), (6,), (8, 8))


def reference(state, heads, x, y):
    """LPIPS as the paper's code has it, in NumPy, of a trunk of torchvision's weights."""

    def convolved(z, kernel, bias):
        z = np.pad(z, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(z, (3, 3), (2, 3))
        return np.einsum("bchwij,ocij->bohw", windows, kernel) + bias[:, None, None]

    def features(z):
        shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
        z, place = ((z - shift) / scale).transpose(0, 3, 1, 2), 0
        for i, widths in enumerate(STAGES):
            if i:
                b, c, h, w = z.shape
                z, place = z.reshape(b, c, h // 2, 2, w // 2, 2).max((3, 5)), place + 1
            for _ in widths:
                z = np.maximum(convolved(z, state[f"features.{place}.weight"], state[f"features.{place}.bias"]), 0)
                place += 2
            yield z / (np.sqrt((z**2).sum(1, keepdims=True)) + 1e-10)

    pairs = zip(features(x.astype("float64")), features(y.astype("float64")), heads, strict=True)
    return sum(((a - b) ** 2 * head[:, None, None]).sum(1).mean((1, 2)) for a, b, head in pairs)


@pytest.mark.once
def test_lpips(tmp_path):
    """By hand, from files; equal heads make `Features` of it."""
    rng, state, place, before = np.random.default_rng(0), {}, 0, 3
    for i, widths in enumerate(STAGES):
        place += i > 0
        for width in widths:
            state[f"features.{place}.weight"] = rng.normal(size=(width, before, 3, 3)).astype("float32") * 0.3
            state[f"features.{place}.bias"] = rng.normal(size=width).astype("float32") * 0.1
            place, before = place + 2, width
    heads = [rng.uniform(size=width).astype("float32") for *_, width in STAGES]
    named = {f"lin{i}.model.1.weight": head[None, :, None, None] for i, head in enumerate(heads)}
    np.savez(tmp_path / "trunk.npz", **state, **{"classifier.0.bias": np.zeros(3, "float32")})
    np.savez(tmp_path / "heads.npz", **named)
    term = LPIPS(vgg16(tmp_path / "trunk.npz", STAGES), str(tmp_path / "heads.npz"))
    np.testing.assert_allclose(numpy(term(X, Y)), reference(state, heads, X, Y), rtol=1e-4)
    np.testing.assert_allclose(numpy(term(X, X)), 0, atol=1e-7)
    equal = LPIPS(vgg16(state, STAGES), [np.ones(len(head)) for head in heads])
    plain = Features(equal.network)
    shifted = [((one - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]).astype("float32") for one in (X, Y)]
    np.testing.assert_allclose(numpy(equal(X, Y)), numpy(plain(*shifted)), rtol=1e-4)
    assert not term.trainable_variables
    with pytest.raises(ValueError, match=r"missing: features\.2\.bias"):
        vgg16({name: array for name, array in state.items() if name != "features.2.bias"}, STAGES)


@pytest.mark.once
def test_features_of_named_layers():
    network = vgg16(stages=STAGES)
    names = [layer.name for layer in network.layers if "conv" in layer.name]
    one = Features(network, [names[0]])
    assert [tuple(part.shape) for part in one.maps(X)] == [(4, 16, 16, 4)]
    again = Features.from_config(one.get_config())
    for mine, theirs in zip(again.network.weights, network.weights, strict=True):
        mine.assign(theirs)
    np.testing.assert_allclose(numpy(again(X, Y)), numpy(one(X, Y)), rtol=1e-6)


# Training


def small(kind="kl"):
    if kind == "vq":
        network = networks.VQ((8, 8), 3, 1, attention=False, codes=16)
    else:
        network = networks.AutoencoderKL((8, 8), 2, 1, attention=False)
    network.build()
    return draw_weights(network)


def discriminator():
    made = PatchDiscriminator(4, 1)
    made.build((None, *SHAPE))
    return draw_weights(made, 1)


def trainer(kind="kl", **options):
    made = AutoencoderTrainer(small(kind), **options)
    made.compile(keras.optimizers.Adam(1e-3))
    return made


@pytest.mark.once
def test_the_kl_term():
    """By its formula, a number of the image's counted as 1; evaluation takes the mean."""
    one = trainer(kl=0.5, reconstruction="l2")
    parts = {name: float(numpy(value)) for name, value in one(X, training=False).items()}
    mean, log_variance = (numpy(part).astype("float64") for part in one.autoencoder.encode(X))
    kl = 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance).sum() / X.size
    l2 = ((numpy(one.autoencoder(X)) - X) ** 2).mean()
    assert parts["kl"] == pytest.approx(kl, rel=1e-4)
    assert parts["l2"] == pytest.approx(l2, rel=1e-4)
    assert parts["loss"] == pytest.approx(l2 + 0.5 * kl, rel=1e-4)
    assert float(numpy(one(X, training=True)["l2"])) != pytest.approx(l2, rel=1e-4)
    assert int(one.step.value) == 1


def gradients(function, variables):
    """Of a scalar function without arguments, with respect to variables."""
    if keras.backend.backend() == "jax":
        import jax

        def pure(values):
            with keras.StatelessScope(list(zip(variables, values, strict=True))):
                return function()

        return [numpy(one) for one in jax.jit(jax.grad(pure))([v.value for v in variables])]
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = function()
        return [numpy(one) for one in tape.gradient(loss, [v.value for v in variables], unconnected_gradients="zero")]
    import torch

    made = torch.autograd.grad(function(), [v.value for v in variables], allow_unused=True)
    return [np.zeros(v.shape, "float32") if one is None else numpy(one) for one, v in zip(made, variables, strict=True)]


def test_one_sum_is_two_losses():
    """Each player's gradient is that of its own loss, whatever the other's is."""
    one = trainer(discriminator=discriminator(), adversarial=0.7, balance=False)
    generator, judge = one.autoencoder, one.discriminator

    def own():
        x, y = ops.convert_to_tensor(X), generator(X)
        mean, log_variance = generator.encode(X)
        kl = 0.5 * ops.sum(mean**2 + ops.exp(log_variance) - 1 - log_variance) / X.size
        return ops.mean(ops.abs(x - y)) + 1e-6 * kl - 0.7 * ops.mean(judge(y))

    def others():
        real, made = judge(X), judge(ops.stop_gradient(generator(X)))
        return 0.5 * (ops.mean(ops.relu(1 - real)) + ops.mean(ops.relu(1 + made)))

    variables = generator.trainable_variables + judge.trainable_variables
    count = len(generator.trainable_variables)
    whole = gradients(lambda: one(X, training=False)["loss"], variables)
    for ours, expected in ((whole[:count], own), (whole[count:], others)):
        part = variables[:count] if expected is own else variables[count:]
        for a, b in zip(ours, gradients(expected, part), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6 + 1e-5 * np.abs(b).max())


def test_the_balance():
    """The second gradient is as long as the first times the weight."""
    x = keras.Variable(X)
    a, b = np.random.default_rng(0).normal(size=(2, *X.shape)).astype("float32")

    def loss(first, second):
        pair = balanced(x.value, 0.5)
        return ops.sum(ops.convert_to_tensor(first) * pair[0]) + ops.sum(ops.convert_to_tensor(second) * pair[1])

    for scale in (1.0, 1e-3):
        (given,) = gradients(lambda scale=scale: loss(a, scale * b), [x])
        expected = a + 0.5 * np.linalg.norm(a) / np.linalg.norm(b) * b
        np.testing.assert_allclose(given, expected, atol=1e-4)


@pytest.mark.once
def test_a_discriminator_that_starts_later():
    one = trainer(discriminator=discriminator(), start=2)
    plain = trainer()
    before = [numpy(weight).copy() for weight in one.discriminator.weights]
    for steps, moved in ((2, False), (1, True)):
        for _ in range(steps):
            logs = one.train_on_batch(X, return_dict=True)
            expected = plain.train_on_batch(X, return_dict=True)
        now = [numpy(weight) for weight in one.discriminator.weights]
        assert any(np.abs(a - b).max() > 0 for a, b in zip(before, now, strict=True)) is moved
        if not moved:
            assert logs["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize("kind", mostly_once(["vq", "kl"]))
def test_fit_save_and_go_on(kind, tmp_path):
    """The loss falls; two learning rates; a loaded trainer goes on with the losses that it would have had."""
    one = AutoencoderTrainer(small(kind), discriminator=discriminator(), terms=[Gradients(0.5)])
    one.compile(keras.optimizers.Adam(1e-2), keras.optimizers.SGD(0.0))
    judge = [numpy(weight).copy() for weight in one.discriminator.weights]
    options = {"batch_size": 2, "verbose": 0, "shuffle": False}
    history = one.fit(X, epochs=3, **options).history
    assert set(history) == {"loss", *one.parts}
    assert history["l1"][-1] < history["l1"][0]
    for a, b in zip(judge, one.discriminator.weights, strict=True):  # its own learning rate is 0
        np.testing.assert_array_equal(a, numpy(b))
    one.save(tmp_path / "trainer.keras")
    loaded = keras.saving.load_model(tmp_path / "trainer.keras")
    np.testing.assert_allclose(loaded.reconstruct(X), one.reconstruct(X), atol=1e-5)
    losses = [each.fit(X, epochs=1, **options).history["loss"] for each in (one, loaded)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    np.testing.assert_allclose(
        loaded.evaluate(X, batch_size=4, verbose=0, return_dict=True)["l1"], float(numpy(one(X)["l1"])), rtol=1e-3
    )


@pytest.mark.once
def test_the_codes_follow():
    one = trainer("vq")
    perturb(one)
    before = numpy(one.autoencoder.codebook.table).copy()
    losses = one.fit(X, epochs=20, batch_size=4, verbose=0).history["codebook"]
    assert losses[-1] < losses[0]
    assert np.abs(numpy(one.autoencoder.codebook.table) - before).max() > 1e-3


@pytest.mark.once
def test_pictures(tmp_path):
    callback = ReconstructionCallback(tmp_path, X, every=2, columns=2)
    trainer().fit(X, epochs=2, batch_size=4, verbose=0, callbacks=[callback])
    assert [path.name for path in tmp_path.iterdir()] == ["reconstructions-epoch-0002.png"]
    pairs = callback.pairs()
    assert pairs.shape == (8, *SHAPE)
    assert np.abs(pairs[[0, 1, 4, 5]] / 127.5 - 1 - X).max() < 0.01


@pytest.mark.once
def test_what_trainers_refuse():
    with pytest.raises(ValueError, match="`reconstruction` must be one of"):
        AutoencoderTrainer(small(), reconstruction="l3")
    with pytest.raises(TypeError, match="`Term`s are expected"):
        AutoencoderTrainer(small(), terms=["ssim"])
    with pytest.raises(ValueError, match="there is no discriminator"):
        AutoencoderTrainer(small()).compile("adam", "adam")
    with pytest.raises(ValueError, match=r"must be in \[-1.0, 1.0\]"):
        trainer().fit(127 * X)
