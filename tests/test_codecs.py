"""Codecs: wavelets; and one with weights, which draws and changes shape and rank, in every place that meets a codec."""

import copy
import pickle

import h5py
import keras
import numpy as np
import pytest
from keras import layers, ops

import kdiff
from kdiff import backend, codecs, random, schedules
from kdiff.codecs import Codec, Haar
from kdiff.guidance import Inpaint
from tests.toys import draw_weights, images, numpy

# Wavelets


def lifting(x, depth):
    """The Haar transform as it is usually written, level by level on whole images; bands in the order of `Haar`."""
    if depth == 0:
        return [x]
    a, b, c, d = (x[:, i::2, j::2] for i in (0, 1) for j in (0, 1))
    low, *details = ((a + b + c + d) / 2, (a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2)
    return [lifting(low, depth - 1), details]


@pytest.mark.parametrize("depth", range(5))
def test_haar_is_orthonormal(depth):
    """W W^T = I: energy is kept, the inverse is the transpose, and white noise stays white."""
    matrix = codecs.wavelets.haar(depth)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(4**depth), atol=1e-12)
    np.testing.assert_allclose(matrix[0], 0.5**depth)  # 2^depth times the mean


@pytest.mark.once
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_haar_keeps_energy_and_comes_back(depth):
    x, codec = images(2, (16, 8, 3)), Haar(depth)
    encoded = numpy(codec.encode(x))
    assert encoded.shape[1:] == codec.data_shape((16, 8, 3)) == (16 >> depth, 8 >> depth, 3 << 2 * depth)
    energy = np.sum(encoded.astype("float64") ** 2) / np.sum(x.astype("float64") ** 2)
    assert energy == pytest.approx(1.0, abs=1e-6)
    np.testing.assert_allclose(numpy(codec.decode(encoded)), x, atol=1e-6)


@pytest.mark.once
def test_haar_is_the_transform_of_the_textbooks():
    """Two levels, by sums and differences of every second pixel; a channel's coefficients lie side by side."""
    x = images(2, (8, 8, 3))
    (low, middle), fine = lifting(x, 2)[0], lifting(x, 2)[1]
    encoded = numpy(Haar(2).encode(x)).reshape(2, 2, 2, 3, 16)
    np.testing.assert_allclose(encoded[..., 0], low[0] if isinstance(low, list) else low, atol=1e-6)
    for band, expected in zip(np.moveaxis(encoded[..., 1:4], -1, 0), middle, strict=True):
        np.testing.assert_allclose(band, expected, atol=1e-6)
    for index, expected in enumerate(fine):  # the 2 x 2 places of a square, row by row
        band = encoded[..., 4 + 4 * index : 8 + 4 * index].reshape(2, 2, 2, 3, 2, 2)
        np.testing.assert_allclose(band.transpose(0, 1, 4, 2, 5, 3).reshape(2, 4, 4, 3), expected, atol=1e-6)


@pytest.mark.once
def test_haar_takes_bytes_and_clips():
    x = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 1)).astype("uint8")
    codec = Haar(1)
    np.testing.assert_allclose(numpy(codec.decode(codec.encode(x))), x / 127.5 - 1.0, atol=1e-6)
    assert numpy(codec.decode(10.0 * numpy(codec.encode(x)))).max() == 1.0
    assert numpy(codec.encode(np.ones((1, 4, 4, 1), "float32")))[0, 0, 0, 0] == pytest.approx(2.0)


@pytest.mark.once
@pytest.mark.parametrize(("shape", "fine"), [((6, 8, 1), False), ((8, 8), False), ((None, 8, 1), True)])
def test_haar_and_sizes(shape, fine):
    if fine:
        assert Haar(2).data_shape(shape) == (None, 2, 16)
        return
    with pytest.raises(ValueError, match=r"Haar\(depth=2\).*divisible by 4; received"):
        Haar(2).data_shape(shape)


@pytest.mark.eager
@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_networks_train_on_wavelets(kind, tmp_path):
    """On a quarter of the positions, at the same size of the pictures; saved and loaded with the model."""
    networks = {
        "unet": lambda: kdiff.networks.UNet.residual(8, levels=1, depth=1),
        "dit": lambda: kdiff.networks.DiT(16, 1, 2, kdiff.blocks.TransformerBlock(2, adaptive=True)),
    }
    model = kdiff.DiffusionModel(networks[kind](), codec=Haar(1))
    model.compile("adam")
    x = images(16, (8, 8, 3))
    losses = model.fit(x, batch_size=8, epochs=2, verbose=0).history["loss"]
    assert np.isfinite(losses).all()
    assert model.shapes["image"] == (None, 4, 4, 12)
    samples = model.sample(2, steps=2)
    assert samples.shape == (2, 8, 8, 3)
    np.testing.assert_allclose(model.sample(2, image=x[:2], strength=0.0), x[:2], atol=LEAST_NOISE)
    model.save(tmp_path / "model.keras")
    np.testing.assert_allclose(keras.saving.load_model(tmp_path / "model.keras").sample(2, steps=2), samples, atol=1e-4)
    with pytest.raises(ValueError, match="`image` must have the shape"):
        model.fit(images(4, (16, 16, 3)), verbose=0)


LEAST_NOISE = 5 * float(numpy(schedules.Cosine().at(0.0).sigma))  # that is left at t = 0: 5 standard deviations


# A codec with weights


class Autoencoder(Codec):
    """Images of 8 x 8 to vectors of 6 by a convolution and a dense layer, with noise of 0.1 if it draws.

    Its dropout would be seen if training reached it.
    """

    batch_size = 3
    limit = 1.0

    def __init__(self, saved=True, dtype="float32"):
        super().__init__(dtype)
        self.saved = saved
        options = {"dtype": self.dtype_policy}
        self.down = layers.Conv2D(4, 3, 2, "same", activation="tanh", **options)
        self.dense, self.dropout = layers.Dense(6, **options), layers.Dropout(0.5, seed=0)
        self.up = layers.Dense(64, **options)
        self.sizes = []  # of the batches that are decoded

    def build(self, shape):
        self.down.build((None, 8, 8, 1))
        self.dense.build((None, 64))
        self.up.build((None, 6))

    def encode(self, examples, key=None):
        x = self.dense(self.dropout(ops.reshape(self.down(codecs.base.to_unit(examples)), (-1, 64))))
        return x if key is None else ops.cast(x, "float32") + 0.1 * random.normal(key, ops.shape(x))

    def decode(self, x):
        self.sizes.append(len(x))
        return ops.tanh(ops.reshape(self.up(x), (-1, 8, 8, 1)))

    def data_shape(self, shape):
        if not kdiff.model.condition_inputs.fits(shape, (8, 8, 1)):
            raise ValueError(f"Autoencoder: images must have the shape (8, 8, 1); received: {shape}")
        return (6,)


def autoencoder(**options):
    codec = Autoencoder(**options)
    codec.build(None)
    return draw_weights(codec)


def network():
    point, time = keras.Input((6,), name="image"), keras.Input((), name="time")
    x = layers.Dense(16, "silu")(ops.concatenate([point, time[:, None] / 1000.0], axis=-1))
    return draw_weights(keras.Model({"image": point, "time": time}, layers.Dense(6)(x)))


def latent_model(codec=None, built=True, **options):
    model = kdiff.DiffusionModel(network(), codec=codec or autoencoder(), **options)
    model.compile(keras.optimizers.Adam(1e-2))
    if built:
        model.build((None, 8, 8, 1))
    return model


IMAGES = images(16)


@pytest.mark.eager
def test_a_codec_is_not_trained_nor_averaged():
    model = latent_model(built=False)
    before = [numpy(weight).copy() for weight in model.codec.weights]
    model.fit(IMAGES, batch_size=8, epochs=2, verbose=0)
    assert model.shapes["image"] == (None, 6)
    ours = {id(weight) for weight in model.codec.weights}
    assert len(ours) == 6
    assert not ours & {id(weight) for weight in model.trainable_variables}
    assert ours <= {id(weight) for weight in model.non_trainable_variables}
    assert len(model.ema_weights.values) == len(model.network.weights) == len(model.optimizer.variables[2:]) / 2
    for weight, value in zip(model.codec.weights, before, strict=True):
        np.testing.assert_array_equal(numpy(weight), value)


@pytest.mark.eager
def test_a_codec_draws_in_training_alone():
    """Fresh numbers in each step, the same in each evaluation, none for an image to begin from; and no dropout."""
    model = latent_model(built=False)
    seen = []

    class Seen(kdiff.objectives.Denoising):
        named = False

        def problem(self, model, x, conditions, keys, training):
            value = backend.concrete(x)  # Keras may ask for shapes alone before the first step
            seen.extend([] if value is None else [value])
            return super().problem(model, x, conditions, keys, training)

    model.objective = Seen()
    model.compile("sgd", run_eagerly=True)
    model.build((None, 8, 8, 1))
    plain = numpy(model.codec.encode(IMAGES[:8]))
    for _ in range(2):
        model.train_on_batch(IMAGES[:8])
    for _ in range(2):
        model.evaluate(IMAGES[:8], batch_size=8, verbose=0)
    noise = np.stack(seen[-4:]) - plain
    assert 0.05 < noise.std() < 0.15
    assert np.abs(noise[0] - noise[1]).max() > 0.05
    np.testing.assert_array_equal(noise[2], noise[3])
    run = model._run(4, image=IMAGES[:4], strength=0.5)
    np.testing.assert_allclose(run.data, plain[:4], atol=1e-6)


@pytest.mark.eager
def test_a_codec_decodes_in_batches():
    model = latent_model()
    whole = model.sample(7, steps=2)
    assert whole.shape == (7, 8, 8, 1)
    assert model.codec.sizes == [3, 3, 1]
    model.codec.batch_size = None
    np.testing.assert_allclose(model.sample(7, steps=2), whole, atol=1e-6)
    assert model.codec.sizes[3:] == [7]


@pytest.mark.once
def test_everything_that_begins_from_an_image():
    """Rank and shape are those of the codec: strength, inversion, inpainting, single steps, evaluation."""
    model = latent_model()
    x = IMAGES[:2]
    decoded = numpy(model.codec.decode(model.codec.encode(x)))
    np.testing.assert_allclose(model.sample(2, image=x, strength=0.0), decoded, atol=LEAST_NOISE)
    np.testing.assert_allclose(model.sample(2, image=x[0], strength=0.0)[1], decoded[0], atol=LEAST_NOISE)
    assert model.sample(2, image=x, strength=0.5, steps=4).shape == (2, 8, 8, 1)
    latents = model.invert(x, sampler="ddim", steps=40, iterations=3)
    assert latents.shape == (2, 6)
    np.testing.assert_allclose(model.sample(2, x=latents, sampler="ddim", steps=40), decoded, atol=0.05)
    assert [step.x.shape for step in model.sample_steps(2, steps=2)] == [(2, 8, 8, 1)] * 2
    assert np.isfinite(model.evaluate(IMAGES, batch_size=8, verbose=0))
    kept = model.sample(2, guidance=Inpaint(x, np.zeros(6)), steps=2)
    np.testing.assert_allclose(kept, decoded, atol=LEAST_NOISE)
    with pytest.raises(ValueError, match=r"images must have the shape \(8, 8, 1\); received: \(7, 8, 1\)"):
        model.sample(2, image=np.zeros((2, 7, 8, 1)), strength=0.5)
    with pytest.raises(ValueError, match=r"`mask` must have the shape.*received: \(8, 8\)"):
        model.sample(2, guidance=Inpaint(x, np.zeros((8, 8))), steps=2)


# Data that is encoded already


def dataset(arrays):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(arrays).batch(8)


class Batches(keras.utils.PyDataset):
    def __init__(self, arrays):
        super().__init__()
        self.arrays = arrays

    def __len__(self):
        return len(next(iter(self.arrays.values()))) // 8

    def __getitem__(self, index):
        return {name: array[8 * index : 8 * index + 8] for name, array in self.arrays.items()}


def loader(arrays):
    torch = pytest.importorskip("torch")
    rows = [dict(zip(arrays, values, strict=True)) for values in zip(*arrays.values(), strict=True)]
    return torch.utils.data.DataLoader(rows, batch_size=8)


FORMS = {"array": dict, "tf.data": dataset, "py_dataset": Batches, "loader": loader}


@pytest.mark.once
@pytest.mark.parametrize("form", FORMS)
def test_encoded_data(form):
    """`fit` and `evaluate`; the codec is not asked."""
    model = latent_model(Autoencoder(), built=False)
    model.codec.encode = None
    data = FORMS[form]({"encoded": np.random.default_rng(0).normal(size=(16, 6)).astype("float32")})
    losses = model.fit(data, epochs=2, verbose=0).history["loss"]
    assert np.isfinite(losses).all()
    assert model.shapes["image"] == (None, 6)
    assert np.isfinite(model.evaluate(data, verbose=0))
    assert model.sample(2, steps=2).shape == (2, 8, 8, 1)


@pytest.mark.eager
def test_encoded_data_is_the_same_data():
    """Of a codec that does not draw, examples and encoded examples give the same losses."""
    losses = []
    for data in ({"image": IMAGES}, {"encoded": numpy(Haar(1).encode(IMAGES))}):
        unet = kdiff.networks.UNet.residual(8, levels=1, depth=1)
        model = kdiff.DiffusionModel(unet, codec=Haar(1))
        model.compile("sgd")
        model.build((None, 8, 8, 1))
        draw_weights(unet)
        losses.append(model.evaluate(data, batch_size=8, verbose=0))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


WRONG = [
    ({"encoded": np.zeros((8, 5), "float32")}, r"`encoded` must have the shape \(batch, 6\); received: \(None, 5\)"),
    ({"encoded": np.zeros((8, 6), "int32")}, r"`encoded` must be floating-point numbers; received (torch\.)?int32"),
    ({"encoded": np.zeros((8, 6), "uint8")}, r"`encoded` must be floating-point numbers; received (torch\.)?uint8"),
    ({"encoded": np.full((8, 6), np.nan, "float32")}, "`encoded` must be finite"),
    ({"encoded": np.zeros((8, 6), "float32"), "image": IMAGES[:8]}, "'image', or 'encoded' data.*not both"),
    ({"label": np.zeros((8,), "int32")}, "must have an 'image', or 'encoded'"),
    (np.zeros((8, 6), "float32"), r"images must have the shape \(8, 8, 1\); received: \(6,\)"),
]


@pytest.mark.once
@pytest.mark.parametrize(("data", "message"), WRONG)
@pytest.mark.parametrize("form", FORMS)
def test_wrong_encoded_data(data, message, form):
    if isinstance(data, np.ndarray) and form in ("py_dataset", "loader"):
        pytest.skip("these give dictionaries here")
    model = latent_model()
    with pytest.raises(ValueError, match=message):
        model.fit(FORMS[form](data) if form != "array" else data, verbose=0)


@pytest.mark.once
def test_encoded_data_may_have_any_range():
    latent_model().fit({"encoded": np.full((8, 6), 40.0, "float32")}, verbose=0)


# Saving


def weight_names(path):
    """The paths of all arrays in a .keras file, and in its weights."""
    import zipfile

    with zipfile.ZipFile(path) as archive, archive.open("model.weights.h5") as file, h5py.File(file) as weights:
        names = []
        weights.visititems(lambda name, item: names.append(name) if hasattr(item, "shape") else None)
    return names


@pytest.mark.eager
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_a_codec_is_saved_with_the_model(tmp_path, dtype):
    model = latent_model(autoencoder(dtype=dtype))
    assert model.codec.down.compute_dtype == dtype.replace("mixed_", "")
    model.fit(IMAGES, batch_size=8, verbose=0)
    samples = model.sample(4, steps=3)
    assert samples.dtype == np.float32
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.codec.dtype_policy.name == dtype
    np.testing.assert_allclose(loaded.sample(4, steps=3), samples, atol=1e-4)
    assert not loaded.codec.trainable_variables
    loaded.fit(IMAGES, batch_size=8, verbose=0)
    for mine, theirs in zip(model.codec.weights, loaded.codec.weights, strict=True):
        np.testing.assert_array_equal(numpy(mine), numpy(theirs))


@pytest.mark.once
def test_a_codec_may_stay_out_of_the_file(tmp_path):
    """Nothing of it is saved; the loaded model says so, trains on encoded data, and takes a codec that is given."""
    codec = autoencoder(saved=False)
    model = latent_model(codec)
    model.fit(IMAGES, batch_size=8, verbose=0)
    samples = model.sample(4, steps=3)
    model.save(tmp_path / "model.keras")
    assert not [name for name in weight_names(tmp_path / "model.keras") if "codec" in name]
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    latents = loaded.sample_steps(4, steps=3)
    for ask in (
        lambda: loaded.sample(2, steps=2),
        lambda: loaded.sample(2, image=IMAGES[:2], strength=0.5),
        lambda: loaded.fit(IMAGES, verbose=0),
        lambda: next(latents),
    ):
        with pytest.raises(ValueError, match=r"saved without its codec, Autoencoder\(saved=False\).*model.codec = "):
            ask()
    encoded = {"encoded": numpy(codec.encode(IMAGES))}
    order = {"batch_size": 8, "shuffle": False, "verbose": 0}
    loaded.fit(encoded, **order)  # compiled with the one that is absent
    model.fit(encoded, **order)
    loaded.save(tmp_path / "again.keras")
    again = keras.saving.load_model(tmp_path / "again.keras")
    for one in (loaded, again):
        one.codec = codec
        assert len([layer for layer in one.layers if isinstance(layer, Codec)]) == 1
        np.testing.assert_allclose(one.sample(4, steps=3), model.sample(4, steps=3), atol=1e-4)
    assert np.abs(samples - model.sample(4, steps=3)).max() > 1e-3
    losses = [one.fit(IMAGES, **order).history["loss"] for one in (model, loaded)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    loaded.save(tmp_path / "again.keras")
    assert not [name for name in weight_names(tmp_path / "again.keras") if "codec" in name]


def test_another_codec_in_compiled_steps():
    """What was compiled with one codec computes with the next."""
    model, other = latent_model(), autoencoder()
    for weight in other.weights:
        weight.assign(-2.0 * numpy(weight))
    first = model.evaluate(IMAGES, batch_size=8, verbose=0), model.sample(2, steps=2)
    model.codec = other
    second = model.evaluate(IMAGES, batch_size=8, verbose=0), model.sample(2, steps=2)
    fresh = latent_model(other)
    expected = fresh.evaluate(IMAGES, batch_size=8, verbose=0), fresh.sample(2, steps=2)
    assert second[0] == pytest.approx(expected[0], rel=1e-5)
    assert abs(first[0] - second[0]) > 1e-3 * first[0]
    np.testing.assert_allclose(second[1], expected[1], atol=1e-5)
    assert np.abs(first[1] - second[1]).max() > 1e-2
    with pytest.raises(ValueError, match="Unknown Codec"):
        model.codec = "wavelet"


@pytest.mark.once
def test_copies_have_the_weights():
    codec = autoencoder()
    for twin in (copy.deepcopy(codec), pickle.loads(pickle.dumps(codec))):
        for mine, theirs in zip(codec.weights, twin.weights, strict=True):
            np.testing.assert_array_equal(numpy(mine), numpy(theirs))
        assert twin != codec
    assert Autoencoder() == Autoencoder()  # without weights, by their arguments
    assert Autoencoder() != Autoencoder(saved=False)


# Vectors, tables and series


@pytest.mark.once
def test_standard():
    table = np.random.default_rng(0).normal([5.0, -300.0, 2.0], [0.1, 40.0, 0.0], (500, 3)).astype("float32")
    table[0, 0] = np.nan
    codec = codecs.Standard.fitted(table)
    x = numpy(codec(ops.convert_to_tensor(table[1:])))
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-2)
    np.testing.assert_allclose(x.std(0), [1, 1, 0], atol=1e-2)
    np.testing.assert_allclose(numpy(codec.decode(ops.convert_to_tensor(x))), table[1:], rtol=1e-4)
    assert codecs.Standard.from_config(codec.get_config()) == codec
    with pytest.raises(ValueError, match="`std` positive"):
        codecs.Standard(0.0, [1.0, 0.0])


class Cubed:
    """A transformer with scikit-learn's methods, not linear, which gives a column more."""

    def transform(self, rows):
        assert np.ndim(rows) == 2
        return np.concatenate([np.cbrt(rows), rows[:, :1]], axis=1).astype("float64")

    def inverse_transform(self, rows):
        return rows[:, :-1] ** 3


@pytest.mark.once
@pytest.mark.parametrize("shape", [(2,), (4, 2)])
def test_transformed(shape, tmp_path):
    """In compiled training too; after loading it is given again."""
    codec = codecs.Transformed(Cubed())
    x = np.random.default_rng(0).normal(0, 9, (6, *shape)).astype("float32")
    encoded = numpy(codec(ops.convert_to_tensor(x)))
    assert encoded.shape == (6, *codec.data_shape(shape)) == (6, *shape[:-1], 3)
    np.testing.assert_allclose(encoded[..., :2], np.cbrt(x), rtol=1e-5)
    np.testing.assert_allclose(numpy(codec.decode(ops.convert_to_tensor(encoded))), x, rtol=1e-3)
    network = kdiff.networks.MLP(8, 1) if len(shape) == 1 else kdiff.networks.DiT(8, 1, 2)
    model = kdiff.DiffusionModel(network, codec=codec, ema=None)
    model.compile("adam")
    model.fit(x, epochs=1, verbose=0)
    options = {"num_samples": 3, "steps": 2}
    before = model.sample(**options)
    assert before.shape == (3, *shape)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="saved without its codec"):
        loaded.sample(**options)
    loaded.codec = codec
    np.testing.assert_allclose(loaded.sample(**options), before, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="with an inverse"):
        codecs.Transformed(3)
