"""Tokens of transformers' CLIP and T5, with the real vocabulary of CLIP, on all captions that there are here."""

import gzip
import io
import json
import lzma
import os
import warnings
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from kdiff.interop import tokenizers as interop

pytestmark = [pytest.mark.reference, pytest.mark.once]
transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")
DATA = Path(__file__).parents[1] / "../shared/data"
WORDS = DATA / "clip/bpe_simple_vocab_16e6.txt.gz"
ODD = [
    *(
        "",
        " ",
        "  two  spaces ",
        "\ttab\nnewline",
        "Ünïcödé ﬁne ½ ① ＡＢＣ",
        "日本語 テキスト",
        "🙂🏽 emoji",
        "é e\u0301",
    ),
    *("\u200b zero", "naïve… “quotes” —", "▁under", "a\u00a0b", "\x00ctl\x07", "ﷺ", "İstanbul ß ẞ", "it's they'LL"),
    *("1234 5", "!", "a cat! wow!!", "a" * 300, "word " * 600, "a</s>b", "</s>", " </s> ", "a </s>  b", "<pad> <unk>"),
    *("x <extra_id_0> y <extra_id_99>", "a<|endoftext|>b", "A <|EndOfText|> b", "<|startoftext|><|endoftext|>"),
]


@pytest.fixture(scope="module")
def texts():
    """All captions of the folder of data, where there is one, and odd texts."""
    if not DATA.is_dir():
        return [*ODD, *(f"a {size} {what}" for size in ("big", "small") for what in ("disc", "box", "cat"))]
    files = [DATA / "emoji/noto64_base.jsonl", DATA / "crawl_tiles/tiles.jsonl"]
    rows = [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]
    captions = {row["caption"] for row in rows if "caption" in row}
    captions |= {" ".join(row.get("keywords", ())) for row in rows} | {
        w for row in rows for w in row.get("keywords", ())
    }
    for split in ("train", "test"):
        names = lzma.decompress((DATA / f"cifar10/{split}_filenames.txt.xz").read_bytes()).decode().split()
        captions |= {name.rsplit("_s_", 1)[0].replace("_", " ") for name in names}
    return [*ODD, *sorted(captions)]


def check(theirs, folder, texts):
    """The numbers, the masks, and what fills up."""
    assert interop.load(folder).length == theirs.model_max_length
    wanted = theirs(texts, padding="max_length", max_length=77, truncation=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of texts that are cut
        rows, mask = interop.load(folder, 77).masked(texts)
    np.testing.assert_array_equal(rows, wanted.input_ids)
    np.testing.assert_array_equal(mask, wanted.attention_mask)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """vocab.json and merges.txt, as OpenAI's file of merges gives them."""
    if not WORDS.is_file():
        pytest.skip(f"the vocabulary of CLIP is not in {WORDS}")
    merges = gzip.decompress(WORDS.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [chr(256 + i) for i in range(256 - len(printed))]
    letters = [*map(chr, printed), *others]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(pair.replace(" ", "") for pair in merges)]
    folder = tmp_path_factory.mktemp("clip")
    numbers = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(numbers), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return folder


def word(content):
    options = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"__type": "AddedToken", "content": content, **options}


@pytest.mark.parametrize("padding", ["<|endoftext|>", "!"])
def test_clip(padding, clip, texts, tmp_path):
    """As Stable Diffusion 1 and 2 have it; and as transformers 5 writes it."""
    special = {"bos_token": word("<|startoftext|>"), "eos_token": word("<|endoftext|>"), "pad_token": padding}
    config = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", **special, "unk_token": word("<|endoftext|>")}
    (clip / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.CLIPTokenizer.from_pretrained(clip)
    check(theirs, clip, texts)
    assert interop.load(clip)("a photo of a cat")[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    theirs.save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    check(theirs, tmp_path, texts[:2000])


def test_t5(texts, tmp_path):
    """The vocabulary is learned here, since the real one is not: the rules are T5's."""
    model = io.BytesIO()
    ids = {"bos_id": -1, "pad_id": 0, "eos_id": 1, "unk_id": 2, "pad_piece": "<pad>", "minloglevel": 2}
    captions = [text for text in texts if text.isascii() and text.isprintable() and "<" not in text]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions), model_writer=model, vocab_size=150, hard_vocab_limit=False, **ids
    )
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "spiece.model").write_bytes(model.getvalue())
    extra = [f"<extra_id_{i}>" for i in range(100)]
    config = {"model_max_length": 512, "extra_ids": 100, "additional_special_tokens": extra}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "T5Tokenizer"}))
    theirs = transformers.T5Tokenizer.from_pretrained(folder)
    check(theirs, folder, texts)
    theirs.save_pretrained(tmp_path / "again")
    check(theirs, tmp_path / "again", texts[:2000])
