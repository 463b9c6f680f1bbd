import io

import keras
import numpy as np
import pytest

from kdiff.text import BytePair, Bytes, HubText, Tokenizer, is_text, strings

pytestmark = pytest.mark.eager

CAPTIONS = [
    f"a {size} {colour} {shape}" for size in ("big", "small") for colour in ("red", "blue") for shape in ("disc", "box")
]


def byte_pair(**options):
    pytest.importorskip("tokenizers", reason="the extra `text` is not installed")
    return BytePair.learn(CAPTIONS, **{"length": 6, **options})


# --- strings


@pytest.mark.parametrize(
    "texts",
    [
        ["é", "b"],
        ("é", b"b"),
        np.array(["é", "b"]),
        np.array(["é", "b"], dtype=object),
        np.array(["é".encode(), b"b"], dtype=object),
        np.array(["é".encode(), b"b"]),
    ],
)
def test_strings_in_every_form(texts):
    assert is_text(texts)
    assert strings(texts) == ["é", "b"]
    np.testing.assert_array_equal(Bytes(3)(texts), [[0xC3 + 1, 0xA9 + 1, 0], [ord("b") + 1, 0, 0]])


def test_one_string_is_one_row():
    assert strings("red") == strings(b"red") == strings(np.array("red")) == ["red"]
    assert Bytes(5)("red").shape == (1, 5)


@pytest.mark.parametrize("texts", [3, [1, 2], ["a", None], np.zeros(2), None])
def test_what_is_no_text(texts):
    with pytest.raises(TypeError, match="must be a string, or a list or an array of strings; received"):
        Bytes(3)(texts)


@pytest.mark.parametrize("value", [3, [1], [], np.zeros(2), np.zeros((0,), object), None, {"a": "b"}])
def test_numbers_are_no_text(value):
    assert not is_text(value)


# --- tokenizers


@pytest.mark.once
@pytest.mark.parametrize("make", [lambda: Bytes(24), lambda: byte_pair(length=16)])
def test_tokenizer(make):
    tokenizer = make()
    rows = tokenizer([*CAPTIONS, "", "Ünknown 🙂"])
    assert rows.dtype == np.int32
    assert rows.shape == (10, tokenizer.length)
    assert rows.min() == tokenizer.padding == 0
    assert rows.max() < tokenizer.vocabulary_size
    assert not rows[8].any()
    assert len(np.unique(rows, axis=0)) == 10
    np.testing.assert_array_equal(tokenizer(CAPTIONS[::-1]), rows[7::-1])  # now remembered
    assert tokenizer.clone() == tokenizer
    assert len(repr(tokenizer)) < 80


@pytest.mark.once
def test_byte_pairs_are_words():
    tokenizer = byte_pair()
    assert (tokenizer(CAPTIONS) > 0).sum(axis=1).tolist() == [4] * 8  # a token a word
    np.testing.assert_array_equal(tokenizer(["A  big RED disc\n"]), tokenizer(CAPTIONS[:1]))
    assert byte_pair() == BytePair.learn(iter(CAPTIONS[::-1]), length=6)
    assert byte_pair() != byte_pair(vocabulary_size=260)
    assert byte_pair(vocabulary_size=260).vocabulary_size == 260
    cased = byte_pair(lowercase=False)
    assert (cased("a RED box") != cased("a red box")).any()


@pytest.mark.parametrize(("text", "count"), [("a" * 9, 9), ("é" * 3, 6)])
def test_a_text_that_is_too_long_is_cut_and_said_so(text, count):
    with pytest.warns(
        UserWarning, match=rf"Bytes\(length=5\) has room for 5 tokens; '{text}' has {count} and is cut, as are 1 more"
    ):
        rows = Bytes(5)(["short", text, "longer"])
    np.testing.assert_array_equal(rows[1], Bytes(9)(text)[0, :5])


@pytest.mark.once
def test_tokenizer_errors():
    with pytest.raises(ValueError, match="`length` must be a whole number of at least 1; received: 0"):
        Bytes(0)
    with pytest.raises(ValueError, match=r"Known: .*'byte_pair', 'bytes'"):
        Tokenizer.get("words")
    with pytest.raises(ValueError, match="`vocabulary_size` must be a whole number of at least 257; received: 256"):
        byte_pair(vocabulary_size=256)
    with pytest.raises(ValueError, match=r"must be the JSON of a tokenizer: .*received: 'tokenizer\.json'"):
        BytePair("tokenizer.json")


# --- encoders of KerasHub


@pytest.fixture(scope="module")
def hub():
    return pytest.importorskip("keras_hub", reason="the extra `hub` is not installed").models


CLIP = ["<|startoftext|>", "<|endoftext|>", "r", "e", "d", "d</w>", "re", "red</w>", "a</w>"]


def clip(hub):
    tokenizer = hub.CLIPTokenizer(vocabulary={token: i for i, token in enumerate(CLIP)}, merges=["r e", "re d</w>"])
    return hub.CLIPTextEncoder(len(CLIP), 8, 8, 2, 2, 16, max_sequence_length=12), tokenizer


def t5(hub):
    sentencepiece, model = pytest.importorskip("sentencepiece"), io.BytesIO()
    pieces = {"pad_piece": "<pad>", "eos_piece": "</s>", "unk_piece": "<unk>"}
    ids = {"bos_id": -1, "pad_id": 0, "eos_id": 1, "unk_id": 2}
    options = {"vocab_size": 10, "model_type": "WORD", "minloglevel": 2, **pieces, **ids}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CAPTIONS), model_writer=model, **options)
    return hub.T5Backbone(10, 1, 2, 8, 16), hub.T5Tokenizer(proto=model.getvalue())


@pytest.mark.data
def test_hub_text_is_clips_encoder(hub):
    backbone, tokenizer = clip(hub)
    encoder = HubText(backbone, tokenizer, length=12, batch_size=3)
    ids = np.zeros((2, 12), "int32")
    ids[0, :4] = [0, CLIP.index("a</w>"), CLIP.index("red</w>"), 1]
    ids[1, 1] = 1  # "" begins and ends
    expected = keras.ops.convert_to_numpy(keras.ops.stop_gradient(backbone({"token_ids": ids})))
    found = encoder(["a red", "", "A Red", b"a red", np.str_("")])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected[[0, 1, 0, 0, 1]], rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match=r"room for 10 tokens; '(a ){11}' has 11 and is cut"):
        assert encoder("a " * 11).shape == (1, 12, 8)


@pytest.mark.data
def test_hub_text_is_t5s_encoder(hub):
    backbone, tokenizer = t5(hub)
    ids = np.array([[*tokenizer(["a red disc"])[0], 1, 0, 0]], "int32")  # no token begins a text
    mask = (ids > 0).astype("int32")
    inputs = {"encoder_token_ids": ids, "encoder_padding_mask": mask, "decoder_token_ids": ids}
    expected = backbone({**inputs, "decoder_padding_mask": mask})["encoder_sequence_output"]
    expected = keras.ops.convert_to_numpy(keras.ops.stop_gradient(expected))
    found = HubText(backbone, tokenizer, length=6)("a red disc")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.data
def test_hub_text_of_a_preset(hub, tmp_path):
    text, tokenizer = clip(hub)
    vision = hub.CLIPVisionEncoder(4, 8, 1, 2, 16, image_shape=(8, 8, 3))
    backbone = hub.CLIPBackbone(vision, text, projection_dim=8)
    backbone.save_to_preset(tmp_path / "clip")
    tokenizer.save_to_preset(tmp_path / "clip")
    encoder = HubText(str(tmp_path / "clip"), length=12).clone()
    np.testing.assert_allclose(encoder("a red"), HubText(text, tokenizer, length=12)("a red"), atol=1e-6)


@pytest.mark.data
def test_an_encoder_of_objects_is_not_saved(hub):
    encoder = HubText(*clip(hub), length=12).clone()
    assert encoder.backbone is None
    with pytest.raises(ValueError, match=r"there is no backbone.*pass embeddings instead of strings"):
        encoder("red")
    with pytest.raises(ValueError, match="needs a `tokenizer`"):
        HubText(clip(hub)[0])
