"""Data on its way into `fit`, and images on every way into a run: taken as it was meant, or refused in plain words."""

import gc

import keras
import numpy as np
import pytest
from keras import ops

from kdiff import DiffusionModel, guidance
from kdiff.blocks import LabelEmbedding
from kdiff.model import feeding
from kdiff.networks import UNet
from tests.toys import compiled_model, numpy

pytestmark = pytest.mark.eager

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), dtype="uint8")
UNIT = (PIXELS / 127.5 - 1).astype("float32")
LABELS = np.arange(8)


def model(labelled=False, built=True, **options):
    conditions = {"label": LabelEmbedding(10, dropout=0.1)} if labelled else None
    made = compiled_model(UNet.residual(8, 1, 1, conditions=conditions), **options)
    if built:
        made.build({"image": (None, 8, 8, 1), **({"label": (None,)} if labelled else {})})
    return made


def arrays(labels):
    return PIXELS, labels


def dictionary(labels):
    return ({"image": PIXELS, "label": labels},)


def generator(labels):
    return ((x for x in [(PIXELS, labels)]),)


def dataset(labels):
    tf = pytest.importorskip("tensorflow")
    return (tf.data.Dataset.from_tensor_slices((PIXELS, labels)).batch(8),)


def loader(labels):
    torch = pytest.importorskip("torch")
    return (torch.utils.data.DataLoader(list(zip(PIXELS, labels, strict=True)), batch_size=8),)


@pytest.mark.parametrize("form", [arrays, dictionary, generator, dataset, loader])
def test_labels_in_one_column_are_labels(form):
    """As `keras.datasets` gives them; and the same loss as of those in a row."""
    losses = []
    for labels in (LABELS, LABELS[:, None]):
        one = model(labelled=True, built=False)
        losses.append(one.fit(*form(labels), shuffle=False, verbose=0).history["loss"][0])
        assert one.shapes["label"] == (None,)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    np.testing.assert_array_equal(one.sample(2, label=[[1], [2]], steps=1), one.sample(2, label=[1, 2], steps=1))


@pytest.mark.once
def test_lists_are_arrays():
    one = model(labelled=True)
    one.fit(PIXELS, LABELS.tolist(), sample_weight=[1.0] * 8, verbose=0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS + 0.5, "integers; received 0.5"),
        (LABELS + 3, "`label` holds 10, which stands for none; classes are 0..9: subtract 1"),
        (LABELS - 1, r"must be in 0\.\.10; received -1"),
    ],
)
def test_labels_that_are_none(labels, message):
    one = model(labelled=True)
    before = [numpy(weight) for weight in one.network.weights]
    with pytest.raises(ValueError, match=message):
        one.fit(PIXELS, labels, verbose=0)
    for weight, old in zip(one.network.weights, before, strict=True):
        np.testing.assert_array_equal(numpy(weight), old)


@pytest.mark.once
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.eye(10)[LABELS], r"received: \(None, 10\).*argmax"),
        (np.array(list("abcdefgh")), "LabelEmbedding, takes numbers.*return_inverse"),
        (list("abcdefgh"), "LabelEmbedding, takes numbers.*return_inverse"),
        (LABELS.astype(object), "`label` holds Python objects"),
        (np.array([None] * 8), "`label` holds Python objects"),
    ],
)
def test_labels_of_another_kind(labels, message):
    with pytest.raises(ValueError, match=message):
        model(labelled=True, built=False).fit(PIXELS, labels, verbose=0)
    with pytest.raises(ValueError, match="must be integers"):
        model(labelled=True).sample(2, label=[0.5, 2.0], steps=1)


WAYS = {
    "fit": lambda one, x: one.fit(x, verbose=0),
    "evaluate": lambda one, x: one.evaluate(x, verbose=0),
    "image": lambda one, x: one.sample(len(x), image=x, strength=0.5, steps=2),
    "known": lambda one, x: one.sample(len(x), known=x, mask=np.eye(8), steps=2),
    "Inpaint": lambda one, x: one.sample(len(x), guidance=guidance.Inpaint(x, np.eye(8)), steps=2),
    "invert": lambda one, x: one.invert(x, sampler="ddim", steps=2),
}


@pytest.mark.once
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (PIXELS.astype("float32"), r"in \[-1.0, 1.0\]; received 0.0 to 255.0"),
        (PIXELS.astype("int32") - 300, "in 0..255"),
        (PIXELS > 9, "received bool"),
        (UNIT.astype(">f4"), "byte order"),
    ],
)
def test_images_are_checked_on_all_ways_in(way, x, message):
    with pytest.raises(ValueError, match=message):
        WAYS[way](model(), x)


@pytest.mark.once
def test_pixels_from_zero_to_one_are_said():
    with pytest.warns(UserWarning, match=r"all in \[0, 1\].*2 \* x - 1"):
        model().fit((UNIT + 1) / 2, verbose=0)


@pytest.mark.once
def test_what_looks_like_another_layout():
    x = np.repeat(PIXELS, 3, -1).transpose(0, 3, 1, 2)
    for picture in (x, x[:, :, :5]):
        with pytest.raises(ValueError, match=r"channels first.*moveaxis"):
            model(built=False).fit(picture, verbose=0)
    tf = pytest.importorskip("tensorflow")
    with pytest.raises(ValueError, match=r"one picture.*\.batch\(32\)"):
        model(built=False).fit(tf.data.Dataset.from_tensor_slices(PIXELS), verbose=0)
    for grey in (PIXELS[..., 0], UNIT[..., 0]):  # as keras.datasets gives digits
        with pytest.raises(ValueError, match=r"without an axis of channels.*x\[\.\.\., None\]"):
            model(built=False).fit(grey, verbose=0)
    one = model(built=False)
    one.build((None, 3, 8, 8))
    one.fit(x, verbose=0)  # whoever says so means it


@pytest.mark.once
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (np.full(8, np.nan), "finite numbers that are not negative"),
        (-np.ones(8), "finite numbers that are not negative"),
        (np.array(list("abcdefgh")), "finite numbers that are not negative"),
        (
            np.ones((8, 1)),
            r"must have the shape \(8,\), a number an example, or \(8, 8, 8\), a number a position; received: \(8, 1\)",
        ),
        (np.ones(8, ">f4"), "byte order"),
    ],
)
def test_sample_weights(weight, message):
    with pytest.raises(ValueError, match=message):
        model().fit(PIXELS, sample_weight=weight, verbose=0)


@pytest.mark.once
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (UNIT.astype(">f4"), r"`image` has the type >f4, in the byte order"),
        ({"image": None}, r"\['image'\] must be arrays; received None"),
        (np.array([None] * 8), "`image` holds Python objects"),
        (list(PIXELS), r"received: list: `numpy.stack\(x\)`"),
        ({"image": PIXELS, "digit": LABELS}, r"missing: \['label'\]; received \['digit'\]"),
    ],
)
def test_other_arrays(x, message):
    with pytest.raises((TypeError, ValueError), match=message):
        model(labelled=isinstance(x, dict) and "digit" in x).fit(x, verbose=0)
    with pytest.raises(ValueError, match="a batch without examples"):
        model().fit((x for x in [PIXELS[:0]]), verbose=0)


@pytest.mark.once
def test_calls_of_keras_that_mean_nothing_here(tmp_path):
    one = model()
    assert one.fit(PIXELS, epochs=0, verbose=0).history == {}
    with pytest.raises(ValueError, match="no classes to weight; give `sample_weight`"):
        one.fit(PIXELS, class_weight={0: 1.0}, verbose=0)
    with pytest.raises(NotImplementedError, match="sample"):
        one.predict(PIXELS)
    with pytest.raises(NotImplementedError, match=r"model\.keras"):
        one.export(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model\.keras.*model\.weights\.h5"):
        one.save(tmp_path / "model.h5")
    with pytest.raises(ValueError, match="no loss yet; call `compile"):
        DiffusionModel(UNet.residual(8, 1, 1)).evaluate(PIXELS)


@pytest.mark.once
@pytest.mark.parametrize(("name", "hint"), [("num_steps", "steps"), ("strenght", "strength"), ("seeds", "seed")])
def test_a_name_that_is_nearly_an_argument(name, hint):
    with pytest.raises(ValueError, match=rf"received: \['{name}'\]. Did you mean '{hint}'"):
        model().sample(2, **{name: 2})


@pytest.mark.once
def test_workers_that_persist_do_not_keep_batches_from_the_check(monkeypatch):
    """Those of a loader that was iterated before, which goes on as it was."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)  # for its wait after an error
    bad = np.where(np.arange(8)[:, None, None, None] == 5, np.nan, UNIT).astype("float32")
    loader = torch.utils.data.DataLoader(bad, batch_size=4, num_workers=1, persistent_workers=True)
    batches = iter(loader)
    next(batches)
    with pytest.raises(ValueError, match="finite"):
        model().fit(loader, verbose=0)
    assert next(batches).isnan().any()
    gc.collect()  # ends the workers


class Plain(keras.layers.Layer):
    """A network of one's own, which is not a Keras model."""

    def __init__(self, **options):
        super().__init__()
        self.last = keras.layers.Conv2D(1, 3, padding="same", **options)

    def build(self, shapes):
        self.last.build((None, 8, 8, 3))
        self.last.kernel.assign(np.random.default_rng(0).normal(size=(3, 3, 3, 1)))

    def call(self, inputs, training=None):
        return self.last(ops.concatenate([inputs["image"], inputs["image"] ** 2, ops.sin(inputs["image"])], -1))


@pytest.mark.parametrize("dtype", ["float32", "mixed_float16"])
def test_grey_images_whose_count_leaves_a_batch_of_one(dtype):
    """With Keras' own convolution to one channel, of which PyTorch has no gradient there."""
    one = compiled_model(Plain(dtype=dtype), "sgd")
    one.build((None, 8, 8, 1))
    before = numpy(one.network.last.kernel)
    x = UNIT[:2]
    output = one.network({"image": x})
    channels = np.concatenate([x, x**2, np.sin(x)], -1)
    exact = ops.conv(channels, before, padding="same", data_format="channels_last")
    np.testing.assert_allclose(numpy(output), numpy(exact), atol=1e-5 if dtype == "float32" else 0.02)
    history = one.fit(PIXELS[:5], batch_size=4, shuffle=False, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert np.abs(numpy(one.network.last.kernel) - before).max() > 1e-3


def test_of_batches_on_an_accelerator_the_numbers_of_the_first_are_looked_at(monkeypatch):
    """Later ones are not waited for; names and shapes are looked at always, and all of those on the host."""
    bad = np.full_like(UNIT, np.nan)
    one = model(labelled=True)
    for away in (True, False):
        monkeypatch.setattr(feeding.backend, "is_away", lambda x, away=away: away)
        check = one._new_check(one.shapes)
        with pytest.raises(ValueError, match="finite"):
            check({"image": bad, "label": LABELS})
        for _ in range(feeding.LOOKED_AT):
            check({"image": UNIT, "label": LABELS})
        if away:
            check({"image": bad, "label": LABELS})
        else:
            with pytest.raises(ValueError, match="finite"):
                check({"image": bad, "label": LABELS})
        with pytest.raises(ValueError, match="shape"):
            check({"image": UNIT[:, :4], "label": LABELS})
        with pytest.raises(ValueError, match="missing"):
            check({"image": UNIT})
