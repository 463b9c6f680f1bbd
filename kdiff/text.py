"""Text as arrays, on the host: tokens, or embeddings from a pretrained encoder.

    tokenizer(["a red circle", ""])      # int32, (2, length); 0 for padding
    encoder(["a red circle", ""])        # float32, (2, length, dim)

Both map a list of strings to an array with one row per string, and any other such function can replace them. They run
in Python, before the batch reaches the backend, so that tokens are the same on all three backends.
"""

import functools
import warnings
from collections.abc import Iterable
from typing import Any, Self

import keras
import numpy as np

from kdiff import backend
from kdiff.base import Value, check_integer

__all__ = ["CACHE", "BytePair", "Bytes", "HubText", "Tokenizer", "is_text", "strings", "warn_of_cut"]

CACHE = 2**16  # the number of distinct texts that a tokenizer caches


def is_text(value: Any) -> bool:
    """Whether `value` is a string, or a list, an array or a tensor of strings (`str` or `bytes`)."""
    if isinstance(value, (str, bytes)):
        return True
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and isinstance(value[0], (str, bytes))
    kind = getattr(getattr(value, "dtype", None), "kind", None)  # a NumPy type has one
    if kind == "O":
        return value.size > 0 and isinstance(value.flat[0], (str, bytes))
    return kind in ("U", "S", "T") or "string" in str(getattr(value, "dtype", ""))


def strings(texts: Any) -> list[str]:
    """A string, or a list or an array of `str` or UTF-8 `bytes`, as a list of strings.

    Raises:
        TypeError: if it contains anything else.
    """
    rows = [texts] if isinstance(texts, (str, bytes)) else np.asarray(texts, dtype=object).reshape(-1).tolist()
    rows = [row.decode() if isinstance(row, bytes) else row for row in rows]
    for row in rows:
        if not isinstance(row, str):
            raise TypeError(f"Text must be a string, or a list or an array of strings; received: {row!r}")
    return rows


class Tokenizer(Value):
    """Text as token ids: row n has the tokens of text n, truncated or padded with `padding` to `length`.

    The tokens of each text are enclosed in `start` and `end`, which are never truncated. The empty text has only these
    and padding. A new tokenizer defines `tokens` and `vocabulary_size`, and calls this constructor.

    Args:
        length: the number of tokens per row.

    Attributes:
        padding: the padding token, 0.
        start, end: the tokens before and after those of each text; none by default.
    """

    padding: int = 0
    start: tuple[int, ...] = ()
    end: tuple[int, ...] = ()

    def __init__(self, length: int):
        check_integer(type(self).__name__, "length", length)
        self.length = length
        self._tokens = functools.lru_cache(CACHE)(lambda text: np.asarray(self.tokens(text), "int32"))

    @property
    def vocabulary_size(self) -> int:
        """The number of token ids, 0 ... vocabulary_size - 1."""
        raise NotImplementedError

    def tokens(self, text: str) -> list[int]:
        """All tokens of one text, without `start` and `end`, each at least 1 if `padding` is 0."""
        raise NotImplementedError

    def __call__(self, texts: Any) -> np.ndarray:
        """Maps a string, or a list or an array of strings, to int32 with shape `(count, length)`.

        Warns if a text is truncated.

        Raises:
            TypeError: if `texts` holds anything but `str` and `bytes`.
        """
        return self._rows(texts)[0]

    def masked(self, texts: Any) -> tuple[np.ndarray, np.ndarray]:
        """The result of a call, and a mask of the same shape, True for tokens and False for padding."""
        rows, counts = self._rows(texts)
        return rows, np.arange(self.length) < counts[:, None]

    def _rows(self, texts):
        texts = strings(texts)
        found = [self._tokens(text) for text in texts]
        room = self.length - len(self.start) - len(self.end)
        rows = np.full((len(texts), self.length), self.padding, "int32")
        whole = [[*self.start, *tokens[:room], *self.end] for tokens in found]
        for row, tokens in zip(rows, whole, strict=True):
            row[: len(tokens)] = tokens
        cut = [(text, len(row)) for text, row in zip(texts, found, strict=True) if len(row) > room]
        warn_of_cut(self, room, cut)
        return rows, np.array([len(tokens) for tokens in whole], "int32")


class Bytes(Tokenizer):
    """A token for each byte of the UTF-8 text: `byte + 1`. It needs no vocabulary, and covers every text.

    Args:
        length: the number of tokens per row.
    """

    vocabulary_size = 257

    def __init__(self, length: int = 128):
        super().__init__(length)

    def tokens(self, text: str) -> list[int]:
        """The bytes, each plus 1."""
        return [byte + 1 for byte in text.encode()]


class BytePair(Tokenizer):
    """Byte-pair encoding: frequent words are one token, others a few (Sennrich et al. 2016, arXiv:1508.07909; on bytes,
    as Radford et al. 2019, section 2.2).

    It needs the package `tokenizers`, the extra `text`. The vocabulary is part of a saved model.

        BytePair.learn(captions, length=16)

    Args:
        model: the JSON of a `tokenizers.Tokenizer`, as from its method `to_str` or a file tokenizer.json. A token
            id is the id there plus 1; special tokens are not added.
        length: the number of tokens per row.

    Raises:
        ImportError: if `tokenizers` is missing.
        ValueError: if `model` is not such a JSON.
    """

    def __init__(self, model: str, length: int = 32):
        super().__init__(length)
        package = _tokenizers()
        try:
            self._encoder = package.Tokenizer.from_str(model)
        except Exception as error:  # `tokenizers` raises no more specific type
            raise ValueError(
                f"BytePair: `model` must be the JSON of a tokenizer: {error}; received: {model!r:.60}"
            ) from None
        self._encoder.no_padding()
        self._encoder.no_truncation()
        self.model = model

    @classmethod
    def learn(cls, texts: Iterable[str], vocabulary_size: int = 512, length: int = 32, lowercase: bool = True) -> Self:
        """Learns a vocabulary from texts, deterministically.

        Args:
            texts: a list of strings, or anything that yields them.
            vocabulary_size: the maximum number of tokens, at least 257, including padding and all bytes.
            length: the number of tokens per row.
            lowercase: whether texts are lower-cased; otherwise "Red" and "red" are two words.
        """
        check_integer("BytePair", "vocabulary_size", vocabulary_size, 257)
        package = _tokenizers()
        normalizers, level = package.normalizers, package.pre_tokenizers.ByteLevel
        encoder = package.Tokenizer(package.models.BPE())
        steps = [normalizers.NFC(), normalizers.Replace(package.Regex(r"\s+"), " "), normalizers.Strip()]
        encoder.normalizer = normalizers.Sequence([*steps, *([normalizers.Lowercase()] if lowercase else [])])
        encoder.pre_tokenizer = level(add_prefix_space=True)
        options = {"initial_alphabet": sorted(level.alphabet()), "show_progress": False}
        trainer = package.trainers.BpeTrainer(vocab_size=vocabulary_size - 1, **options)
        encoder.train_from_iterator(strings(list(texts) if not is_text(texts) else texts), trainer)
        return cls(encoder.to_str(), length)

    @property
    def vocabulary_size(self) -> int:
        """The number of tokens, including padding."""
        return self._encoder.get_vocab_size() + 1

    def tokens(self, text: str) -> list[int]:
        """The token ids in the vocabulary, each plus 1."""
        return [number + 1 for number in self._encoder.encode(text, add_special_tokens=False).ids]


class HubText(Value):
    """Embeddings of text from a pretrained text encoder of KerasHub, such as CLIP's or T5's.

        encoder = HubText("clip_vit_base_patch32")
        encoder(["a red circle"])                    # float32, (1, 77, 512)

    It runs on the backend of this process, `batch_size` texts at once, each distinct text once. It needs the package
    `keras-hub`, the extra `hub`. Its weights belong to no model: they are not trained, averaged or saved. In the
    configuration of a model an encoder is saved by the name of its preset; one given as objects is not saved.

    Args:
        backbone: the name, handle or folder of a preset, loaded on first use; or a backbone of KerasHub, or any Keras
            model with inputs of the same names. Only the text encoder of CLIP, or the encoder of T5, is used.
        tokenizer: a tokenizer of KerasHub; None for that of the preset.
        length: the number of tokens per row. Longer texts are truncated, with a warning, shorter ones padded.
        batch_size: the number of texts that are encoded at once.

    Raises:
        ImportError: if `keras-hub` is missing.
    """

    def __init__(self, backbone: Any = None, tokenizer: Any = None, length: int = 77, batch_size: int = 32):
        check_integer("HubText", "length", length, 2)
        check_integer("HubText", "batch_size", batch_size)
        if tokenizer is None and not isinstance(backbone, (str, type(None))):
            raise ValueError("HubText: a backbone that is not the name of a preset needs a `tokenizer`")
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.length = length
        self.batch_size = batch_size

    def get_config(self) -> dict[str, Any]:
        """The arguments, except objects, which are not saved."""
        names = {name: getattr(self, name) for name in ("backbone", "tokenizer", "length", "batch_size")}
        return {name: value if isinstance(value, (str, int)) else None for name, value in names.items()}

    def __call__(self, texts: Any) -> np.ndarray:
        """Maps a string, or a list or an array of strings, to float32 with shape `(count, length, dim)`.

        Warns if a text is truncated.

        Raises:
            TypeError: if `texts` holds anything but `str` and `bytes`.
            ValueError: if there is no backbone, as in a loaded model.
        """
        texts, places = np.unique(np.asarray(strings(texts), dtype=object), return_inverse=True)
        ids, mask = self._packed(texts.tolist())
        batches = np.split(np.arange(len(ids)), range(self.batch_size, len(ids), self.batch_size))
        return np.concatenate([self._batch(ids[rows], mask[rows]) for rows in batches])[places]

    def _packed(self, texts):
        """Tokens, (count, length), with start and end tokens, and a mask that is 1 for tokens."""
        tokenizer = self._parts[0]
        end = [tokenizer.end_token_id]
        start = [id for id in [getattr(tokenizer, "start_token_id", None)] if id not in (None, *end)]  # T5 has only one
        room = self.length - len(start) - 1
        found = [list(row) for row in tokenizer(texts)]
        warn_of_cut(self, room, [(text, len(row)) for text, row in zip(texts, found, strict=True) if len(row) > room])
        rows = [[*start, *row[:room], *end] for row in found]
        ids = [row + [tokenizer.pad_token_id] * (self.length - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (self.length - len(row)) for row in rows]
        return np.array(ids, "int32"), np.array(mask, "int32")

    def _batch(self, ids, mask):
        """One batch, padded so that no other size is compiled."""
        fill = [(0, self.batch_size - len(ids)), (0, 0)]
        y = self._parts[1](np.pad(ids, fill, mode="edge"), np.pad(mask, fill, mode="edge"))
        return keras.ops.convert_to_numpy(y)[: len(ids)]

    @functools.cached_property
    def _parts(self):
        """The tokenizer, and the compiled encoder: from tokens and mask to embeddings."""
        tokenizer, backbone = self.tokenizer, self.backbone
        if backbone is None:
            raise ValueError(
                "HubText: there is no backbone, since one given as an object is not saved; pass embeddings "
                "instead of strings, or set the `encoder` of the layer again"
            )
        if isinstance(backbone, str):
            models = _keras_hub().models
            tokenizer = tokenizer or models.Tokenizer.from_preset(backbone)
            backbone = models.Backbone.from_preset(backbone)
        encoder = _encoder_of(getattr(backbone, "text_encoder", backbone))

        def run(ids, mask):
            known = {"token_ids": ids, "padding_mask": mask, "segment_ids": keras.ops.zeros_like(ids)}
            inputs = {name: known[name.removeprefix("encoder_")] for name in encoder.input}
            return keras.ops.cast(encoder(inputs, training=False), "float32")

        return tokenizer, backend.compiled(run, encoder)


def _encoder_of(backbone: keras.Model) -> keras.Model:
    """The model from tokens only to their embeddings, without other outputs or a decoder of the backbone."""
    if not isinstance(backbone.output, dict):
        return backbone
    names = [name for name in ("encoder_sequence_output", "sequence_output") if name in backbone.output]
    if not names:
        raise ValueError(f"HubText: the backbone has no 'sequence_output'; its outputs: {sorted(backbone.output)}")
    inputs = {name: value for name, value in backbone.input.items() if not name.startswith("decoder_")}
    return keras.Model(inputs, backbone.output[names[0]])


def warn_of_cut(owner: Any, room: int, cut: list[tuple[str, int]]) -> None:
    """Warns of truncated texts, given as pairs of the text and the number of its tokens."""
    if cut:
        text, count = cut[0]
        more = f", as are {len(cut) - 1} more" if len(cut) > 1 else ""
        warnings.warn(f"{owner!r} has room for {room} tokens; {text!r} has {count} and is cut{more}", stacklevel=4)


def _tokenizers():
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError('BytePair needs tokenizers: pip install "kdiff[text]"') from error
    return tokenizers


def _keras_hub():
    try:
        import keras_hub
    except ImportError as error:
        raise ImportError('HubText needs keras-hub: pip install "kdiff[hub]"') from error
    return keras_hub
