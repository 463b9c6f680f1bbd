"""Text as a condition by encoders that have learned already, frozen inside of the network: saved, but not trained.

    prompt = Prompt([encoder], [tokenizer])
    network = UNet.transformer(64, conditions={"text": prompt})
    model.sample(4, text="a red circle", guidance=7.5)          # against the empty text

The input of the network is what the encoders give, made on the host once for each text, before the first step.
"""

import functools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from kdiff import backend
from kdiff.base import check_integer
from kdiff.blocks.base import Block, build_layer
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

    Args:
        encoders: built `CLIPText` or `T5Text`, or one. They are used as they are, not copied, and frozen.
        tokenizers: one for each encoder, all of one length.
        masked: whether what fills up a text is hidden, from the encoders and from those who attend to the text. It is
            not in Stable Diffusion.
        zeros: whether zeros stand for no condition, in place of the empty text: Stable Diffusion XL's
            `force_zeros_for_empty_prompt`.
        dropout, seed: as in `Condition`.
        batch_size: how many texts are encoded at once.

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
        **kwargs,
    ):
        super().__init__(dropout, seed, **kwargs)
        check_integer("Prompt", "batch_size", batch_size)
        self.encoders = [encoders] if isinstance(encoders, keras.layers.Layer) else list(encoders)
        self.tokenizers = [Tokenizer.get(one) for one in _listed(tokenizers)]
        self.masked = masked
        self.zeros = zeros
        self.batch_size = batch_size
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
        lengths = [tokenizer.length for tokenizer in tokenizers]
        lengths += [encoder.length for encoder in encoders if hasattr(encoder, "length")]
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
        return (self.length + (self.vector > 0), self.width + self.masked)

    def inputs_of(self, name: str) -> dict[str, Input]:
        """One, "text"."""
        return {INPUT: Input(INPUT, self)}

    def build(self, x_shape, embed_shape=None):
        """Builds encoders that are not."""
        self._check_shape(_taken(x_shape))
        if self.vector > self.width:
            raise ValueError(
                f"Prompt: the vectors, of {self.vector} numbers, must not be wider than tokens, {self.width}"
            )
        for encoder in self.encoders:
            build_layer(encoder, (None, self.length))
            encoder.freeze()  # with the variables that it has now

    def _check_shape(self, shape):
        if len(shape) != 3 or any(a not in (None, b) for a, b in zip(shape[1:], self.row, strict=True)):
            raise ValueError(
                f"Prompt: texts must be strings, or rows {self.row} as `prepare` makes them; received the shape: "
                f"{tuple(shape)}"
            )

    # On the host

    @property
    def null(self) -> np.ndarray:
        """The row of the empty text; or zeros."""
        if self._empty is None:
            self._empty = np.zeros(self.row, "float32") if self.zeros else self._rows([""])[0]
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
        self._check_shape(values.shape)
        if not np.all(np.isfinite(values)):
            raise ValueError("Prompt: the rows of texts must be finite; received a batch that holds NaN or infinity")

    def _rows(self, texts: list[str]) -> np.ndarray:
        if not all(encoder.built for encoder in self.encoders):
            raise ValueError("Prompt: the encoders have no weights yet; build them, or the model")
        given = [part for tokenizer in self.tokenizers for part in tokenizer.masked(texts)]
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

        def run(*given):
            tokens, masks = given[::2], given[1::2]
            found = [
                encoder(ids, mask if self.masked else None, training=False)
                for encoder, ids, mask in zip(self.encoders, tokens, masks, strict=True)
            ]
            rows = ops.concatenate([ops.cast(one.tokens, "float32") for one in found], axis=-1)
            if self.masked:
                seen = functools.reduce(ops.logical_or, masks)
                rows = ops.concatenate([rows, ops.cast(seen, "float32")[..., None]], axis=-1)
            if not self.vector:
                return rows
            projected = zip(self.encoders, found, strict=True)
            vectors = [ops.cast(one.vector, "float32") for encoder, one in projected if encoder.projection]
            vector = ops.concatenate(vectors, axis=-1)
            vector = ops.pad(vector, [[0, 0], [0, self.row[1] - self.vector]])
            return ops.concatenate([rows, vector[:, None]], axis=1)

        return backend.compiled(run, *self.encoders)

    # In the network

    def call(self, x, embed=None, context=None, training=None):
        """Rows (batch, *row), or a dictionary of them as "text", to `Encoded` with tokens, and a mask if `masked`."""
        return super().call(_taken(x), embed, context, training)

    def encode(self, x, embed, training):
        """Rows to tokens, (batch, length, width)."""
        self._check_shape(x.shape)
        tokens = ops.cast(x[:, : self.length, : self.width], self.compute_dtype)
        return Encoded(tokens=tokens, mask=x[:, : self.length, self.width] > 0.5 if self.masked else None)

    def compute_output_spec(self, x, embed=None, context=None, training=None):
        """The specification of what `encode` gives."""
        batch = _taken(x).shape[0]
        mask = keras.KerasTensor((batch, self.length), "bool") if self.masked else None
        return Encoded(tokens=keras.KerasTensor((batch, self.length, self.width), self.compute_dtype), mask=mask)

    def load_own_variables(self, store) -> None:
        """Keras' own."""
        super().load_own_variables(store)
        self.forget()

    def forget(self) -> None:
        """To be called when the encoders' weights have changed: the row of the empty text is another."""
        self._empty = None


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
