"""Tokenizers of pretrained encoders: the vocabularies of CLIP, T5 and BERT, in their original forms.

    JSONTokenizer      the JSON of a `tokenizers.Tokenizer`, as in transformers; CLIP and BERT from vocabularies
    SentencePiece      the file of a sentencepiece model, as for T5

An added token that is followed in the vocabulary by its name with "_1", "_2" and so on expands to all of these, as in
diffusers for textual inversions of several vectors.

Token ids are those of the vocabulary, and each text includes its begin and end tokens. A vocabulary is part of the
configuration, and so of a saved model. The packages `tokenizers` and `sentencepiece` are needed (the extra `text`).
"""

import base64
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

from kdiff.base import check_integer, needs
from kdiff.text import Tokenizer

__all__ = ["BERT_END", "BERT_START", "CLIP_END", "CLIP_START", "CLIP_WORDS", "JSONTokenizer", "SentencePiece"]

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
BERT_START, BERT_END = "[CLS]", "[SEP]"
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class JSONTokenizer(Tokenizer):
    """The tokenizer described by the JSON of a `tokenizers.Tokenizer`, with its begin and end tokens.

    Args:
        model: the JSON, as from `tokenizers.Tokenizer.to_str` or a file tokenizer.json.
        length: the number of tokens per row.
        padding: the id of the padding token.

    Raises:
        ImportError: if `tokenizers` is missing.
        ValueError: if `model` is not such a JSON, or `length` leaves no room between begin and end tokens.
    """

    def __init__(self, model: str, length: int = 77, padding: int = 0):
        super().__init__(length)
        with needs("text", "JSONTokenizer needs tokenizers"):
            import tokenizers
        try:
            self._encoder = tokenizers.Tokenizer.from_str(model)
        except Exception as error:  # `tokenizers` raises no more specific type
            raise ValueError(
                f"JSONTokenizer: `model` must be the JSON of a tokenizer: {error}; received: {model!r:.60}"
            ) from None
        self._encoder.no_padding()
        self._encoder.no_truncation()
        self.model = model
        self._several = self._of_several()
        check_integer("JSONTokenizer", "padding", padding, 0)
        self.padding = padding
        self.start, self.end = self._around()
        check_integer("JSONTokenizer", "length", length, len(self.start) + len(self.end) + 1)

    def _of_several(self) -> dict[int, list[int]]:
        """The ids of all tokens to which an added token expands, by its id, if there are several."""
        added = {token.content: number for number, token in self._encoder.get_added_tokens_decoder().items()}
        found: dict[int, list[int]] = {}
        for word, number in added.items():
            names = itertools.takewhile(added.__contains__, (f"{word}_{i}" for i in itertools.count(1)))
            more = [added[name] for name in names]
            if more:
                found[number] = [number, *more]
        return found

    def with_token(self, token: str, count: int = 1) -> tuple[Self, list[int]]:
        """This tokenizer with a new token, and its id; or with `count` tokens, to which the first expands.

        Raises:
            ValueError: if the vocabulary already has one of these.
        """
        names = [token, *(f"{token}_{i}" for i in range(1, count))]
        with needs("text", "JSONTokenizer needs tokenizers"):
            import tokenizers
        encoder = tokenizers.Tokenizer.from_str(self.model)
        known = [name for name in (*names, f"{token}_{count}") if encoder.token_to_id(name) is not None]
        if known or not token.strip():
            raise ValueError(
                f"JSONTokenizer: a new token must be a word that is not in the vocabulary; received: {token!r}"
                + (f", which is known as {known}" if known else "")
            )
        encoder.add_tokens([tokenizers.AddedToken(name, normalized=True) for name in names])
        numbers = [encoder.token_to_id(name) for name in names]
        return type(self)(encoder.to_str(), self.length, self.padding), numbers

    def numbers_of(self, token: str) -> list[int] | None:
        """The id of an added token, or of all tokens to which it expands; None if there is none."""
        number = self._encoder.token_to_id(token)
        if number is None or number not in self._encoder.get_added_tokens_decoder():
            return None
        return self._several.get(number, [number])

    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The begin and end tokens of the JSON, found around a single letter."""
        inside, whole = self.tokens("a"), self._encoder.encode("a").ids
        for at in range(len(whole) - len(inside) + 1):
            if whole[at : at + len(inside)] == inside:
                return tuple(whole[:at]), tuple(whole[at + len(inside) :])
        raise ValueError("JSONTokenizer: the JSON changes the tokens of a text when it adds begin and end tokens")

    @classmethod
    def clip(
        cls,
        vocabulary: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        length: int = 77,
        padding: str = CLIP_END,
        special: Mapping[str, bool] | None = None,
    ) -> Self:
        """The tokenizer of CLIP: byte pair encoding of lower-case words (Radford et al. 2021, section 2.4).

        Args:
            vocabulary: the id of each token, as in vocab.json.
            merges: pairs of tokens to merge, in order of priority, as in merges.txt.
            length: the number of tokens per row.
            padding: the padding token: the end token, or "!" in OpenCLIP.
            special: tokens that are matched in a text, and whether also after normalisation (`<|EndOfText|>`); None for
                the start, end and padding tokens, matched exactly.

        Raises:
            ValueError: if one of these tokens is not in the vocabulary.
        """
        special = dict.fromkeys((CLIP_START, CLIP_END, padding), False) if special is None else dict(special)
        for token in (CLIP_START, CLIP_END, padding, *special):
            if token not in vocabulary:
                raise ValueError(f"JSONTokenizer: {token!r} must be in the vocabulary of CLIP, but is missing")
        with needs("text", "JSONTokenizer needs tokenizers"):
            import tokenizers
        normalizers, before = tokenizers.normalizers, tokenizers.pre_tokenizers
        options = {"end_of_word_suffix": "</w>", "unk_token": CLIP_END}
        encoder = tokenizers.Tokenizer(tokenizers.models.BPE(dict(vocabulary), list(merges), **options))
        space = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
        encoder.normalizer = normalizers.Sequence([normalizers.NFC(), space, normalizers.Lowercase()])
        words = before.Split(tokenizers.Regex(CLIP_WORDS), "removed", invert=True)
        encoder.pre_tokenizer = before.Sequence([words, before.ByteLevel(add_prefix_space=False)])
        around = [(token, vocabulary[token]) for token in (CLIP_END, CLIP_START)]
        encoder.post_processor = tokenizers.processors.RobertaProcessing(*around, False, False)
        added = [tokenizers.AddedToken(token, special=True, normalized=any_case) for token, any_case in special.items()]
        encoder.add_special_tokens(added)
        return cls(encoder.to_str(), length, vocabulary[padding])

    @classmethod
    def bert(
        cls, vocabulary: Mapping[str, int], length: int = 77, lower: bool = True, accents: bool | None = None
    ) -> Self:
        """The tokenizer of BERT: the longest pieces of each word (Devlin et al. 2018, arXiv:1810.04805, section 3).

        Args:
            vocabulary: the id of each piece, the line number in vocab.txt; pieces within a word begin with "##".
            length: the number of tokens per row, padded with "[PAD]".
            lower: whether texts are lower-cased.
            accents: whether accents are removed; None for the value of `lower`.

        Raises:
            ValueError: if "[CLS]", "[SEP]", "[PAD]" or "[UNK]" is not in the vocabulary.
        """
        for token in (BERT_START, BERT_END, "[PAD]", "[UNK]"):
            if token not in vocabulary:
                raise ValueError(f"JSONTokenizer: {token!r} must be in the vocabulary of BERT, but is missing")
        with needs("text", "JSONTokenizer needs tokenizers"):
            import tokenizers
        encoder = tokenizers.Tokenizer(tokenizers.models.WordPiece(dict(vocabulary), unk_token="[UNK]"))
        encoder.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lower, strip_accents=accents)
        encoder.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        around = [(token, vocabulary[token]) for token in (BERT_END, BERT_START)]
        encoder.post_processor = tokenizers.processors.BertProcessing(*around)
        special = [token for token in (BERT_START, BERT_END, "[PAD]", "[UNK]", "[MASK]") if token in vocabulary]
        encoder.add_special_tokens(special)
        return cls(encoder.to_str(), length, vocabulary["[PAD]"])

    @property
    def vocabulary_size(self) -> int:
        """The number of tokens in the vocabulary."""
        return self._encoder.get_vocab_size()

    def tokens(self, text: str) -> list[int]:
        """The token ids of a text."""
        numbers = self._encoder.encode(text, add_special_tokens=False).ids
        return [one for number in numbers for one in self._several.get(number, (number,))]


class SentencePiece(Tokenizer):
    """The tokenizer of a sentencepiece model (Kudo & Richardson, 2018, arXiv:1808.06226), such as that of T5.

        SentencePiece.read("tokenizer/spiece.model", length=512)

    As in transformers, the control tokens of the model, such as "</s>", and T5's <extra_id_0> ... <extra_id_99>, which
    follow the vocabulary in reverse order, are matched in texts.

    Args:
        model: the content of the file, in base64.
        length: the number of tokens per row.
        extra: the number of tokens that follow those of the model.

    Raises:
        ImportError: if `sentencepiece` is missing.
        ValueError: if `model` is not such a file, or has no end or padding token.
    """

    def __init__(self, model: str, length: int = 512, extra: int = 100):
        super().__init__(length)
        check_integer("SentencePiece", "length", length, 2)
        check_integer("SentencePiece", "extra", extra, 0)
        with needs("text", "SentencePiece needs sentencepiece"):
            import sentencepiece
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=base64.b64decode(model, validate=True))
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"SentencePiece: `model` must be a model of sentencepiece in base64: {error}; received: {model!r:.60}"
            ) from None
        size = self._pieces.get_piece_size()
        if self._pieces.eos_id() < 0 or self._pieces.pad_id() < 0:
            raise ValueError("SentencePiece: the model must have an end token and a padding token")
        self.model = model
        self.extra = extra
        self.padding, self.end = self._pieces.pad_id(), (self._pieces.eos_id(),)
        control = {n for n in range(size) if self._pieces.is_control(n)} | {self._pieces.unk_id()}
        self._special = {self._pieces.id_to_piece(number): number for number in control}
        self._special |= {f"<extra_id_{i}>": size + extra - 1 - i for i in range(extra)}
        self._split = re.compile(f"({'|'.join(map(re.escape, sorted(self._special, key=len, reverse=True)))})")

    @classmethod
    def read(cls, path: Any, length: int = 512, extra: int = 100) -> Self:
        """The tokenizer of a file, spiece.model."""
        with open(path, "rb") as file:
            return cls(base64.b64encode(file.read()).decode(), length, extra)

    @property
    def vocabulary_size(self) -> int:
        """The number of tokens, including the extra ones."""
        return self._pieces.get_piece_size() + self.extra

    def tokens(self, text: str) -> list[int]:
        """The token ids of a text."""
        found = []
        for part in self._split.split(text):
            found += [self._special[part]] if part in self._special else self._pieces.encode(part)
        return found
