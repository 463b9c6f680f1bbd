"""Text as a condition, encoded by pretrained encoders inside the network: frozen, and saved with it.

    prompt = Prompt([encoder], [tokenizer])
    network = UNet.transformer(64, conditions={"text": prompt})
    model.sample(4, text="a red circle", guidance=7.5)          # against the empty text

The input of the network is the output of the encoders, computed on the host once per text, before the first step. If
some of their weights are trained, by `kdiff.lora` or `kdiff.inversion`, it is the tokens, and the network calls the
encoders.
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

INPUT = "text"  # the input of the network, whatever the name of the condition


class Prompt(Condition):
    """The tokens of a text from one or several encoders, concatenated along channels; a part of the context.

    `fit` and `sample` accept strings as "text", whatever the name of the condition, or the output of `prepare`: one row
    (length, width) per text. If encoders have a `projection`, a further row holds their concatenated vectors, padded
    with zeros, which `PromptVector` extracts. If `masked`, a further channel is 1 for a token and 0 for padding.

    The empty text represents no condition. In training it replaces a text with probability `dropout`.

    If `inside`, `prepare` converts a text to its tokens, int32 (encoders, length), if `masked` with their masks, and
    the network calls the encoders; -1 represents no condition if `zeros`. Everything else is unchanged.

    Args:
        encoders: built `CLIPText` or `T5Text`, or one. They are used directly, not copied, and frozen.
        tokenizers: one for each encoder, all of one length.
        masked: whether padding is masked, in the encoders and in attention to the text. It is not in Stable Diffusion.
        zeros: whether zeros, not the empty text, represent no condition: `force_zeros_for_empty_prompt` of Stable
            Diffusion XL.
        dropout, seed: as in `Condition`.
        batch_size: the number of texts that are encoded at once.
        layer: applied to the tokens, such as a `Dense`, or a `VectorAndTokens` that also returns a vector; it is
            trained. None for the tokens themselves.
        padded: whether, if `masked`, padding is nevertheless attended to outside the encoders, as in DeepFloyd IF.
        lower: whether texts are lower-cased and stripped, as in DeepFloyd IF.
        inside: whether the encoders are called inside the network because they are trained; set by `changed`.
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
                raise TypeError(f"Prompt: `encoders` must be text encoders, CLIPText or T5Text; received: {encoder!r}")
            if tokenizer.vocabulary_size > encoder.vocabulary_size:
                raise ValueError(
                    f"Prompt: {tokenizer!r} has {tokenizer.vocabulary_size} tokens, but its encoder, "
                    f"{type(encoder).__name__}, {encoder.vocabulary_size}"
                )
        self._check_lengths()

    def _check_lengths(self):
        lengths = [tokenizer.length for tokenizer in self.tokenizers]
        lengths += [encoder.length for encoder in self.encoders if hasattr(encoder, "length")]
        if len(set(lengths)) > 1:
            raise ValueError(f"Prompt: all tokenizers and encoders must have one length; received: {lengths}")

    input = INPUT

    @property
    def length(self) -> int:
        """The number of tokens per text."""
        return self.tokenizers[0].length

    @property
    def width(self) -> int:
        """The channels of a token."""
        return sum(encoder.width for encoder in self.encoders)

    @property
    def vector(self) -> int:
        """The total size of the vectors of all encoders with a projection."""
        return sum(encoder.projection or 0 for encoder in self.encoders)

    @property
    def row(self) -> tuple[int, int]:
        """The shape of the output of `prepare` for one text."""
        return (len(self.encoders) * (1 + self.masked), self.length) if self.inside else self._encoded

    @property
    def _encoded(self) -> tuple[int, int]:
        """The shape of the output of the encoders for one text."""
        return (self.length + (self.vector > 0), self.width + self.masked)

    def inputs_of(self, name: str) -> dict[str, Input]:
        """The single input "text"."""
        return {INPUT: Input(INPUT, self)}

    def build(self, x_shape, embed_shape=None):
        """Builds the encoders, if needed."""
        self._check_shape(_taken(x_shape), self.row)
        if self.vector > self.width:
            raise ValueError(f"Prompt: the vectors, of size {self.vector}, must not be wider than tokens, {self.width}")
        for encoder, tokenizer in zip(self.encoders, self.tokenizers, strict=True):
            build_layer(encoder, (None, tokenizer.length))
            encoder.freeze()  # including the variables just created
        if self.layer is not None:
            build_layer(self.layer, (None, self.length, self.width), embed_shape)

    def get_build_config(self):
        """The current shape of a row."""
        return {"row": self.row} if self.built else None

    def build_from_config(self, config):
        """Builds a loaded layer."""
        self.build((None, *config["row"]))

    def _check_shape(self, shape, row):
        if len(shape) != 3 or any(a not in (None, b) for a, b in zip(shape[1:], row, strict=True)):
            raise ValueError(
                f"Prompt: texts must be strings, or rows {row} as returned by `prepare`; received the shape: "
                f"{tuple(shape)}"
            )

    # On the host

    @property
    def null(self) -> np.ndarray:
        """The row of the empty text; or zeros, represented by tokens of -1."""
        if self._empty is None:
            nothing = np.full(self.row, -1, "int32") if self.inside else np.zeros(self.row, "float32")
            self._empty = nothing if self.zeros else self._rows([""])[0]
        return self._empty

    def prepare(self, values: Any) -> np.ndarray:
        """Encodes strings as rows, (count, *row), each distinct text once; rows are unchanged.

        Warns if a text is truncated.
        """
        if not is_text(values):
            return np.asarray(values)
        texts, places = np.unique(np.asarray(strings(values), dtype=object), return_inverse=True)
        return self._rows(texts.tolist())[places]

    def check(self, values) -> None:
        """Raises a ValueError if rows have another shape or are not finite."""
        self._check_shape(values.shape, self.row)
        if self.inside and values.dtype.kind not in "iu":
            raise ValueError(
                f"Prompt: its encoders are trained, so texts must be strings or tokens; received: {values.dtype}"
            )
        if not np.all(np.isfinite(values)):
            raise ValueError("Prompt: the rows of texts must be finite; received NaN or infinity")

    def _rows(self, texts: list[str]) -> np.ndarray:
        if not all(encoder.built for encoder in self.encoders):
            raise ValueError("Prompt: the encoders have no weights yet; build them, or the model")
        texts = [text.lower().strip() for text in texts] if self.lower else texts
        given = [part for tokenizer in self.tokenizers for part in tokenizer.masked(texts)]
        if self.inside:
            return np.stack([np.asarray(part, "int32") for part in given[:: 1 if self.masked else 2]], axis=1)
        # Batches are padded to a power of two, as each other size would be recompiled.
        size = min(self.batch_size, 2 ** (len(texts) - 1).bit_length())
        rows = []
        for first in range(0, len(texts), size):
            at = np.minimum(np.arange(first, first + size), len(texts) - 1)
            rows.append(ops.convert_to_numpy(self._encode(*(part[at] for part in given))))
        return np.concatenate(rows)[: len(texts)]

    @functools.cached_property
    def _encode(self):
        """The compiled encoders, from tokens and masks, in turn, to rows."""

        return backend.compiled(lambda *given: self._rows_of(given[::2], given[1::2]), *self.encoders)

    def _rows_of(self, tokens, masks, training=False):
        """The output of the encoders for their tokens and masks."""
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
        """The outputs of the encoders, concatenated along channels."""
        return ops.concatenate([ops.cast(one.tokens, "float32") for one in found], axis=-1)

    # In the network

    def unfolded(self, inputs: dict[str, Any], training: Any = None) -> dict[str, Any]:
        """The inputs of the network, with the tokens in "text" replaced by the output of the encoders."""
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
        """Maps rows of the encoders, (batch, ...), or a dictionary with "text", to `Encoded`: tokens, and a mask."""
        if self.inside:
            return self.encode(_taken(x), embed, training)
        return super().call(_taken(x), embed, context, training)

    def encode(self, x, embed, training):
        """Maps rows to tokens, (batch, length, width)."""
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
        """The specification of the output of `encode`."""
        batch = _taken(x).shape[0]
        mask = keras.KerasTensor((batch, self.length), "bool") if self._hides else None
        tokens = keras.KerasTensor((batch, self.length, self.width), self.compute_dtype)
        if self.layer is None:
            return Encoded(tokens=tokens, mask=mask)
        made = self.layer.compute_output_spec(tokens)
        return Encoded.of(made)._replace(mask=mask)

    def through(self, layer: keras.layers.Layer | None) -> "Prompt":
        """The same condition with another `layer`, sharing the encoders."""
        options = {name: getattr(self, name) for name in self._argument_defaults()}
        if layer is not None or "layer" in options:  # a subclass may have none
            options["layer"] = layer
        return type(self)(**options)

    def replace_encoders(self, encoders: Sequence[Encoder]) -> None:
        """Uses other encoders of the same classes, such as those of another network, to share their memory."""
        with contextlib.ExitStack() as held:
            for encoder in self.encoders:
                held.enter_context(backend.replaced(self, encoder))
            self.encoders = list(encoders)
        for encoder in self.encoders:
            encoder.freeze()
        self.changed()

    def load_own_variables(self, store) -> None:
        """Loads as Keras does."""
        super().load_own_variables(store)
        self.changed()

    def changed(self) -> None:
        """Must be called after the encoders' weights, the set of trained ones, or the tokenizers have changed."""
        self._empty = None
        self.__dict__.pop("_encode", None)
        self.inside = any(encoder.learns for encoder in self.encoders)


class PromptVector(Block):
    """The vector in the rows of a `Prompt`: the first entries of the last row. Stable Diffusion XL uses it:

        Joint({"text": PromptVector(1280), "time_ids": SizeEmbedding(256)}, MLPEmbedding(Identity(), 1280))

    Args:
        width: the size of the vector, `Prompt.vector`.
    """

    def __init__(self, width: int, **kwargs):
        super().__init__(autocast=False, **kwargs)
        check_integer("PromptVector", "width", width)
        self.width = width

    def call(self, x, embed=None, context=None, training=None):
        """Maps (batch, *row) to (batch, width)."""
        return ops.cast(x[:, -1, : self.width], self.compute_dtype)

    def compute_output_shape(self, x_shape, embed_shape=None, context_shape=None):
        """(batch, width)."""
        return (x_shape[0], self.width)


def _listed(values):
    return list(values) if isinstance(values, (list, tuple)) else [values]


def _taken(x):
    """The rows, also from a dictionary of inputs; or their shape, or symbolic tensor."""
    return x[INPUT] if isinstance(x, dict) else x
