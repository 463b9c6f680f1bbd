"""Text through frozen encoders as a condition: what a model makes of it in training, in sampling, and on disk."""

import keras
import numpy as np
import pytest
from keras import ops

import kdiff
from kdiff.blocks import (
    AttentionPool,
    Chain,
    Dense,
    Joint,
    LayerNorm,
    MLPEmbedding,
    SinusoidalEmbedding,
    VectorAndTokens,
)
from kdiff.ema import EMA
from kdiff.encoders import CLIPText, CLIPVision, JointPrompt, Prompt, PromptVector, T5Text
from kdiff.networks import DiT
from kdiff.text import Bytes
from tests.toys import compiled_model, draw_weights, images, numpy

pytestmark = pytest.mark.eager

TEXTS = ["red", "", "box", "red"]
SMALL = {"width": 8, "depth": 1, "heads": 2, "hidden": 12}


def clip(length=5, **options):
    encoder = CLIPText(257, length, **{**SMALL, **options})
    encoder.build((None, length))
    return draw_weights(encoder)


def t5(**options):
    encoder = T5Text(257, **{**SMALL, "head_width": 4, **options})
    encoder.build((None, None))
    return draw_weights(encoder, seed=1)


def two(**options):
    """As Stable Diffusion XL has them: states before the last, without the last norm, and one vector."""
    plain = {"skip": 1, "normalized": False}
    return Prompt([clip(**plain), clip(width=6, projection=7, **plain)], [Bytes(5), Bytes(5)], **options)


def network(conditions):
    return DiT(8, 1, 4, kdiff.blocks.TransformerBlock(2), conditions=conditions)


def output(y):
    return numpy(ops.stop_gradient(y))


def test_rows_are_what_the_encoders_give():
    prompt = two(batch_size=2)
    rows = prompt.prepare(TEXTS)
    assert rows.dtype == np.float32
    assert rows.shape == (4, *prompt.row) == (4, 6, 14)
    first, second = (encoder(Bytes(5)(TEXTS)) for encoder in prompt.encoders)
    np.testing.assert_allclose(rows[:, :5, :8], output(first.tokens), atol=1e-5)
    np.testing.assert_allclose(rows[:, :5, 8:], output(second.tokens), atol=1e-5)
    np.testing.assert_allclose(rows[:, 5, :7], output(second.vector), atol=1e-5)
    assert not rows[:, 5, 7:].any()
    np.testing.assert_allclose(prompt.null, rows[1], atol=1e-6)
    assert not two(zeros=True).null.any()
    encoded = prompt(ops.convert_to_tensor(rows))
    np.testing.assert_array_equal(output(encoded.tokens), rows[:, :5])
    assert encoded.vector is encoded.mask is None
    np.testing.assert_array_equal(output(PromptVector(7)(ops.convert_to_tensor(rows))), rows[:, 5, :7])
    np.testing.assert_array_equal(prompt.prepare(rows), rows)


@pytest.mark.once
def test_a_mask_goes_with_the_text():
    prompt = Prompt(t5(), Bytes(6), masked=True)
    rows = prompt.prepare(TEXTS)
    ids, mask = Bytes(6).masked(TEXTS)
    np.testing.assert_allclose(rows[:, :, :8], output(prompt.encoders[0](ids, mask).tokens), atol=1e-5)
    encoded = prompt({"text": ops.convert_to_tensor(rows)})
    np.testing.assert_array_equal(numpy(encoded.mask), mask)
    assert np.isfinite(rows).all()


def test_what_fills_up_may_be_seen_and_texts_be_made_small_letters():
    prompt, small = (Prompt(t5(), Bytes(6), masked=True, padded=True, lower=lower) for lower in (False, True))
    rows = prompt.prepare(TEXTS)
    np.testing.assert_array_equal(rows, Prompt(t5(), Bytes(6), masked=True).prepare(TEXTS))
    assert prompt(ops.convert_to_tensor(rows)).mask is None
    np.testing.assert_array_equal(small.prepare([" RED ", "", "Box", "red"]), rows)
    assert np.abs(prompt.prepare([" RED "]) - rows[:1]).max() > 1e-3


def test_a_layer_makes_a_vector_and_tokens_of_the_text(tmp_path):
    """As DeepFloyd IF has it: pooled for the time, and through a dense layer. It is trained, the encoder is not."""
    layer = VectorAndTokens(Chain([LayerNorm(), AttentionPool(2), Dense(8)]), Dense(6))
    prompt = Prompt(t5(), Bytes(5), masked=True, layer=layer)
    model = model_of(prompt)
    draw_weights(model.network)
    prompt.changed()
    before = [np.array(numpy(w)) for w in prompt.encoders[0].weights]
    trainable = {id(w) for w in model.trainable_variables}
    assert all(id(w) in trainable for w in prompt.layer.weights)
    encoded = prompt(ops.convert_to_tensor(prompt.prepare(TEXTS)))
    assert (tuple(encoded.vector.shape), tuple(encoded.tokens.shape)) == ((4, 8), (4, 5, 6))
    assert encoded.mask is not None
    kernel = np.array(numpy(prompt.layer.tokens.kernel))
    model.fit({"image": images(4), "text": TEXTS}, batch_size=2, verbose=0)
    for old, new in zip(before, prompt.encoders[0].weights, strict=True):
        np.testing.assert_array_equal(old, numpy(new))
    assert np.abs(numpy(prompt.layer.tokens.kernel) - kernel).max() > 0
    y = model.sample(1, text="red", steps=1)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.sample(1, text="red", steps=1), y, atol=1e-5)
    again = prompt.through(None)
    assert again.encoders[0] is prompt.encoders[0]
    assert again.layer is None


def model_of(prompt, **options):
    model = compiled_model(network({"words": prompt}), **options)
    model.build({"image": (None, 8, 8, 1), "text": (None, *prompt.row)})
    return model


def test_trained_with_strings_and_sampled_against_the_empty_text(tmp_path):
    """The encoder is the same afterwards, has no averages, and is in the file, with its vocabulary."""
    prompt = Prompt(clip(), Bytes(5), dropout=0.5)
    model = model_of(prompt, ema=0.9)
    before = [numpy(weight) for weight in prompt.encoders[0].weights]
    for text in (prompt.prepare(TEXTS), np.array(TEXTS, object)):  # the empty text is made before a step is traced
        history = model.fit({"image": images(4), "text": text}, batch_size=2, verbose=0).history
        assert np.isfinite(history["loss"]).all()
    for weight, old in zip(prompt.encoders[0].weights, before, strict=True):
        np.testing.assert_array_equal(numpy(weight), old)
    own = {id(weight) for weight in prompt.encoders[0].weights}
    assert own.isdisjoint(id(weight) for weight in EMA.of(model.network))
    assert own.isdisjoint(id(weight) for weight in model.trainable_variables)
    options = {"steps": 2, "guidance": 7.5}
    y = model.sample(2, text=["red", "box"], **options)
    guidance = kdiff.guidance.ClassifierFree(7.5, negative={"text": ""})
    np.testing.assert_allclose(model.sample(2, text=["red", "box"], steps=2, guidance=guidance), y, atol=1e-5)
    other = kdiff.guidance.ClassifierFree(7.5, negative={"text": "box"})
    assert np.abs(model.sample(2, text=["red", "box"], steps=2, guidance=other) - y).max() > 1e-6
    rows = prompt.prepare(["red", "box"])
    np.testing.assert_allclose(model.sample(2, text=rows, **options), y, atol=1e-6)
    np.testing.assert_allclose(model.sample(2, text=None, **options), model.sample(2, text="", **options), atol=1e-5)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert len(loaded.trainable_variables) == len(model.trainable_variables)
    np.testing.assert_allclose(loaded.sample(2, text=["red", "box"], **options), y, rtol=1e-4, atol=1e-4)


@pytest.mark.once
def test_one_text_for_two_conditions():
    """The tokens to the context, the vector with numbers to the time, as in Stable Diffusion XL."""
    prompt = two()
    added = Joint(
        {"text": PromptVector(7), "time_ids": SinusoidalEmbedding(4)}, MLPEmbedding(keras.layers.Identity(), 8)
    )
    made = network({"context": prompt, "added": added})
    model = compiled_model(made)
    model.build({"image": (None, 8, 8, 1), "text": (None, *prompt.row), "time_ids": (None, 2)})
    draw_weights(model.network)
    assert made.condition_inputs["text"].part is prompt
    numbers = np.array([8.0, 4.0])
    y = model.sample(1, text="red", time_ids=numbers, steps=1, guidance=3.0)
    rows = prompt.prepare(["red"])
    changed = rows.copy()
    changed[:, 5, 0] += 1.0
    assert np.abs(model.sample(1, text=changed, time_ids=numbers, steps=1, guidance=3.0) - y).max() > 1e-4


@pytest.mark.once
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Prompt([clip()], []), ValueError, "received 1 encoders and 0 tokenizers"),
        (lambda: Prompt(clip(), Bytes(6)), ValueError, r"must have one length.*received: \[6, 5\]"),
        (lambda: Prompt([t5(), t5()], [Bytes(6), Bytes(5)]), ValueError, r"must have one length.*\[6, 5\]"),
        (lambda: Prompt(CLIPVision(4, 2, **SMALL), Bytes(5)), TypeError, "must be text encoders, CLIPText or T5Text"),
        (
            lambda: Prompt(CLIPText(256, 5, **SMALL), Bytes(5)),
            ValueError,
            "has 257 tokens, but its encoder, CLIPText, 256",
        ),
        (
            lambda: Prompt(clip(), Bytes(5)).check(np.zeros((1, 5, 7))),
            ValueError,
            r"rows \(5, 8\) as returned by `prepare`",
        ),
        (lambda: Prompt(clip(), Bytes(5)).check(np.full((1, 5, 8), np.nan)), ValueError, "must be finite"),
        (lambda: Prompt(CLIPText(257, 5, **SMALL), Bytes(5)).prepare("a"), ValueError, "encoders have no weights yet"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.once
def test_another_condition_with_the_same_encoders():
    """As a `Cascade` asks for, of a subclass too."""
    prompt = two(layer=Dense(3))
    assert prompt.through(None).layer is None
    assert prompt.through(Dense(4)).layer.units == 4
    joint = JointPrompt([clip(), t5(width=6)], [Bytes(5), Bytes(7)], 16, 7)
    other = joint.through(joint.layer)
    assert isinstance(other, JointPrompt)
    assert other.encoders == joint.encoders
    np.testing.assert_array_equal(other.prepare(TEXTS), joint.prepare(TEXTS))
