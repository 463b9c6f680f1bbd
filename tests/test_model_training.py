"""What takes data: all models refuse the same mistakes, before a weight has moved; weights of positions; float16."""

import keras
import numpy as np
import pytest
from keras import ops

import kdiff
from kdiff import networks
from kdiff.autoencoding import AutoencoderTrainer
from kdiff.likelihood import BitsPerDim
from tests.test_contrastive import clip, pictures
from tests.toys import draw_weights, images, mostly_once, numpy

pytestmark = pytest.mark.eager

PIXELS, _, WORDS = pictures(8)
UNIT = (PIXELS / 127.5 - 1).astype("float32")
NAN = np.where(np.arange(8)[:, None, None, None] == 5, np.nan, UNIT).astype("float32")


def autoencoder(**options):
    return AutoencoderTrainer(networks.AutoencoderKL(widths=(4, 8)), **options)


def trainer(name):
    model = {"autoencoder": autoencoder, "clip": clip}[name]()
    model.compile(keras.optimizers.Adam(1e-3))
    return model


def data(name, x):
    return {"image": x, "text": WORDS[: len(x)]} if name == "clip" else {"image": x}


def batches(name, x):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(data(name, x)).batch(4)


NAMES = ["autoencoder", "clip"]
MISTAKES = {
    "bytes": (PIXELS.astype("float32"), {}, "255"),
    "nan": (NAN, {}, "`image` must be finite"),
    "bool": (PIXELS > 4, {}, "uint8, or floating-point"),
    "channels": (np.moveaxis(PIXELS, -1, 1)[:, :, :6], {}, "must have the shape"),
    "weights": (PIXELS, {"sample_weight": np.ones(8)}, "examples have no weights"),
    "classes": (PIXELS, {"class_weight": {0: 1.0}}, "no classes to weight"),
    "empty": (PIXELS[:0], {}, "is empty"),
}


@pytest.mark.once
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_before_a_weight_has_moved(name, mistake):
    model = trainer(name)
    model.fit(data(name, PIXELS), batch_size=4, verbose=0)
    before = model.get_weights()
    x, options, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        model.fit(data(name, x), verbose=0, **options)
    if not options:
        for method in (model.evaluate, model.train_on_batch, model.test_on_batch):
            with pytest.raises(ValueError, match=message):
                method(data(name, x))
        with pytest.raises(ValueError, match=message):
            model.fit(data(name, PIXELS), validation_data=data(name, x), verbose=0)
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.data
@pytest.mark.parametrize("name", NAMES)
def test_a_bad_batch_of_a_dataset_and_an_endless_one(name):
    model = trainer(name)
    with pytest.raises(ValueError, match=r"^`image` must be finite"):
        model.fit(batches(name, NAN), verbose=0)
    with pytest.raises(ValueError, match="endless"):
        model.fit(batches(name, PIXELS).repeat(), verbose=0)
    assert np.isfinite(model.fit(batches(name, PIXELS), verbose=0).history["loss"]).all()


@pytest.mark.once
@pytest.mark.parametrize("name", NAMES)
def test_what_has_a_loss_of_its_own_says_so(name):
    model = {"autoencoder": autoencoder, "clip": clip}[name]()
    for method in (model.fit, model.evaluate, model.train_on_batch):
        with pytest.raises(ValueError, match=r"no loss yet; call `compile\(\)`"):
            method(data(name, PIXELS))
    for options in ({"loss": "mse"}, {"metrics": ["mse"]}):
        with pytest.raises(ValueError, match="a loss of its own"):
            model.compile("adam", **options)
    for method in (model.predict, model.predict_on_batch, model.export):
        with pytest.raises(NotImplementedError, match=r"`reconstruct|`embed_image"):
            method(PIXELS)


@pytest.mark.once
def test_a_refused_batch_leaves_no_shapes_behind():
    model = trainer("clip")
    with pytest.raises(ValueError, match="finite"):
        model.fit({"image": NAN[:, :6, :6], "text": WORDS}, verbose=0)
    model.fit({"image": PIXELS, "text": WORDS}, verbose=0)
    assert model.shapes["image"] == (None, 8, 8, 3)


@pytest.mark.once
@pytest.mark.parametrize("name", NAMES)
def test_a_trainer_is_saved_before_it_is_compiled_and_over_a_good_file(name, tmp_path, monkeypatch):
    model = {"autoencoder": autoencoder, "clip": clip}[name]()
    if name == "clip":
        model.build({"image": (None, 8, 8, 3), "text": (None, 6)})
    path = tmp_path / "model.keras"
    model.save(path)
    assert not keras.saving.load_model(path).compiled
    size = path.stat().st_size

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(keras.layers.Layer, "save_own_variables", full)
    with pytest.raises(OSError, match="No space"):
        model.save(path)
    assert path.stat().st_size == size


@pytest.mark.parametrize("name", mostly_once(NAMES))
def test_float16_has_a_loss_scale(name):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = {"autoencoder": autoencoder, "clip": clip}[name]()
        model.compile("adam")
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        assert np.isfinite(model.fit(data(name, PIXELS), verbose=0).history["loss"]).all()
    finally:
        keras.config.set_dtype_policy("float32")


# --- weights of positions

SERIES = np.random.default_rng(1).standard_normal((6, 8, 2)).astype("float32")
HERE = (np.arange(8) < np.array([8, 6, 5, 4, 3, 1])[:, None]).astype("float32")  # series of these lengths, padded


def model_of_series(**options):
    network = networks.UNet.residual(4, levels=1, depth=1)
    model = kdiff.DiffusionModel(network, codec="identity", ema=None, **options)
    model.build((None, 8, 2))
    draw_weights(network)
    model.compile(keras.optimizers.SGD(0.1), weighted_metrics=["mse"])
    return model


def test_the_loss_does_not_look_where_the_weight_is_0():
    """It is the mean of w |target - output|^2, as Keras' own of an example's weight, and so is its gradient."""
    model = model_of_series()
    problem = model({"image": SERIES}, training=False)
    errors = numpy(ops.mean(ops.square(problem.target - problem.output), -1))
    loss, mse = model.evaluate(SERIES, sample_weight=HERE, verbose=0)
    np.testing.assert_allclose(loss, np.mean(HERE * errors), rtol=1e-5)
    np.testing.assert_allclose(mse, np.sum(HERE * errors) / HERE.sum(), rtol=1e-5)
    whole = [model.evaluate(SERIES, sample_weight=w, verbose=0)[0] for w in (None, np.ones(6), np.ones((6, 8)))]
    np.testing.assert_allclose(whole, whole[0], rtol=1e-6)
    before = model.network.get_weights()
    model.fit({"image": SERIES, "sample_weight": 0 * HERE}, verbose=0)
    for one, other in zip(before, model.network.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("objective", mostly_once(["loss_aware", "denoising"]))
def test_weights_of_positions_go_with_other_objectives_and_metrics(objective):
    model = model_of_series(objective=objective)
    model.compile("adam", metrics=["mse", BitsPerDim()])
    history = model.fit(SERIES, sample_weight=HERE, validation_data=(SERIES, None, HERE), epochs=2, verbose=0).history
    assert all(np.isfinite(values).all() for values in history.values())


@pytest.mark.once
def test_weights_of_other_positions_are_refused():
    for weight in (HERE[:, :7], HERE[..., None], HERE.T):
        with pytest.raises(ValueError, match=r"or \(6, 8\), a number a position"):
            model_of_series().fit(SERIES, sample_weight=weight, verbose=0)
    haar = kdiff.DiffusionModel(networks.UNet.residual(4, levels=1, depth=1), codec="haar")
    haar.compile("adam")
    with pytest.raises(ValueError, match=r"or \(8, 4, 4\), a number a position"):
        haar.fit(PIXELS, sample_weight=np.ones((8, 8, 8)), verbose=0)
    haar.fit(PIXELS, sample_weight=np.ones((8, 4, 4)), verbose=0)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="elsewhere Adam is Keras' own")
@pytest.mark.parametrize("options", [{"weight_decay": 0.1, "clipnorm": 1.0}, {"gradient_accumulation_steps": 2}])
def test_adam_is_that_of_keras(options, monkeypatch):
    """In one operation a weight: after some steps the weights, averages and moments are the same, compiled and not."""
    kind = keras.optimizers.AdamW if "weight_decay" in options else keras.optimizers.Adam
    found = {}
    for fused, eager in ((False, False), (True, False), (True, True)):
        if not fused:
            monkeypatch.setattr(kdiff.backend, "fuse_updates", lambda optimizer: None)
        rate = keras.optimizers.schedules.CosineDecay(1e-2, 10)
        network = kdiff.networks.MLP(8, 1, conditions={"label": kdiff.blocks.LabelEmbedding(3)})
        model = kdiff.DiffusionModel(network, codec="identity", ema=0.9)
        model.compile(kind(rate, epsilon=1e-4, **options), run_eagerly=eager)
        data = {"image": images(12, (3,)), "label": np.arange(12) % 3}
        model.build({"image": (None, 3), "label": (None,)})
        draw_weights(network)
        model.reset_ema()
        model.fit(data, batch_size=4, shuffle=False, verbose=0, epochs=2)
        assert ("update_step" in vars(model.optimizer)) == fused
        found[fused, eager] = [numpy(one) for one in (*model.variables, *model.optimizer.variables)]
        monkeypatch.undo()
    for way in ((True, False), (True, True)):
        for one, wanted in zip(found[way], found[False, False], strict=True):
            np.testing.assert_allclose(one, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="elsewhere Adam is Keras' own")
@pytest.mark.parametrize(
    "name", ["_apply_weight_decay", "_get_variable_index", "_momentums", "_use_weight_decay", "_velocities"]
)
def test_adam_of_a_keras_with_other_private_names_is_left_alone(name, monkeypatch):
    optimizer = keras.optimizers.Adam()
    optimizer.build([keras.Variable(np.zeros(3, "float32"))])
    with monkeypatch.context() as changed:
        for holder in (optimizer, *type(optimizer).__mro__):
            if name in vars(holder):
                changed.delattr(holder, name)
        kdiff.backend.fuse_updates(optimizer)
        assert not {"apply", "update_step"} & vars(optimizer).keys()
    kdiff.backend.fuse_updates(optimizer)
    assert {"apply", "update_step"} <= vars(optimizer).keys()
