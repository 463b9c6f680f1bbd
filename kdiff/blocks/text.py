"""Text as a condition: an encoder trained with the network, or embeddings from a pretrained encoder."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from kdiff.base import Configurable, check_integer
from kdiff.blocks.base import (
    Chain,
    Tokens,
    apply_layer,
    build_layer,
    copy_layer,
    derive_seed,
    get_layer,
    kernel_initializer,
)
from kdiff.blocks.conditions import Condition, Encoded, OptionalCondition
from kdiff.blocks.layers import Dense
from kdiff.blocks.lookup import LearnedEmbedding
from kdiff.blocks.normalization import LayerNorm
from kdiff.blocks.transformer import TransformerBlock
from kdiff.text import Tokenizer, is_text

__all__ = ["EncodedText", "TextEncoder"]


class TextEncoder(Condition):
    """A text encoder trained with the network: `norm(blocks(table[token] + position))`, (batch, length, width).

    A small version of the transformer of Nichol et al., "GLIDE" (2021), section 4. `fit` and `sample` accept strings,
    or the token ids of the tokenizer. The empty text "", all padding, represents the absence of text. As in CLIP and
    Stable Diffusion, padding tokens are not masked, unless the layer is `masked`.

    Args:
        tokenizer: a `Tokenizer` or its name, which must not change after training.
        width: of a token.
        depth: the number of blocks.
        heads: of the attention.
        block: a template of the blocks, or its name; None for `TransformerBlock(heads)`.
        pooled: whether the mean of the tokens is mapped by a dense layer to one vector as wide as `embed` (or `width`
            without one), for networks without attention to a context.
        dropout, seed: as in `Condition`.
        masked: whether padding is masked in the blocks, in the mean and in attention to the text.
    """

    def __init__(
        self,
        tokenizer: Any = "bytes",
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        block: Any = None,
        pooled: bool = False,
        dropout: float = 0.1,
        seed: int = 0,
        masked: bool = False,
        **kwargs,
    ):
        super().__init__(dropout, seed, **kwargs)
        check_integer("TextEncoder", "width", width)
        check_integer("TextEncoder", "depth", depth, 0)
        self.tokenizer = Tokenizer.get(tokenizer)
        self.width = width
        self.depth = depth
        self.heads = heads
        self.block = None if block is None else get_layer(block)
        self.pooled = pooled
        self.masked = masked
        policy = {"dtype": self.dtype_policy}
        self.table = LearnedEmbedding(self.tokenizer.vocabulary_size, width, name="table", **policy)
        self.positions = LearnedEmbedding(name="positions", **policy)
        template = TransformerBlock(heads) if block is None else self.block
        self.blocks = Chain([copy_layer(template, **policy) for _ in range(depth)], name="blocks", **policy)
        for index, layer in enumerate(self.blocks._flatten_layers()):
            if hasattr(layer, "seed"):
                layer.seed = derive_seed(seed, index)
        self.norm = LayerNorm(name="norm", **policy)

    def build(self, x_shape, embed_shape=None):
        """Builds the table, the positions, the blocks and, if `pooled`, the dense layer."""
        self._check_shape(x_shape)
        shape = (x_shape[0], self.tokenizer.length, self.width)
        build_layer(self.table, (x_shape[0], self.tokenizer.length))
        for layer in (self.positions, self.blocks, self.norm):
            build_layer(layer, shape)
        if self.pooled:
            width = self.width if embed_shape is None else embed_shape[-1]
            options = {"kernel_initializer": kernel_initializer(), "dtype": self.dtype_policy, "name": "pool"}
            self.pool = Dense(width, **options)
            self.pool.build((x_shape[0], self.width))

    def _check_shape(self, shape):
        if len(shape) != 2 or shape[1] not in (None, self.tokenizer.length):
            raise ValueError(
                f"TextEncoder: tokens must have the shape (batch, {self.tokenizer.length}), as the tokenizer returns "
                f"them; received: {tuple(shape)}"
            )

    @property
    def null(self):
        """The tokens of the empty text; None if `dropout` is 0, since its embedding is then untrained."""
        return self.tokenizer("")[0] if self.dropout > 0 else None

    def prepare(self, values: Any) -> np.ndarray:
        """Converts strings to tokens, (count, length); tokens are unchanged."""
        return self.tokenizer(values) if is_text(values) else np.asarray(values)

    def check(self, values) -> None:
        """Raises a ValueError if the values are not tokens."""
        self._check_shape(values.shape)
        size = self.tokenizer.vocabulary_size
        if values.dtype.kind not in "iu" or (values.size and not (values.min() >= 0 and values.max() < size)):
            raise ValueError(
                f"Tokens must be integers in 0..{size - 1}; received {values.dtype}, {values.min()} to {values.max()}"
            )

    def encode(self, x, embed, training):
        """Maps (batch, length) to (batch, length, width), with a mask if `masked`; or to (batch, dim) if `pooled`."""
        self._check_shape(x.shape)
        mask = ops.not_equal(x, self.tokenizer.padding) if self.masked else None
        own = None if mask is None else Tokens(None, mask)
        x = self.positions(self.table(x))
        x = self.norm(apply_layer(self.blocks, x, context=own, training=training))
        if self.pooled:
            return self.pool(ops.mean(x, axis=1) if mask is None else _masked_mean(x, mask))
        return x if mask is None else Encoded(tokens=x, mask=mask)

    def compute_output_shape(self, x_shape, embed_shape=None, context_shape=None):
        """(batch, length, width), or (batch, dim) if `pooled`."""
        if self.pooled:
            return (x_shape[0], self.width if embed_shape is None else embed_shape[-1])
        return (x_shape[0], self.tokenizer.length, self.width)

    def compute_output_spec(self, x, embed=None, context=None, training=None):
        """The specification of the output of `encode`."""
        shape = self.compute_output_shape(x.shape, None if embed is None else embed.shape)
        y = keras.KerasTensor(shape, self.compute_dtype)
        if self.pooled or not self.masked:
            return y
        return Encoded(tokens=y, mask=keras.KerasTensor(shape[:2], "bool"))


def _masked_mean(x, mask):
    """The mean of the unmasked tokens; 0 if there are none."""
    weights = ops.cast(mask, x.dtype)[..., None]
    return ops.sum(weights * x, axis=1) / ops.maximum(ops.sum(weights, axis=1), 1)


class EncodedText(OptionalCondition):
    """Embeddings of text from a frozen, pretrained encoder, such as CLIP's.

        EncodedText(HubText("clip_vit_base_patch32"), layer=keras.layers.Dense(256))

    The input is embeddings: it is fastest to compute `encoder(captions)` once before training. `fit` and `sample` also
    accept strings, which are encoded in each call.

    Args:
        encoder: a function from a list of strings to float32 embeddings, one row per string, such as
            `kdiff.text.HubText`; None to accept embeddings only. Its weights are not part of the model. An encoder with
            a configuration is saved with the model; any other must be set again after loading:
            `model.network.conditions["text"].encoder = encoder`.
        layer, absent, dropout, seed: as in `OptionalCondition`; `encoder([""])[0]` is a possible `absent`.
    """

    def __init__(
        self,
        encoder: Callable | None = None,
        layer: Any = None,
        absent: Any = None,
        dropout: float = 0.1,
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(layer, absent, dropout, seed, **kwargs)
        if isinstance(encoder, keras.layers.Layer) or not (encoder is None or callable(encoder)):
            raise TypeError(
                "EncodedText: `encoder` must be a function from a list of strings to an array, such as "
                f"`kdiff.text.HubText`; received: {encoder!r}"
            )
        self.encoder = encoder

    def get_config(self):
        """The arguments, with `encoder` only if it has a configuration."""
        encoder = self.encoder if isinstance(self.encoder, Configurable) else None
        return {**super().get_config(), "encoder": keras.saving.serialize_keras_object(encoder)}

    def prepare(self, values: Any) -> np.ndarray:
        """Converts strings to embeddings; embeddings are unchanged."""
        if not is_text(values):
            return np.asarray(values)
        if self.encoder is None:
            raise ValueError(
                "EncodedText: strings need an `encoder`, and this layer has none; pass embeddings, or set it: "
                "`layer.encoder = ...`"
            )
        return np.asarray(self.encoder(list(np.atleast_1d(np.asarray(values, dtype=object)))), "float32")
