"""Tokenizers of CLIP and T5 with vocabularies of a few words; for others see test_encoders_tokenizers_reference.py."""

import base64
import io
import json
import pickle

import numpy as np
import pytest

from kdiff.encoders import JSONTokenizer, SentencePiece
from kdiff.interop import tokenizers as interop

pytest.importorskip("tokenizers", reason="the extra `text` is not installed")
sentencepiece = pytest.importorskip("sentencepiece", reason="the extra `text` is not installed")

pytestmark = pytest.mark.once
CAPTIONS = ["a red disc", "a blue box", "two red boxes", "a small disc"]
MERGES = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>")]
WORDS = ["!", *"abcdert", *(f"{letter}</w>" for letter in "!abcdert"), *("".join(pair) for pair in MERGES)]
WORDS = {word: i for i, word in enumerate([*WORDS, "<|startoftext|>", "<|endoftext|>"])}
START, END = len(WORDS) - 2, len(WORDS) - 1


def pieces(**options):
    """The bytes of a sentencepiece model."""
    model = io.BytesIO()
    ids = {"bos_id": -1, "pad_id": 0, "eos_id": 1, "unk_id": 2, "vocab_size": 20, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS), model_writer=model, **{**ids, "pad_piece": "<pad>", **options}
    )
    return model.getvalue()


def clip(**options):
    return JSONTokenizer.clip(WORDS, MERGES, **{"length": 8, **options})


def t5(length=12):
    return SentencePiece(base64.b64encode(pieces()).decode(), length)


def test_clip_begins_and_ends_and_fills_up():
    rows = clip()(["a RED  cat", "", "red!", "<|endoftext|> é"])
    red, cat, a = WORDS["red</w>"], WORDS["cat</w>"], WORDS["a</w>"]
    assert rows.tolist() == [
        [START, a, red, cat, END, END, END, END],
        [START, *[END] * 7],
        [START, red, WORDS["!</w>"], *[END] * 5],
        [START, END, END, END, *[END] * 4],  # of é there are two bytes, which this vocabulary does not have
    ]
    _, mask = clip().masked(["a red", ""])
    assert mask.sum(axis=1).tolist() == [4, 2]
    assert clip().vocabulary_size == len(WORDS)


def test_what_fills_up_is_a_token_of_its_own():
    """OpenCLIP's "!": in a text it is that token too, as in transformers."""
    assert clip(padding="!")(["red!"]).tolist() == [[START, WORDS["red</w>"], 0, END, 0, 0, 0, 0]]
    assert clip(padding="!").padding == 0


def test_special_tokens_in_other_letters():
    """Where the file says that they are looked for after the letters are made small."""
    a, text = WORDS["a</w>"], "a <|EndOfText|> a"
    assert clip(special={"<|endoftext|>": True}).tokens(text) == [a, END, a]
    assert len(clip().tokens(text)) > 3


def test_t5_ends_and_fills_up():
    tokenizer = t5()
    rows, mask = tokenizer.masked(["a red disc", "", "red </s> disc <extra_id_0>"])
    assert rows[0].tolist() == [*tokenizer._pieces.encode("a red disc"), 1, *[0] * (12 - mask[0].sum())]
    assert rows[1].tolist() == [1] + [0] * 11
    assert rows[2].tolist()[: mask[2].sum()] == [
        *tokenizer._pieces.encode("red"),
        1,
        *tokenizer._pieces.encode("disc"),
        20 + 99,
        1,
    ]
    assert tokenizer.vocabulary_size == 120


@pytest.mark.parametrize("make", [lambda: clip(length=5), lambda: t5(5)])
def test_a_text_that_is_too_long_keeps_its_end(make):
    tokenizer = make()
    with pytest.warns(UserWarning, match=r"has room for [34] tokens; '(red ){9}' has \d+ and is cut"):
        rows = tokenizer(["red " * 9])
    assert rows.shape == (1, 5)
    assert rows[0, -1] == tokenizer.end[0]
    assert tokenizer.tokens("red " * 9)[:3] == rows[0, len(tokenizer.start) :][:3].tolist()


@pytest.mark.parametrize("make", [clip, t5])
def test_a_vocabulary_is_a_part_of_the_configuration(make):
    tokenizer = make()
    again = type(tokenizer).from_config(json.loads(json.dumps(tokenizer.get_config())))
    assert again == tokenizer == pickle.loads(pickle.dumps(tokenizer))
    np.testing.assert_array_equal(again(CAPTIONS[:1]), tokenizer(CAPTIONS[:1]))
    assert len(repr(tokenizer)) < 90


# --- folders


def clip_folder(folder, **config):
    (folder / "vocab.json").write_text(json.dumps(WORDS), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, MERGES), ""]), encoding="utf-8")
    write(folder, "tokenizer_config.json", {"model_max_length": 8, **config})
    return folder


def write(folder, name, content):
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def test_three_forms(tmp_path):
    assert interop.load(clip_folder(tmp_path)) == clip()
    assert interop.load(tmp_path, length=5) == clip(length=5)
    write(tmp_path, "special_tokens_map.json", {"pad_token": {"content": "!", "normalized": False}})
    assert interop.load(tmp_path).padding == 0
    (tmp_path / "tokenizer.json").write_text(clip(padding="!").model, encoding="utf-8")
    assert interop.load(tmp_path) == clip(padding="!")
    folder = tmp_path / "t5"
    folder.mkdir()
    (folder / "spiece.model").write_bytes(pieces())
    write(folder, "tokenizer_config.json", {"model_max_length": 16, "extra_ids": 100})
    np.testing.assert_array_equal(interop.load(folder)(CAPTIONS), t5(16)(CAPTIONS))


BROKEN = {
    "empty": (lambda folder: (folder / "vocab.json").unlink(), "no tokenizer; expected one of"),
    "no_merges": (lambda folder: (folder / "merges.txt").unlink(), r"merges\.txt: no such file"),
    "merges": (lambda folder: (folder / "merges.txt").write_text("r e d"), r"merges\.txt two tokens in each line"),
    "vocabulary": (lambda folder: write(folder, "vocab.json", {"a": 0}), r"must be in the vocabulary of CLIP"),
    "not_json": (lambda folder: (folder / "vocab.json").write_text("{"), r"vocab\.json: not a JSON file"),
    "padding": (lambda folder: clip_folder(folder, pad_token="?"), r"'\?' must be in the vocabulary of CLIP"),
    "padding_list": (lambda folder: clip_folder(folder, pad_token=["?"]), r"`pad_token` must be a token; received"),
    "length": (lambda folder: clip_folder(folder, model_max_length=int(1e30)), "give `length`, such as 77"),
    "json": (lambda folder: write(folder, "tokenizer.json", {}), r"`pad_token` must be a token"),
    "pieces": (
        lambda folder: spoiled(folder),
        r"spiece\.model: SentencePiece: `model` must be a model of sentencepiece",
    ),
}


def spoiled(folder):
    (folder / "vocab.json").unlink()
    (folder / "spiece.model").write_bytes(b"no model")


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders(name, tmp_path):
    spoil, message = BROKEN[name]
    spoil(clip_folder(tmp_path))
    with pytest.raises(ValueError, match=message):
        interop.load(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JSONTokenizer("tokenizer.json"), r"must be the JSON of a tokenizer: .*received: 'tokenizer\.json'"),
        (lambda: clip(length=2), "`length` must be a whole number of at least 3; received: 2"),
        (lambda: SentencePiece("?"), "must be a model of sentencepiece in base64: .*received"),
        (lambda: SentencePiece(base64.b64encode(pieces(pad_id=-1)).decode()), "and a padding token"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
