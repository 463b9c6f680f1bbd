"""Tokens of encoders that have learned already: the vocabularies of CLIP, T5 and BERT, in the forms that they are in.

    JSONTokenizer      the JSON of a `tokenizers.Tokenizer`, as transformers writes it; CLIP's and BERT's of their words
    SentencePiece      the file of a sentencepiece model, as T5's

A token that was added to a vocabulary and is followed there by its name with "_1", "_2" and so on stands for all of
them, as diffusers has it for textual inversions of several vectors.

The numbers are those of the vocabulary, and each text has the tokens that begin and end it. A vocabulary is a part of
the configuration, and so of a saved model. They need the packages `tokenizers` and `sentencepiece`, the extra `text`.
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
    """The tokenizer that the JSON of a `tokenizers.Tokenizer` describes, with what that puts before and after a text.

    Args:
        model: the JSON, as `tokenizers.Tokenizer.to_str` or a file tokenizer.json gives it.
        length: the number of tokens of a row.
        padding: the token that fills up, a number of the vocabulary.

    Raises:
        ImportError: if `tokenizers` is missing.
        ValueError: if `model` is no such JSON, or there is no room between the tokens that begin and end a text.
    """

    def __init__(self, model: str, length: int = 77, padding: int = 0):
        super().__init__(length)
        with needs("text", "JSONTokenizer needs tokenizers"):
            import tokenizers
        try:
            self._encoder = tokenizers.Tokenizer.from_str(model)
        except Exception as error:  # `tokenizers` raises nothing more precise
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
        """The numbers of all tokens that an added one stands for, by its number, if they are several."""
        added = {token.content: number for number, token in self._encoder.get_added_tokens_decoder().items()}
        found: dict[int, list[int]] = {}
        for word, number in added.items():
            names = itertools.takewhile(added.__contains__, (f"{word}_{i}" for i in itertools.count(1)))
            more = [added[name] for name in names]
            if more:
                found[number] = [number, *more]
        return found

    def with_token(self, token: str, count: int = 1) -> tuple[Self, list[int]]:
        """This tokenizer with one more token, and its number; or with `count`, which the first stands for.

        Raises:
            ValueError: if the vocabulary has one of these.
        """
        names = [token, *(f"{token}_{i}" for i in range(1, count))]
        with needs("text", "JSONTokenizer needs tokenizers"):
            import tokenizers
        encoder = tokenizers.Tokenizer.from_str(self.model)
        known = [name for name in (*names, f"{token}_{count}") if encoder.token_to_id(name) is not None]
        if known or not token.strip():
            raise ValueError(
                f"JSONTokenizer: a new token must be a word that the vocabulary does not have; received: {token!r}"
                + (f", and it has {known}" if known else "")
            )
        encoder.add_tokens([tokenizers.AddedToken(name, normalized=True) for name in names])
        numbers = [encoder.token_to_id(name) for name in names]
        return type(self)(encoder.to_str(), self.length, self.padding), numbers

    def numbers_of(self, token: str) -> list[int] | None:
        """The number of a token that was added, or of all that it stands for; None if there is none."""
        number = self._encoder.token_to_id(token)
        if number is None or number not in self._encoder.get_added_tokens_decoder():
            return None
        return self._several.get(number, [number])

    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens that the JSON has before and after each text: those around that of a letter."""
        inside, whole = self.tokens("a"), self._encoder.encode("a").ids
        for at in range(len(whole) - len(inside) + 1):
            if whole[at : at + len(inside)] == inside:
                return tuple(whole[:at]), tuple(whole[at + len(inside) :])
        raise ValueError("JSONTokenizer: the JSON changes the tokens of a text where it puts others around it")

    @classmethod
    def clip(
        cls,
        vocabulary: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        length: int = 77,
        padding: str = CLIP_END,
        special: Mapping[str, bool] | None = None,
    ) -> Self:
        """CLIP's: byte pairs of words in small letters (Radford et al. 2021, section 2.4).

        Args:
            vocabulary: the number of each token, as in vocab.json.
            merges: pairs of tokens that make one, the first first, as in merges.txt.
            length: the number of tokens of a row.
            padding: the token that fills up: that of the end, or "!" of OpenCLIP.
            special: tokens that are found in a text as they stand, and whether also in other letters (`<|EndOfText|>`);
                None for those of the start, the end and the padding, as they stand.

        Raises:
            ValueError: if a token of these is not in the vocabulary.
        """
        special = dict.fromkeys((CLIP_START, CLIP_END, padding), False) if special is None else dict(special)
        for token in (CLIP_START, CLIP_END, padding, *special):
            if token not in vocabulary:
                raise ValueError(f"JSONTokenizer: {token!r} must be in the vocabulary of CLIP; it is not")
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
        """BERT's: the longest pieces of each word (Devlin et al. 2018, arXiv:1810.04805, section 3), as LDMText's.

        Args:
            vocabulary: the number of each piece, as the lines of vocab.txt; one within a word begins with "##".
            length: the number of tokens of a row, filled up with "[PAD]".
            lower: whether letters are made small.
            accents: whether accents are taken off; None for as `lower`.

        Raises:
            ValueError: if "[CLS]", "[SEP]", "[PAD]" or "[UNK]" is not in the vocabulary.
        """
        for token in (BERT_START, BERT_END, "[PAD]", "[UNK]"):
            if token not in vocabulary:
                raise ValueError(f"JSONTokenizer: {token!r} must be in the vocabulary of BERT; it is not")
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
        """The tokens of the vocabulary."""
        return self._encoder.get_vocab_size()

    def tokens(self, text: str) -> list[int]:
        """Their numbers in the vocabulary."""
        numbers = self._encoder.encode(text, add_special_tokens=False).ids
        return [one for number in numbers for one in self._several.get(number, (number,))]


class SentencePiece(Tokenizer):
    """The tokenizer of a sentencepiece model (Kudo & Richardson, 2018, arXiv:1808.06226), such as T5's.

        SentencePiece.read("tokenizer/spiece.model", length=512)

    As in transformers, the model's control tokens, such as "</s>", and T5's <extra_id_0> ... <extra_id_99>, which
    follow the vocabulary, the last first, are found in a text as they stand.

    Args:
        model: the content of the file, in base64.
        length: the number of tokens of a row.
        extra: the number of tokens that follow those of the model.

    Raises:
        ImportError: if `sentencepiece` is missing.
        ValueError: if `model` is no such file, or has no token for the end or for padding.
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
            raise ValueError("SentencePiece: the model must have a token for the end, and one for padding")
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
        """The tokens of the model and those that follow."""
        return self._pieces.get_piece_size() + self.extra

    def tokens(self, text: str) -> list[int]:
        """Their numbers in the vocabulary."""
        found = []
        for part in self._split.split(text):
            found += [self._special[part]] if part in self._special else self._pieces.encode(part)
        return found
