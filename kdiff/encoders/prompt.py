"""Text as a condition by encoders that have learned already, frozen inside of the network: saved, but not trained.

    prompt = Prompt([encoder], [tokenizer])
    network = UNet.transformer(64, conditions={"text": prompt})
    model.sample(4, text="a red circle", guidance=7.5)          # against the empty text

The input of the network is what the encoders give, made on the host once for each text, before the first step. Where
some of their weights learn, by `kdiff.lora` or `kdiff.inversion`, it is the tokens, and the network calls the encoders.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from kdiff import backend
from kdiff.base import check_integer
from kdiff.blocks.base import Block, apply_layer, build_layer, get_layer
from kdiff.blocks.conditions import Condition, Encoded, Input
from kdiff.encoders.base import Encoder
from kdiff.encoders.clip import CLIPVision
from kdiff.text import Tokenizer, is_text, strings

__all__ = ["INPUT", "Prompt", "PromptVector"]

INPUT = "text"  # of the network, whatever the condition's name


class Prompt(Condition):
    """The tokens of a text by one or several encoders, their channels side by side; a part of the context.

    `fit` and `sample` take strings as "text", whatever the name of the condition, or what `prepare` makes of them: a
    row (length, width) a text. If encoders have a `projection`, one more row has their vectors, one after the other,
    and then zeros: `PromptVector` takes it out. If `masked`, one more channel is 1 where there is a token.

    The empty text stands for no condition. In training it takes the place of a text with probability `dropout`.

    If `inside`, `prepare` makes of a text its tokens, int32 (encoders, length), if `masked` each with its mask, and the
    network calls the encoders; -1 is no condition if `zeros`. All else is as before.

    Args:
        encoders: built `CLIPText` or `T5Text`, or one. They are used as they are, not copied, and frozen.
        tokenizers: one for each encoder, all of one length.
        masked: whether what fills up a text is hidden, from the encoders and from those who attend to the text. It is
            not in Stable Diffusion.
        zeros: whether zeros stand for no condition, in place of the empty text: Stable Diffusion XL's
            `force_zeros_for_empty_prompt`.
        dropout, seed: as in `Condition`.
        batch_size: how many texts are encoded at once.
        layer: of the tokens, such as a `Dense`, or a `VectorAndTokens` that also makes a vector of them; it is trained.
            None for the tokens themselves.
        padded: whether, where `masked`, those who attend to the text see all the same what fills it up, as in DeepFloyd
            IF.
        lower: whether texts are made small letters, without white space around them, as DeepFloyd IF does.
        inside: whether the encoders are called inside the network, since they learn; `changed` sets it.

    Raises:
        ValueError: if the numbers of encoders and tokenizers, or the lengths of texts, differ, or a tokenizer has more
            tokens than its encoder.
    """

    def __init__(
        self,
        encoders: Sequence[Encoder] | Encoder,
        tokenizers: Sequence[Tokenizer] | Tokenizer,
        masked: bool = False,
        zeros: bool = False,
        dropout: float = 0.0,
        seed: int = 0,
        batch_size: int = 16,
        layer: Any = None,
        padded: bool = False,
        lower: bool = False,
        inside: bool = False,
        **kwargs,
    ):
        super().__init__(dropout, seed, **kwargs)
        check_integer("Prompt", "batch_size", batch_size)
        self.encoders = [encoders] if isinstance(encoders, keras.layers.Layer) else list(encoders)
        self.tokenizers = [Tokenizer.get(one) for one in _listed(tokenizers)]
        self.masked = masked
        self.zeros = zeros
        self.batch_size = batch_size
        self.layer = None if layer is None else get_layer(layer)
        self.padded = padded
        self.lower = lower
        self.inside = inside
        self._check_parts()
        for encoder in self.encoders:
            encoder.freeze()
        self._empty: np.ndarray | None = None

    def _check_parts(self):
        encoders, tokenizers = self.encoders, self.tokenizers
        if not encoders or len(encoders) != len(tokenizers):
            raise ValueError(
                f"Prompt: there must be one tokenizer for each encoder; received {len(encoders)} encoders and "
                f"{len(tokenizers)} tokenizers"
            )
        for encoder, tokenizer in zip(encoders, tokenizers, strict=True):
            if not isinstance(encoder, Encoder) or isinstance(encoder, CLIPVision):
                raise TypeError(f"Prompt: `encoders` must be of text, CLIPText or T5Text; received: {encoder!r}")
            if tokenizer.vocabulary_size > encoder.vocabulary_size:
                raise ValueError(
                    f"Prompt: {tokenizer!r} has {tokenizer.vocabulary_size} tokens, and its encoder, "
                    f"{type(encoder).__name__}, {encoder.vocabulary_size}"
                )
        self._check_lengths()

    def _check_lengths(self):
        lengths = [tokenizer.length for tokenizer in self.tokenizers]
        lengths += [encoder.length for encoder in self.encoders if hasattr(encoder, "length")]
        if len(set(lengths)) > 1:
            raise ValueError(f"Prompt: texts must have one length, of tokenizers and encoders; received: {lengths}")

    input = INPUT

    @property
    def length(self) -> int:
        """Tokens of a text."""
        return self.tokenizers[0].length

    @property
    def width(self) -> int:
        """Channels of a token."""
        return sum(encoder.width for encoder in self.encoders)

    @property
    def vector(self) -> int:
        """Numbers in the vectors of all encoders that have a projection."""
        return sum(encoder.projection or 0 for encoder in self.encoders)

    @property
    def row(self) -> tuple[int, int]:
        """The shape of what `prepare` makes of one text."""
        return (len(self.encoders) * (1 + self.masked), self.length) if self.inside else self._encoded

    @property
    def _encoded(self) -> tuple[int, int]:
        """The shape of what the encoders make of one text."""
        return (self.length + (self.vector > 0), self.width + self.masked)

    def inputs_of(self, name: str) -> dict[str, Input]:
        """One, "text"."""
        return {INPUT: Input(INPUT, self)}

    def build(self, x_shape, embed_shape=None):
        """Builds encoders that are not."""
        self._check_shape(_taken(x_shape), self.row)
        if self.vector > self.width:
            raise ValueError(
                f"Prompt: the vectors, of {self.vector} numbers, must not be wider than tokens, {self.width}"
            )
        for encoder, tokenizer in zip(self.encoders, self.tokenizers, strict=True):
            build_layer(encoder, (None, tokenizer.length))
            encoder.freeze()  # with the variables that it has now
        if self.layer is not None:
            build_layer(self.layer, (None, self.length, self.width), embed_shape)

    def get_build_config(self):
        """The row that it takes now."""
        return {"row": self.row} if self.built else None

    def build_from_config(self, config):
        """Builds a loaded layer."""
        self.build((None, *config["row"]))

    def _check_shape(self, shape, row):
        if len(shape) != 3 or any(a not in (None, b) for a, b in zip(shape[1:], row, strict=True)):
            raise ValueError(
                f"Prompt: texts must be strings, or rows {row} as `prepare` makes them; received the shape: "
                f"{tuple(shape)}"
            )

    # On the host

    @property
    def null(self) -> np.ndarray:
        """The row of the empty text; or zeros, for which tokens of -1 stand."""
        if self._empty is None:
            nothing = np.full(self.row, -1, "int32") if self.inside else np.zeros(self.row, "float32")
            self._empty = nothing if self.zeros else self._rows([""])[0]
        return self._empty

    def prepare(self, values: Any) -> np.ndarray:
        """Strings to rows, (count, *row), each different text once; rows are left as they are.

        Warns where a text has more tokens than there is room for.
        """
        if not is_text(values):
            return np.asarray(values)
        texts, places = np.unique(np.asarray(strings(values), dtype=object), return_inverse=True)
        return self._rows(texts.tolist())[places]

    def check(self, values) -> None:
        """Raises a ValueError for rows of another shape, or that are not finite."""
        self._check_shape(values.shape, self.row)
        if self.inside and values.dtype.kind not in "iu":
            raise ValueError(
                f"Prompt: its encoders learn, so texts must be strings, or tokens; received: {values.dtype}"
            )
        if not np.all(np.isfinite(values)):
            raise ValueError("Prompt: the rows of texts must be finite; received a batch that holds NaN or infinity")

    def _rows(self, texts: list[str]) -> np.ndarray:
        if not all(encoder.built for encoder in self.encoders):
            raise ValueError("Prompt: the encoders have no weights yet; build them, or the model")
        texts = [text.lower().strip() for text in texts] if self.lower else texts
        given = [part for tokenizer in self.tokenizers for part in tokenizer.masked(texts)]
        if self.inside:
            return np.stack([np.asarray(part, "int32") for part in given[:: 1 if self.masked else 2]], axis=1)
        # Batches are filled up to a power of two: one of another size would be compiled again.
        size = min(self.batch_size, 2 ** (len(texts) - 1).bit_length())
        rows = []
        for first in range(0, len(texts), size):
            at = np.minimum(np.arange(first, first + size), len(texts) - 1)
            rows.append(ops.convert_to_numpy(self._encode(*(part[at] for part in given))))
        return np.concatenate(rows)[: len(texts)]

    @functools.cached_property
    def _encode(self):
        """The compiled encoders: tokens and masks, one after the other, to rows."""

        return backend.compiled(lambda *given: self._rows_of(given[::2], given[1::2]), *self.encoders)

    def _rows_of(self, tokens, masks, training=False):
        """What the encoders make of tokens and masks, one of each for each encoder."""
        found = [
            encoder(ids, mask if self.masked else None, training=training)
            for encoder, ids, mask in zip(self.encoders, tokens, masks, strict=True)
        ]
        rows = self._tokens_of(found)
        if self.masked:
            seen = functools.reduce(ops.logical_or, masks)
            rows = ops.concatenate([rows, ops.cast(seen, "float32")[..., None]], axis=-1)
        if not self.vector:
            return rows
        projected = zip(self.encoders, found, strict=True)
        vectors = [ops.cast(one.vector, "float32") for encoder, one in projected if encoder.projection]
        vector = ops.concatenate(vectors, axis=-1)
        vector = ops.pad(vector, [[0, 0], [0, self._encoded[1] - self.vector]])
        return ops.concatenate([rows, vector[:, None]], axis=1)

    def _tokens_of(self, found: list[Encoded]) -> Any:
        """What the encoders gave, side by side."""
        return ops.concatenate([ops.cast(one.tokens, "float32") for one in found], axis=-1)

    # In the network

    def unfolded(self, inputs: dict[str, Any], training: Any = None) -> dict[str, Any]:
        """The inputs of the network, with what the encoders make of the tokens in "text", for all that take it."""
        if not self.inside:
            return inputs
        x = ops.cast(inputs[INPUT], "int32")
        if training and self.dropout > 0:
            x = self._dropped(x, self._next())
        known, x = x[:, :1, :1] >= 0, ops.maximum(x, 0)
        parts = [x[:, i] for i in range(self.row[0])]
        tokens, masks = (
            (parts[::2], [part > 0 for part in parts[1::2]]) if self.masked else (parts, [None] * len(parts))
        )
        rows = self._rows_of(tokens, masks, training)
        return {**inputs, INPUT: ops.where(known, rows, ops.zeros_like(rows))}

    def call(self, x, embed=None, context=None, training=None):
        """Rows of the encoders, (batch, ...), or a dictionary of them as "text", to `Encoded`: tokens, and a mask."""
        if self.inside:
            return self.encode(_taken(x), embed, training)
        return super().call(_taken(x), embed, context, training)

    def encode(self, x, embed, training):
        """Rows to tokens, (batch, length, width)."""
        self._check_shape(x.shape, self._encoded)
        tokens = ops.cast(x[:, : self.length, : self.width], self.compute_dtype)
        mask = x[:, : self.length, self.width] > 0.5 if self._hides else None
        if self.layer is None:
            return Encoded(tokens=tokens, mask=mask)
        return Encoded.of(apply_layer(self.layer, tokens, embed, training=training))._replace(mask=mask)

    @property
    def _hides(self) -> bool:
        return self.masked and not self.padded

    def compute_output_spec(self, x, embed=None, context=None, training=None):
        """The specification of what `encode` gives."""
        batch = _taken(x).shape[0]
        mask = keras.KerasTensor((batch, self.length), "bool") if self._hides else None
        tokens = keras.KerasTensor((batch, self.length, self.width), self.compute_dtype)
        if self.layer is None:
            return Encoded(tokens=tokens, mask=mask)
        made = self.layer.compute_output_spec(tokens)
        return Encoded.of(made)._replace(mask=mask)

    def through(self, layer: keras.layers.Layer | None) -> "Prompt":
        """The same with another `layer`, and the same encoders."""
        options = {name: getattr(self, name) for name in self._argument_defaults()}
        return Prompt(**{**options, "layer": layer})

    def replace_encoders(self, encoders: Sequence[Encoder]) -> None:
        """Takes other encoders of the same kinds, such as those of another network, so that memory holds them once."""
        with contextlib.ExitStack() as held:
            for encoder in self.encoders:
                held.enter_context(backend.replaced(self, encoder))
            self.encoders = list(encoders)
        for encoder in self.encoders:
            encoder.freeze()
        self.changed()

    def load_own_variables(self, store) -> None:
        """Keras' own."""
        super().load_own_variables(store)
        self.changed()

    def changed(self) -> None:
        """To be called when the encoders' weights, or which of them learn, or the tokenizers have changed."""
        self._empty = None
        self.__dict__.pop("_encode", None)
        self.inside = any(encoder.learns for encoder in self.encoders)


class PromptVector(Block):
    """The vector of the rows of a `Prompt`: the first numbers of the last row. Stable Diffusion XL adds it to the time:

        Joint({"text": PromptVector(1280), "time_ids": SizeWaves(256)}, MLPEmbedding(Identity(), 1280))

    Args:
        width: of the vector, `Prompt.vector`.
    """

    def __init__(self, width: int, **kwargs):
        super().__init__(autocast=False, **kwargs)
        check_integer("PromptVector", "width", width)
        self.width = width

    def call(self, x, embed=None, context=None, training=None):
        """(batch, *row) to (batch, width)."""
        return ops.cast(x[:, -1, : self.width], self.compute_dtype)

    def compute_output_shape(self, x_shape, embed_shape=None, context_shape=None):
        """(batch, width)."""
        return (x_shape[0], self.width)


def _listed(values):
    return list(values) if isinstance(values, (list, tuple)) else [values]


def _taken(x):
    """The rows, of a dictionary of inputs too; or their shape, or symbol."""
    return x[INPUT] if isinstance(x, dict) else x
