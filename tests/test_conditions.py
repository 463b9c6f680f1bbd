import keras
import numpy as np
import pytest
from keras import ops

from kdiff import blocks, random
from kdiff.blocks import (
    EncodedText,
    LabelEmbedding,
    MLPEmbedding,
    OptionalCondition,
    SinusoidalEmbedding,
    TextEncoder,
    TransformerBlock,
)
from kdiff.blocks.conditions import DROPPING
from kdiff.networks import MLP
from kdiff.text import BytePair, Bytes
from tests.helpers_gradients import perturb, run, value_and_gradients
from tests.toys import compiled_model, draw_weights, mostly_once, numpy

pytestmark = pytest.mark.eager

COLOURS = ["red", "green", "blue", ""]
NAN = np.nan


def floats(*shape, absent=()):
    x = np.random.default_rng(3).standard_normal(shape).astype("float32")
    x[list(absent)] = NAN
    return x


TEXT = {"tokenizer": Bytes(5), "width": 8, "depth": 1, "heads": 2}
TOKENS = Bytes(5)(COLOURS)
# name: (layer, input, shape of the output of one example). Where `embed` is taken its width is 6.
CASES = {
    "label": (LabelEmbedding(3, dropout=0.3), np.array([0, 2, 1, 3], "int32"), (6,)),
    "text": (TextEncoder(**TEXT, block=TransformerBlock(2, zero=False, dropout=0.2), seed=3), TOKENS, (5, 8)),
    "text_pooled": (TextEncoder(**TEXT, pooled=True, dropout=0.3), TOKENS, (6,)),
    "vector": (OptionalCondition(dropout=0.3), floats(4, 6, absent=[1]), (6,)),
    "tokens": (OptionalCondition(keras.layers.Dense(8)), floats(4, 5, 3, absent=[0, 2]), (5, 8)),
    "number": (OptionalCondition(MLPEmbedding(SinusoidalEmbedding(8), width=6)), floats(4, absent=[3]), (6,)),
    "given": (OptionalCondition("feed_forward", floats(6), dropout=0.3, seed=2), floats(4, 6), (6,)),
    "encoded": (EncodedText(None, keras.layers.Dense(8)), floats(4, 5, 3, absent=[1]), (5, 8)),
}


def model_of(layer, x):
    inputs = {"x": keras.Input(x.shape[1:], dtype=x.dtype.name, name="x"), "embed": keras.Input((6,), name="embed")}
    return keras.Model(inputs, layer(inputs["x"], embed=inputs["embed"]))


@pytest.mark.parametrize("name", CASES)
def test_condition(name, tmp_path):
    layer, x, shape = CASES[name]
    model, inputs = model_of(layer.clone(), x), {"x": x, "embed": floats(len(x), 6)}
    assert model.output_shape == (None, *shape)
    perturb(model)
    expected, gradients = value_and_gradients(model, inputs)
    assert expected.shape == (len(x), *shape)
    assert np.isfinite(expected).all()
    for path, gradient in gradients.items():
        if not path.endswith("key/bias"):
            assert 1e-6 < np.abs(gradient).max() < np.inf, path
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(run(loaded, inputs), expected, rtol=1e-5, atol=1e-5)
    lower = model_of(layer.clone(dtype="mixed_bfloat16"), x)
    assert keras.backend.standardize_dtype(lower.output.dtype) == "bfloat16"
    lower.set_weights(model.get_weights())
    # Each rounding to bfloat16 errs by up to 2^-9; some ten follow one another, and weights of 0.2 enlarge them.
    error = run(lower, inputs).astype("float32") - expected
    assert np.sqrt(np.mean(error**2)) < 0.04 * np.sqrt(np.mean(expected**2))


@pytest.mark.parametrize("name", ["label", "text", "text_pooled", "vector", "given"])
def test_what_is_dropped_is_a_formula(name):
    """Compiled or not; the block's own dropout of case "text" is turned off."""
    layer, x, _ = CASES[name]
    dropout = 0.4
    layer = layer.clone(dropout=dropout, **({"block": None} if name == "text" else {}))
    x = np.concatenate([x] * 8)
    model, embed = model_of(layer, x), floats(len(x), 6)
    perturb(model)
    masks = []
    for call in range(2):
        key = numpy(random.fold_in(np.array([layer.seed, call], "int32"), 0, DROPPING))
        dropped = numpy(random.uniform(key, (len(x),))) < dropout
        rows = np.where(dropped.reshape(-1, *[1] * (x.ndim - 1)), layer.null, x).astype(x.dtype)
        expected = run(model, {"x": rows, "embed": embed})
        if call == 0:
            fresh = model_of(layer.clone(), x)
            fresh.set_weights(model.get_weights())
            compiled = run(fresh, {"x": x, "embed": embed}, training=True)
            np.testing.assert_allclose(compiled, expected, rtol=1e-5, atol=1e-5)
        found = numpy(ops.stop_gradient(model({"x": x, "embed": embed}, training=True)))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        masks.append(dropped)
    assert (masks[0] != masks[1]).any()


@pytest.mark.once
def test_the_rate_of_dropping():
    layer = LabelEmbedding(1, width=1, dropout=0.1, seed=7)
    layer.build((None,))
    layer.table.assign([[0.0], [1.0]])
    rate = float(np.mean([numpy(layer(np.zeros(2000, "int32"), training=True)) for _ in range(5)]))
    assert abs(rate - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 10_000)


def test_conditions_of_one_seed_are_dropped_together():
    def dropped(layer, x):
        return np.isclose(numpy(layer(x, training=True)), numpy(layer(np.full_like(x, layer.null)))).all(axis=-1)

    labels, vectors = np.zeros(200, "int32"), floats(200, 6)
    one = dropped(LabelEmbedding(1, 6, dropout=0.5, seed=1), labels)
    assert 60 < one.sum() < 140
    np.testing.assert_array_equal(one, dropped(OptionalCondition(dropout=0.5, seed=1), vectors))
    assert (one != dropped(OptionalCondition(dropout=0.5, seed=2), vectors)).any()


# --- what stands for no condition


def test_nulls():
    assert LabelEmbedding(3).null is None
    assert LabelEmbedding(3, dropout=0.1).null == 3
    np.testing.assert_array_equal(TextEncoder(Bytes(4)).null, [0, 0, 0, 0])
    layer = OptionalCondition()
    assert np.isnan(layer.null)
    layer.build((None, 2, 3))
    np.testing.assert_array_equal(layer.null, np.full((2, 3), NAN))
    np.testing.assert_array_equal(OptionalCondition(absent=[1, 2]).null, [1.0, 2.0])


def test_an_absent_row_is_the_learned_one():
    layer = OptionalCondition(keras.layers.Dense(3))
    y = numpy(ops.stop_gradient(layer(floats(3, 4, absent=[1]))))
    learned = layer.layer(layer.learned.value[None])
    np.testing.assert_allclose(y[1:2], numpy(ops.stop_gradient(learned)), rtol=1e-5, atol=1e-6)
    layer.check(floats(3, 4, absent=[1]))


@pytest.mark.parametrize("bad", [[NAN, 1.0], [np.inf, 0.0], [np.inf, NAN]])
def test_a_row_that_is_broken_is_not_absent(bad):
    x = np.array([[1, 2], bad], "float32")
    with pytest.raises(ValueError, match=r"must be finite, or all NaN for an absent condition; received: \["):
        OptionalCondition().check(x)
    with pytest.raises(ValueError, match=r"must be finite; received: \["):
        OptionalCondition(absent=[0, 0]).check(np.array([[NAN, NAN]]))


@pytest.mark.once
def test_condition_errors():
    text = TextEncoder(Bytes(4), 8)
    for function, message in [
        (lambda: LabelEmbedding(3, dropout=1.5), r"LabelEmbedding: `dropout` must be a number in \[0, 1\]"),
        (lambda: TextEncoder(seed=-1), "TextEncoder: `seed` must be a whole number of at least 0"),
        (lambda: TextEncoder(depth=-1), "`depth`"),
        (lambda: text(np.zeros((1, 5), "int32")), r"\(batch, 4\), as the tokenizer returns them; received: \(1, 5\)"),
        (lambda: text.check(np.array([[0, 1, 2, 257]])), r"in 0\.\.256; received int64, 0 to 257"),
        (lambda: text.check(np.zeros((1, 4))), r"in 0\.\.256; received float64"),
        (lambda: OptionalCondition(absent=[1.0])(floats(2, 3)), r"`absent`, \(1,\); received: \(3,\)"),
        (lambda: OptionalCondition().build((None, None, 3)), r"of known size; received: \(None, 3\)"),
        (lambda: blocks.Block.get("condition"), "Unknown Block 'condition'"),
        (lambda: EncodedText().prepare(["a"]), "strings need an `encoder`"),
    ]:
        with pytest.raises(ValueError, match=message):
            function()
    with pytest.raises(TypeError, match="`encoder` must be a function from a list of strings"):
        EncodedText(keras.layers.Dense(3))


def test_a_dropout_needs_a_null():
    class Doubled(blocks.Condition):
        named = False

        def encode(self, x, embed, training):
            return 2 * x

    np.testing.assert_array_equal(numpy(Doubled()(floats(2, 3), training=True)), 2 * floats(2, 3))
    with pytest.raises(ValueError, match="Doubled: `dropout` needs a `null`"):
        Doubled(0.5)(floats(2, 3), training=True)


# --- in a model: strings from `fit` to `sample`

VECTORS = floats(8, 3)
CAPTIONS = ["red", "a blue", "", "blue", "red", "green", "a red", "red"]


def text_model(**conditions):
    conditions = conditions or {"text": TextEncoder(**{**TEXT, "tokenizer": Bytes(8)}, dropout=0.3)}
    return vector_model(conditions, ema=None, seed=1)


def vector_model(conditions, **options):
    """A model of vectors of three numbers, which attends to tokens."""
    policy = next(iter(conditions.values())).dtype_policy
    network = MLP(8, 1, TransformerBlock(2, adaptive=True), _time(), conditions, dtype=policy)
    return compiled_model(network, codec="identity", **options)


def _time():
    return MLPEmbedding(SinusoidalEmbedding(6), 6)


class Batches(keras.utils.PyDataset):
    def __init__(self, data):
        super().__init__()
        self.data = data

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {name: value[4 * index : 4 * index + 4] for name, value in self.data.items()}


def generator(data):
    for index in range(2):
        yield Batches(data)[index]


def tf_dataset(data):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(data).batch(4)


def loader(data):
    torch = pytest.importorskip("torch")
    rows = [{name: value[i] for name, value in data.items()} for i in range(8)]
    return torch.utils.data.DataLoader(rows, batch_size=4)


DATA = pytest.mark.data
FORMS = {
    "list": lambda data: data,
    "str": lambda data: {**data, "text": np.array(data["text"])},
    "bytes": lambda data: {**data, "text": np.array([text.encode() for text in data["text"]], dtype=object)},
    "tokens": lambda data: {**data, "text": Bytes(8)(data["text"])},
    "py_dataset": Batches,
    "generator": generator,
    "tf.data": tf_dataset,
    "loader": loader,
}


def batches(data):
    """What a model is given, as NumPy arrays by name."""
    parts = [data] if isinstance(data, dict) else data
    parts = [part[0] if isinstance(part, tuple) else part for part in parts]
    return {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("form", [pytest.param(form, marks=DATA if form == "tf.data" else ()) for form in FORMS])
def test_text_in_every_form_of_data(form):
    model = text_model()
    data, _ = model._checked(FORMS[form]({"image": VECTORS, "text": CAPTIONS}))
    assert model.shapes == {"image": (None, 3), "text": (None, 8)}
    if form == "py_dataset":
        data = [data[0], data[1]]
    found = batches(data)
    assert found["text"].dtype == np.int32
    np.testing.assert_array_equal(found["text"], Bytes(8)(CAPTIONS))
    np.testing.assert_array_equal(found["image"], VECTORS)


def losses(form, data):
    model = text_model()
    model.build({"image": (None, 3), "text": (None, 8)})
    draw_weights(model.network)
    options = {"batch_size": 4} if form == "list" else {}
    return model.fit(FORMS[form](data), epochs=1 + (form != "generator"), shuffle=False, verbose=0, **options).history[
        "loss"
    ]


@pytest.mark.parametrize("form", ["list", "generator", "py_dataset", "loader", pytest.param("tf.data", marks=DATA)])
def test_text_trains_as_its_tokens(form, expected_losses):
    found = losses(form, {"image": VECTORS, "text": CAPTIONS})
    np.testing.assert_allclose(found, expected_losses[: len(found)], rtol=1e-5)


@pytest.fixture(scope="module")
def expected_losses():
    return losses("list", {"image": VECTORS, "text": Bytes(8)(CAPTIONS)})


def built_model(**conditions):
    model = text_model(**conditions)
    model.train_on_batch({"image": VECTORS, "text": CAPTIONS})
    draw_weights(model.network)
    return model


def test_text_in_sample():
    model = built_model()

    def sample(text, **options):
        return model.sample(2, text=text, steps=2, **options)

    red = sample("red")
    for same in (["red", "red"], b"red", np.array("red"), np.array(["red", "red"]), Bytes(8)("red")[0]):
        np.testing.assert_allclose(sample(same), red, atol=1e-6)
    assert np.abs(sample("blue") - red).max() > 1e-3
    np.testing.assert_allclose(sample(None), sample(""), atol=1e-6)
    assert np.abs(sample("red", guidance=3.0) - red).max() > 1e-3
    with pytest.raises(ValueError, match=r"`text` must have 2 rows, \(2, 8\); received: \(3, 8\)"):
        sample(["red", "blue", ""])
    with pytest.warns(UserWarning, match="room for 8 tokens; 'red and blue' has 12 and is cut"):
        sample("red and blue")


@pytest.mark.once
def test_a_model_with_text_saves(tmp_path):
    pytest.importorskip("tokenizers", reason="the extra `text` is not installed")
    tokenizer = BytePair.learn(CAPTIONS, length=3)
    model = built_model(text=TextEncoder(tokenizer, 8, 1, 2, dropout=0.3))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.network.conditions["text"].tokenizer == tokenizer
    for text in ("a red", None):
        expected = model.sample(2, text=text, steps=2)
        np.testing.assert_allclose(loaded.sample(2, text=text, steps=2), expected, atol=1e-5)
    batch = {"image": VECTORS, "text": CAPTIONS}
    assert np.isclose(
        loaded.train_on_batch(batch), model.train_on_batch(batch), rtol=1e-5
    )  # drops go on where they were


@pytest.mark.parametrize("policy", mostly_once(["mixed_bfloat16", "float32"]))
def test_absent_conditions_in_a_model(policy):
    conditions = {
        "text": EncodedText(lambda texts: np.stack([np.full((2, 3), len(t), "float32") for t in texts]), dtype=policy),
        "extent": OptionalCondition(_time(), dtype=policy),
    }
    model = vector_model(conditions)
    data = {"image": VECTORS, "text": CAPTIONS, "extent": floats(8, absent=[2, 5])}
    history = model.fit(data, batch_size=4, epochs=2, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert model.shapes["text"] == (None, 2, 3)
    for weight in (conditions["extent"].learned, conditions["text"].learned):
        assert np.isfinite(numpy(weight)).all()
    assert np.isfinite(model.sample(2, text="red", extent=None, steps=2, guidance=2.0)).all()
    for bad in ({"extent": np.inf}, {"text": [[1, 2, 3], [4, NAN, 6]]}):
        with pytest.raises(ValueError, match="must be finite"):
            model.sample(2, **{"text": "red", "extent": 1.0, **bad}, steps=2)
    data["text"] = floats(8, 2, 3)
    data["text"][3, 1, 0] = NAN
    with pytest.raises(ValueError, match="`text` must be finite"):
        model.fit(data, verbose=0)


@pytest.mark.once
def test_an_encoder_that_is_not_saved(tmp_path):
    def encoder(texts):
        return np.stack([np.full((2, 3), len(text), "float32") for text in texts])

    model = built_model(text=EncodedText(encoder, keras.layers.Dense(6), absent=encoder([""])[0]))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    expected = model.sample(2, text="red", steps=2)
    np.testing.assert_allclose(loaded.sample(2, text=encoder(["red"])[0], steps=2), expected, atol=1e-5)
    with pytest.raises(ValueError, match="strings need an `encoder`"):
        loaded.sample(2, text="red", steps=2)
    loaded.network.conditions["text"].encoder = encoder
    np.testing.assert_allclose(loaded.sample(2, text="red", steps=2), expected, atol=1e-5)


class Names(blocks.LabelEmbedding):
    """Classes by their names: a layer with a `prepare` of its own."""

    def prepare(self, values):
        if np.asarray(values).dtype.kind not in "USO":
            return np.asarray(values)
        return np.array([COLOURS.index(v.decode() if isinstance(v, bytes) else v) for v in np.asarray(values)], "int32")


@pytest.mark.parametrize("form", ["arrays", pytest.param("tf.data", marks=DATA)])
def test_a_layer_prepares_what_it_likes(form):
    model = vector_model({"label": Names(4)})
    x, y = VECTORS[:4], ["red", "blue", "blue", "green"]
    data = (x, y) if form == "arrays" else (tf_dataset((x, y)),)
    model.fit(*data, verbose=0)
    assert model.shapes["label"] == (None,)
    np.testing.assert_array_equal(model.sample(2, label="blue", steps=1), model.sample(2, label=2, steps=1))


@pytest.mark.once
def test_text_errors():
    model = built_model()
    data = {"image": VECTORS, "text": CAPTIONS}
    with pytest.raises(ValueError, match=r"takes no \['title'\]"):
        model.fit({**data, "title": CAPTIONS}, verbose=0)
    with pytest.raises(ValueError, match=r"missing: \['text'\]"):
        model.fit({"image": data["image"]}, verbose=0)
    with pytest.raises(ValueError, match="`text` must have 8 rows"):
        model.fit({**data, "text": CAPTIONS[:4]}, verbose=0)
    with pytest.raises(TypeError, match="must be a string, or a list or an array of strings; received: None"):
        model.fit({**data, "text": [*CAPTIONS[:7], None]}, verbose=0)
    with pytest.raises(ValueError, match=r"missing: \['text'\]"):
        model.sample(2)
    labels = vector_model({"label": LabelEmbedding(3)})
    with pytest.raises(ValueError, match="`label` is text, and its layer, LabelEmbedding, takes numbers"):
        labels.fit(data["image"], CAPTIONS, verbose=0)
    labels.build({"image": (None, 3), "label": (None,)})
    with pytest.raises(ValueError, match="`label` cannot be None, for nothing stands for no condition"):
        labels.sample(2, label=None)
