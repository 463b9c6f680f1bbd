"""Folders of tokenizers of transformers, for CLIP, T5 and BERT, in any of their forms.

    tokenizer.json             complete, as transformers writes it now
    vocab.json, merges.txt     the vocabulary of CLIP
    vocab.txt                  that of BERT, for text-to-image latent diffusion
    spiece.model               that of T5, of sentencepiece

The padding token and the maximum length are in tokenizer_config.json and special_tokens_map.json.
"""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdiff.encoders.tokenizers import BERT_END, BERT_START, CLIP_END, CLIP_START, JSONTokenizer, SentencePiece
from kdiff.interop.configs import LARGEST, explained, shown
from kdiff.interop.files import read_json, write_json
from kdiff.text import Tokenizer
from kdiff.writing import replacing

__all__ = ["BERT", "FORMS", "class_of", "load", "padded", "save"]

FORMS = ("tokenizer.json", "vocab.json", "spiece.model", "vocab.txt")
BERT = {
    "cls_token": BERT_START,
    "sep_token": BERT_END,
    "unk_token": "[UNK]",
    "mask_token": "[MASK]",
}
# The classes of transformers by the kind of model in tokenizer.json; the default is CLIP's.
_CLASSES = {"Unigram": "T5TokenizerFast", "WordPiece": "BertTokenizer"}


def load(folder: str | Path, length: int | None = None) -> Tokenizer:
    """The tokenizer in a folder of transformers.

    Args:
        folder: with one of `FORMS`; if there are several, the first is used, as in transformers.
        length: the number of tokens per row; None for the maximum of the folder.

    Raises:
        ImportError: if `tokenizers` or `sentencepiece`, the extra `text`, is missing.
        ValueError: if a file is missing or damaged, or the folder lacks required information.
    """
    folder = Path(folder)
    there = [name for name in FORMS if (folder / name).is_file()]
    if not there:
        found = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        raise ValueError(f"{folder}: no tokenizer; expected one of {list(FORMS)}; found: {found}")
    config = _config(folder)
    length = _length(folder, config) if length is None else length
    with explained(folder / there[0]):
        return _READERS[there[0]](folder, config, length)


def _config(folder: Path) -> dict[str, Any]:
    """The union of both files; the map gives special tokens that the other lacks."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            config |= read_json(folder / name)
    return config


def _length(folder: Path, config: Mapping[str, Any]) -> int:
    length = config.get("model_max_length")
    if not isinstance(length, int) or isinstance(length, bool) or not 0 < length <= LARGEST:
        raise ValueError(
            f"{folder}: tokenizer_config.json has no maximum length of a text (`model_max_length`: "
            f"{shown(length)}); give `length`, such as 77 for CLIP"
        )
    return length


def _word(folder: Path, config: Mapping[str, Any], name: str, default: str) -> tuple[str, bool]:
    """A special token, given as text or with options, and whether it is also matched after normalisation."""
    token = config.get(name, default)
    word = token.get("content") if isinstance(token, dict) else token
    if not isinstance(word, str) or not word:
        raise ValueError(f"{folder}: `{name}` must be a token; received: {shown(token)}")
    return word, isinstance(token, dict) and bool(token.get("normalized", False))


def _json(folder: Path, config: Mapping[str, Any], length: int) -> Tokenizer:
    path = folder / "tokenizer.json"
    content = read_json(path)
    word, _ = _word(folder, config, "pad_token", "")
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    if word not in added:
        raise ValueError(f"{path}: the padding token must be one of {sorted(added)}; received: {word!r}")
    return JSONTokenizer(path.read_text(encoding="utf-8"), length, added[word])


def _clip(folder: Path, config: Mapping[str, Any], length: int) -> Tokenizer:
    vocabulary = read_json(folder / "vocab.json")
    path = folder / "merges.txt"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; the vocabulary of CLIP is in vocab.json and merges.txt")
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if not line.startswith("#version")]
    merges = [tuple(line.split()) for line in lines if line.strip()]
    if not all(len(pair) == 2 for pair in merges) or not all(isinstance(n, int) for n in vocabulary.values()):
        raise ValueError(f"{folder}: vocab.json must have an id for each token, merges.txt two tokens in each line")
    defaults = {"bos_token": CLIP_START, "eos_token": CLIP_END, "unk_token": CLIP_END, "pad_token": CLIP_END}
    special = dict(_word(folder, config, name, default) for name, default in defaults.items())
    padding, _ = _word(folder, config, "pad_token", CLIP_END)
    return JSONTokenizer.clip(vocabulary, merges, length, padding, special)


def _sentencepiece(folder: Path, config: Mapping[str, Any], length: int) -> Tokenizer:
    extra = config.get("extra_ids", 100)
    return SentencePiece.read(folder / "spiece.model", length, extra)


def _bert(folder: Path, config: Mapping[str, Any], length: int) -> Tokenizer:
    words = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    lower, accents = config.get("do_lower_case", True), config.get("strip_accents")
    return JSONTokenizer.bert({word: number for number, word in enumerate(words)}, length, bool(lower), accents)


def padded(tokenizer: JSONTokenizer, padding: int) -> JSONTokenizer:
    """The tokenizer with another padding token, which, as in transformers, is then matched in texts.

    Args:
        tokenizer: its current padding token is no longer matched, unless it begins or ends a text.
        padding: the id of the new token.

    Raises:
        ValueError: if the vocabulary has no such id.
    """
    content = json.loads(tokenizer.model)
    around = {*tokenizer.start, *tokenizer.end}
    added = {token["id"]: token for token in content.get("added_tokens") or []}
    if tokenizer.padding not in around:
        added.pop(tokenizer.padding, None)
    if padding not in added:
        words = {number: word for word, number in content["model"]["vocab"].items()}
        if padding not in words:
            raise ValueError(f"padded: the id of one of {len(words)} tokens is expected; received: {padding}")
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added[padding] = {"id": padding, "content": words[padding], "special": True, **flags}
    content["added_tokens"] = [added[number] for number in sorted(added)]
    return JSONTokenizer(json.dumps(content, ensure_ascii=False), tokenizer.length, padding)


def class_of(tokenizer: Tokenizer) -> str:
    """The class of the tokenizer in transformers."""
    if isinstance(tokenizer, SentencePiece):
        return "T5Tokenizer"
    return _CLASSES.get(json.loads(tokenizer.model)["model"].get("type"), "CLIPTokenizer")


def save(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Writes a folder that transformers reads: tokenizer.json or spiece.model, and tokenizer_config.json.

    Args:
        tokenizer: a `JSONTokenizer`, of CLIP, T5 or BERT by the kind of its model, or a `SentencePiece`, of T5.
        folder: to write to; files of the same names are replaced.

    Raises:
        ValueError: if the tokenizer is of another class.
    """
    folder, config = Path(folder), {"model_max_length": tokenizer.length}
    if isinstance(tokenizer, JSONTokenizer):
        content = json.loads(tokenizer.model)
        numbers = {token["id"]: token["content"] for token in content.get("added_tokens") or []}
        if tokenizer.padding not in numbers:
            raise ValueError(f"save: the padding token must be one of {numbers}; received: {tokenizer.padding}")
        special = {"bos_token": CLIP_START, "eos_token": CLIP_END, "unk_token": CLIP_END}
        special = {
            "BertTokenizer": BERT,
            "T5TokenizerFast": {"eos_token": numbers.get(tokenizer.end[-1]), "unk_token": "<unk>"},
        }.get(class_of(tokenizer), special)
        config |= {**special, "pad_token": numbers[tokenizer.padding], "tokenizer_class": class_of(tokenizer)}
        write_json(folder / "tokenizer.json", content)
    elif isinstance(tokenizer, SentencePiece):
        config |= {"extra_ids": tokenizer.extra, "tokenizer_class": class_of(tokenizer)}
        with replacing(folder / "spiece.model") as new:
            new.write_bytes(base64.b64decode(tokenizer.model))
    else:
        raise ValueError(f"save: transformers does not support this tokenizer; received: {tokenizer!r}")
    write_json(folder / "tokenizer_config.json", config)


_READERS = {"tokenizer.json": _json, "vocab.json": _clip, "spiece.model": _sentencepiece, "vocab.txt": _bert}
