"""CLIP: its loss and the bound of its scale by hand, retrieval, zero-shot classification, saving."""

import math

import keras
import numpy as np
import pytest
from keras import ops

from kdiff.blocks import TextEncoder
from kdiff.contrastive import LARGEST_SCALE, Contrastive
from kdiff.encoders import CLIPText, CLIPVision
from kdiff.text import Bytes
from tests.toys import draw_weights, images, mostly_once, numpy

pytestmark = pytest.mark.eager

WORDS = ["red", "green", "blue", "black", "white", "grey", "pink", "cyan"]
COLOURS = np.random.default_rng(0).integers(0, 256, (8, 3)).astype("uint8")


def clip(**options):
    vision = CLIPVision(8, 4, 3, 16, 1, 2, 32, projection=12)
    return Contrastive(vision, CLIPText(257, 6, 16, 1, 2, 32, projection=12), Bytes(6), **options)


def pictures(count=32, seed=0):
    """Flat pictures of eight colours, and their names."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 8
    x = COLOURS[labels][:, None, None] + rng.integers(0, 3, (count, 8, 8, 3))
    return np.clip(x, 0, 255).astype("uint8"), labels, [WORDS[label] for label in labels]


def built(**options):
    model = clip(**options)
    model.build({"image": (None, 8, 8, 3), "text": (None, 6)})
    return draw_weights(model)


def by_hand(u, v, scale):
    """Figure 3 of the paper, in float64."""
    s = scale * u.astype("float64") @ v.astype("float64").T
    rows = -np.diag(s) + np.log(np.exp(s).sum(1))
    columns = -np.diag(s) + np.log(np.exp(s).sum(0))
    return (rows.mean() + columns.mean()) / 2, (s.argmax(1) == np.arange(len(s))), (s.argmax(0) == np.arange(len(s)))


def test_the_loss_is_the_papers():
    model = built()
    x, _, words = pictures(8)
    model.log_scale.assign(1.3)
    tokens = Bytes(6)(words)
    parts = {name: numpy(value) for name, value in model({"image": x, "text": tokens}).items()}
    u, v = model.embed_image(x, batch_size=3), model.embed_text(words)
    np.testing.assert_allclose(np.linalg.norm(u, axis=-1), 1, atol=1e-5)
    loss, rows, columns = by_hand(u, v, math.exp(1.3))
    np.testing.assert_allclose(parts["loss"], loss, rtol=1e-4)
    np.testing.assert_array_equal(parts["image_to_text"], rows)
    np.testing.assert_array_equal(parts["text_to_image"], columns)


@pytest.mark.once
def test_the_scale_begins_and_ends_where_the_paper_says():
    model = clip()
    model.build({"image": (None, 8, 8, 3), "text": (None, 6)})
    np.testing.assert_allclose(math.exp(float(model.log_scale)), 1 / 0.07, rtol=1e-5)
    model.log_scale.assign(math.log(LARGEST_SCALE) - 1e-3)
    model.compile(keras.optimizers.SGD(1.0))
    model.optimizer.build([model.log_scale])
    model.optimizer.apply([ops.convert_to_tensor(-1e3, "float32")], [model.log_scale])  # a step upwards
    np.testing.assert_allclose(math.exp(float(model.log_scale)), 100, rtol=1e-5)


@pytest.mark.parametrize("policy", mostly_once(["mixed_bfloat16", "float32"]))
def test_it_learns_and_loads(policy, tmp_path):
    """Colours and their names: retrieval among eight, and zero-shot; then the same numbers from the file."""
    keras.config.set_dtype_policy(policy)
    try:
        keras.utils.set_random_seed(0)
        model = clip()
    finally:
        keras.config.set_dtype_policy("float32")
    x, labels, words = pictures(8)
    model.compile(keras.optimizers.Adam(1e-2))
    model.fit({"image": x, "text": words}, batch_size=8, epochs=25, verbose=0)
    found = model.evaluate({"image": x, "text": words}, batch_size=8, verbose=0, return_dict=True)
    assert min(found["image_to_text"], found["text_to_image"]) > 0.7
    assert model.evaluate(x, labels, classes=WORDS, return_dict=True)["accuracy"] > 0.7
    assert model.evaluate(x, labels[::-1], classes=WORDS) < 0.5
    both = [[word, f"{word}."] for word in WORDS]
    assert model.classify(x, both, batch_size=5).shape == (8,)
    assert model.log_scale.dtype == "float32"
    model.save(tmp_path / "clip.keras")
    again = keras.saving.load_model(tmp_path / "clip.keras")
    np.testing.assert_array_equal(again.embed_image(x), model.embed_image(x))
    np.testing.assert_array_equal(again.embed_text(WORDS), model.embed_text(WORDS))
    assert float(again.log_scale) == float(model.log_scale)
    again.fit({"image": x, "text": words}, batch_size=8, verbose=0)


@pytest.mark.once
def test_any_two_encoders():
    """Of vectors and of texts, with a space of its own; the encoder's own tokenizer."""
    text = TextEncoder(Bytes(6), 8, 1, 2, pooled=True, dropout=0.0)
    model = Contrastive(keras.layers.Dense(5), text, width=7)
    model.compile("sgd")
    x = images(4, (3,))
    history = model.fit({"image": x, "text": WORDS[:4]}, validation_data={"image": x, "text": WORDS[:4]}, verbose=0)
    assert {"loss", "image_to_text", "val_text_to_image"} <= set(history.history)
    assert model.embed_image(x).shape == model.embed_text(WORDS[:4]).shape == (4, 7)


@pytest.mark.once
def test_what_it_refuses():
    vision, text = CLIPVision(8, 4, 3, 16, 1, 2, 32, projection=12), CLIPText(257, 6, 16, 1, 2, 32)
    with pytest.raises(TypeError, match="`text` must be a Keras layer"):
        Contrastive(vision, "clip")
    with pytest.raises(ValueError, match="must not drop texts"):
        Contrastive(vision, TextEncoder(pooled=True))
    shapes = {"image": (None, 8, 8, 3), "text": (None, 6)}
    with pytest.raises(ValueError, match=r"one width unless `width` is given; received: {'image': 12, 'text': 16}"):
        Contrastive(vision, text).build(shapes)
    with pytest.raises(ValueError, match="`text` must return one vector"):
        Contrastive(vision, TextEncoder(Bytes(6), 8, 1, 2, dropout=0.0)).build(shapes)
    speechless = Contrastive(vision, text, width=4)
    speechless.compile("adam")
    with pytest.raises(ValueError, match="strings need a `tokenizer`"):
        speechless.fit({"image": images(2, (8, 8, 3)), "text": ["a", "b"]})
    with pytest.raises(ValueError, match="no weights yet"):
        clip().embed_text("red")
    model = built()
    model.compile("adam")
    with pytest.raises(ValueError, match=r"missing: \['text'\]"):
        model.evaluate({"image": images(2, (8, 8, 3))})
    with pytest.raises(ValueError, match=r"labels in 0\.\.7"):
        model.evaluate(pictures(2)[0], [0, 8], classes=WORDS)
