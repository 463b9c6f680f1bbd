"""Textual inversion, and LoRA of text encoders: what learns inside of a frozen encoder, is averaged, saved and kept."""

import keras
import numpy as np
import pytest

import kdiff
from kdiff import inversion, lora
from kdiff.blocks import Joint, MLPEmbedding, SinusoidalEmbedding
from kdiff.encoders import CLIPText, JSONTokenizer, Prompt, PromptVector
from kdiff.interop import inversions
from kdiff.networks import DiT
from kdiff.text import Bytes
from tests.toys import compiled_model, draw_weights, images, numpy

pytestmark = pytest.mark.eager

pytest.importorskip("tokenizers", reason="the extra `text` is not installed")

WORDS = ["!", *"abct", *(f"{letter}</w>" for letter in "!abct"), "<|startoftext|>", "<|endoftext|>"]
WORDS = {word: i for i, word in enumerate(WORDS)}
LENGTH = 6
JIT = False if keras.backend.backend() == "torch" else "auto"
TEXTS = ["a toy", "<toy>", "b <toy> a", ""]


def words():
    return JSONTokenizer.clip(WORDS, [], LENGTH)


def clip(seed=0, **options):
    encoder = CLIPText(
        len(WORDS),
        LENGTH,
        **{"width": 8, "depth": 1, "heads": 2, "hidden": 12, "end": WORDS["<|endoftext|>"], **options},
    )
    encoder.build((None, LENGTH))
    return draw_weights(encoder, seed)


def prompt_of(**options):
    """As Stable Diffusion XL's: two encoders, of which the second gives a vector, too."""
    return Prompt([clip(), clip(1, width=6, projection=5, name="second")], [words(), words()], **options)


def model_of(prompt=None, ema=0.9, optimizer=None, **options):
    prompt = prompt_of() if prompt is None else prompt
    added = Joint(
        {"text": PromptVector(5), "numbers": SinusoidalEmbedding(4)}, MLPEmbedding(keras.layers.Identity(), 8)
    )
    conditions = {"words": prompt, **({"added": added} if prompt.vector else {})}
    network = DiT(8, 1, 4, kdiff.blocks.TransformerBlock(2), conditions=conditions, **options)
    model = compiled_model(network, optimizer or keras.optimizers.AdamW(1e-2, weight_decay=0.1), jit=JIT, ema=ema)
    sizes = {"numbers": (None, 1)} if prompt.vector else {}
    model.build({"image": (None, 8, 8, 1), "text": (None, *prompt.row), **sizes})
    draw_weights(network)
    model.reset_ema()
    prompt.changed()
    return model, prompt


def data(texts, prompt):
    sizes = {"numbers": np.ones((len(texts), 1), "float32")} if prompt.vector else {}
    return {"image": images(len(texts)), "text": texts, **sizes}


def weights_of(layer):
    return {id(weight): numpy(weight).copy() for weight in layer.weights}


def sampled(model, text, **options):
    sizes = {"numbers": [1.0]} if "numbers" in model.shapes else {}
    return model.sample(1, text=text, steps=2, guidance=3.0, **sizes, **options)


@pytest.mark.once
def test_a_new_token_is_the_word_that_it_is_like_and_all_other_text_stays():
    model, prompt = model_of()
    before, plain = prompt.prepare(["a b", "c"]), sampled(model, "a b")
    inversion.add(model, "<toy>", initializer_token="c")
    np.testing.assert_allclose(prompt.prepare(["a b", "c"]), before, atol=1e-6)
    np.testing.assert_allclose(sampled(model, "a b"), plain, atol=1e-5)
    np.testing.assert_allclose(prompt.prepare("b <toy> a"), prompt.prepare("b c a"), atol=1e-6)
    number = len(WORDS)
    assert prompt.tokenizers[0].tokens("a<toy>") == [WORDS["a</w>"], number]
    assert [encoder.vocabulary_size for encoder in prompt.encoders] == [number + 1] * 2
    inversion.add(model, "<two>", initializer_token="c", vectors=3)
    assert prompt.tokenizers[1].tokens("<two> a") == [number + 1, number + 2, number + 3, WORDS["a</w>"]]
    np.testing.assert_allclose(prompt.prepare("<two>"), prompt.prepare("c c c"), atol=1e-6)


@pytest.mark.parametrize("vectors", [2, 1])
def test_only_the_vectors_of_the_token_move(vectors, tmp_path):
    """By an optimizer with moments and decay; and what is saved, loaded, kept and written to a file is the same."""
    model, prompt = model_of()
    inversion.add(model, "<toy>", initializer_token="b", vectors=vectors)
    before = weights_of(model.network)
    inversion.enable(model, "<toy>")
    rows = [encoder.table.rows for encoder in prompt.encoders]
    assert {id(weight) for weight in model.trainable_variables} == {id(weight) for weight in rows}
    assert len(model.ema_weights.values) == 2
    starts = [numpy(one).copy() for one in rows]
    assert np.isfinite(model.fit(data(TEXTS, prompt), epochs=3, batch_size=2, verbose=0).history["loss"]).all()
    assert all(np.abs(numpy(one) - start).max() > 1e-3 for one, start in zip(rows, starts, strict=True))
    for weight in model.network.weights:
        if id(weight) in before:
            np.testing.assert_array_equal(numpy(weight), before[id(weight)], err_msg=weight.path)
    y = sampled(model, "b <toy>")
    inversions.save(model, "<toy>", tmp_path)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert len(again.trainable_variables) == 2
    np.testing.assert_allclose(sampled(again, "b <toy>"), y, atol=1e-5)
    for one in (model, again):
        one.fit(data(TEXTS, prompt), batch_size=4, verbose=0, shuffle=False)
    np.testing.assert_allclose(numpy(again.trainable_variables[0]), numpy(model.trainable_variables[0]), atol=1e-5)
    inversion.finish(again)
    averages = [numpy(one) for one in model.ema_weights.values]
    for encoder, average in zip(inversion.prompt_of(again, "").encoders, averages, strict=True):
        np.testing.assert_allclose(numpy(encoder.table.table)[-vectors:], average, atol=1e-5)
        assert not encoder.trainable_variables
    np.testing.assert_allclose(sampled(again, "b <toy>"), sampled(model, "b <toy>"), atol=1e-4)
    assert len(again.trainable_variables) == len(model_of()[0].trainable_variables)
    other, theirs = model_of()
    inversions.load(other, tmp_path, "<mine>")
    assert theirs.tokenizers[0].numbers_of("<mine>") == [len(WORDS) + i for i in range(vectors)]
    np.testing.assert_allclose(sampled(other, "b <mine>"), y, atol=1e-4)


@pytest.mark.once
def test_lora_of_the_encoders(tmp_path):
    """A and B of them alone learn, with those of the network; merged, the text is made before the first step again."""
    model, prompt = model_of()
    texts = ["a b", "c", "b a", ""]
    plain = sampled(model, "a b")
    before = weights_of(model.network)
    assert not any("clip_text" in path for path in lora.find(model))
    paths = lora.enable(model, 2, text=True)
    assert sum("clip_text" in path or "second" in path for path in paths) == 8
    np.testing.assert_allclose(sampled(model, "a b"), plain, atol=1e-5)
    model.compile(keras.optimizers.Adam(3e-2), jit_compile=JIT)
    model.fit(data(texts, prompt), epochs=3, batch_size=2, verbose=0)
    for weight in model.network.weights:
        if id(weight) in before:
            np.testing.assert_array_equal(numpy(weight), before[id(weight)], err_msg=weight.path)
    inside = [layer for layer in lora.enabled(model) if "clip_text" in layer.path or "second" in layer.path]
    assert len(inside) == 8
    assert all(np.abs(numpy(layer.lora_kernel_b)).max() > 1e-4 for layer in inside)
    y = sampled(model, "a b")
    assert np.abs(y - plain).max() > 1e-4
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert len(again.trainable_variables) == len(model.trainable_variables)
    np.testing.assert_allclose(sampled(again, "a b"), y, atol=1e-4)
    lora.merge(again)
    assert not inversion.prompt_of(again, "").inside
    np.testing.assert_allclose(sampled(again, "a b"), y, atol=1e-4)
    lora.remove(model)
    np.testing.assert_allclose(sampled(model, "a b"), plain, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_called_inside_the_encoders_give_what_they_give_before(masked):
    """Of the empty text and of zeros, too, which stand for no condition."""
    for zeros in (False, True):
        prompt = prompt_of(masked=masked, zeros=zeros)
        rows, null = prompt.prepare(TEXTS), prompt.null
        prompt.inside, prompt._empty = True, None
        tokens = np.concatenate([prompt.prepare(TEXTS), prompt.null[None]])
        assert tokens.dtype == np.int32
        assert tokens.shape[1:] == prompt.row == (4 if masked else 2, LENGTH)
        found = numpy(prompt.unfolded({"text": tokens})["text"])
        np.testing.assert_allclose(found, [*rows, null], atol=1e-5)


@pytest.mark.once
def test_called_inside_the_encoders_run_once_in_a_sampling_run(monkeypatch):
    """For the texts and for no text; the vector of the same texts is taken from what they gave."""
    model, prompt = model_of(ema=None)
    given = {"text": TEXTS[:2], "numbers": np.ones((2, 1), "float32"), "guidance": 2.0, "steps": 3}
    before = model.sample(2, **given)
    prompt.inside, prompt._empty = True, None
    model._take_rows_anew()
    runs, rows_of = [], prompt._rows_of
    monkeypatch.setattr(prompt, "_rows_of", lambda *rest: (runs.append(len(rest[0][0])), rows_of(*rest))[1])
    samples = model.sample(2, **given)
    assert runs == [2, 2]  # where they are compiled, these are the traces
    np.testing.assert_allclose(samples, before, atol=1e-5)


@pytest.mark.once
def test_lost_in_training_texts_are_the_empty_one():
    """The encoders see its tokens, so that it is of their weights as they are."""
    prompt = prompt_of(dropout=0.5, seed=3)
    prompt.inside = True
    tokens = np.repeat(prompt.prepare(["a b"]), 64, 0)
    wanted = numpy(prompt.unfolded({"text": np.stack([tokens[0], prompt.null])})["text"])
    found = numpy(prompt.unfolded({"text": tokens}, training=True)["text"])
    lost = np.array([np.allclose(row, wanted[1], atol=1e-5) for row in found])
    kept = np.array([np.allclose(row, wanted[0], atol=1e-5) for row in found])
    assert (lost ^ kept).all()
    assert 16 < lost.sum() < 48


@pytest.mark.once
def test_in_mixed_precision():
    """Network and encoders compute in bfloat16; what learns is float32, and moves."""
    encoder = clip(dtype="mixed_bfloat16")
    model, prompt = model_of(Prompt(encoder, words()), dtype="mixed_bfloat16")
    inversion.add(model, "<toy>", initializer_token="b")
    inversion.enable(model, "<toy>")
    lora.enable(model, 2, text=True)
    assert len(model.trainable_variables) == 1 + 2 * len(lora.enabled(model))
    before = [numpy(weight).copy() for weight in model.trainable_variables]
    model.compile(keras.optimizers.Adam(3e-2), jit_compile=JIT)
    model.fit(data(TEXTS, prompt), epochs=2, batch_size=2, verbose=0)
    for weight, old in zip(model.trainable_variables, before, strict=True):
        assert weight.dtype == "float32"
        assert np.abs(numpy(weight) - old).max() > 0, weight.path
    y = sampled(model, "b <toy>")
    lora.merge(model)
    inversion.finish(model)
    assert np.abs(sampled(model, "b <toy>") - y).max() < 0.05 * np.abs(y).max()


@pytest.mark.once
def test_errors(tmp_path):
    model, _ = model_of()
    with pytest.raises(ValueError, match=r"must have a `kdiff\.encoders\.Prompt`"):
        inversion.add(compiled_model(), "<toy>", "a")
    bytes_alone = Prompt(CLIPText(300, LENGTH, 8, 1, 2, 12), Bytes(LENGTH))
    with pytest.raises(ValueError, match=r"CLIPText with a JSONTokenizer.*Bytes"):
        inversion.add(model_of(bytes_alone)[0], "<toy>", "a")
    with pytest.raises(ValueError, match=r"have one token, or 3; 'a b' has 2"):
        inversion.add(model, "<toy>", "a b", 3)
    with pytest.raises(ValueError, match="`vectors` must be"):
        inversion.add(model, "<toy>", "a", 0)
    with pytest.raises(ValueError, match="no encoder has the token '<toy>'"):
        inversion.enable(model, "<toy>")
    inversion.add(model, "<toy>", "a")
    with pytest.raises(ValueError, match=r"that is not in the vocabulary.*'<toy>', which is known as"):
        inversion.add(model, "<toy>", "a")
    inversion.enable(model, "<toy>")
    for function in (lambda: inversion.enable(model, "<toy>"), lambda: inversion.add(model, "<b>", "a")):
        with pytest.raises(ValueError, match="finish"):
            function()
    with pytest.raises(ValueError, match="its encoders are trained, so texts must be strings or tokens"):
        sampled(model, np.zeros((2, LENGTH), "float32"))


@pytest.mark.once
def test_averages_become_the_weights_before_others_are_averaged():
    """Of the whole network when a token is added, and of a LoRA when the training of a token ends, or the reverse."""

    def moved(model):
        for average in model.ema_weights.values:
            average.assign(0.7 * numpy(average))
        model.ema_weights.updates.assign(1)
        return sampled(model, "a b")

    model, _ = model_of()
    wanted = moved(model)
    inversion.add(model, "<toy>", initializer_token="b")
    np.testing.assert_allclose(sampled(model, "a b"), wanted, atol=1e-5)
    wanted = moved(model)
    inversion.enable(model, "<toy>")
    np.testing.assert_allclose(sampled(model, "a b"), wanted, atol=1e-5)
    for first, second in ((inversion.finish, lora.merge), (lora.merge, inversion.finish)):
        if not any(encoder.learned for encoder in inversion.prompt_of(model, "").encoders):
            inversion.enable(model, "<toy>")
        lora.enable(model, 2, text=True)
        for layer in lora.enabled(model):
            layer.lora_kernel_b.assign(0.3 * np.ones(layer.lora_kernel_b.shape))
        model.reset_ema()
        moved(model)
        wanted = sampled(model, "a <toy>")
        first(model)
        np.testing.assert_allclose(sampled(model, "a <toy>"), wanted, atol=1e-4)
        second(model)
        np.testing.assert_allclose(sampled(model, "a <toy>"), wanted, atol=1e-4)
