"""Conditions that come as embeddings: of an image, for DALL-E 2's decoder; of a text's tokens, with a mask."""

from typing import Any

import keras
from keras import ops

from kdiff.base import check_integer
from kdiff.blocks.base import ConfigurableLayer, kernel_initializer
from kdiff.blocks.conditions import Encoded, Input, OptionalCondition
from kdiff.blocks.layers import Dense

__all__ = ["ImageEmbedding", "MaskedTokens"]


class ImageEmbedding(OptionalCondition):
    """An embedding of an image, such as CLIP's, as a vector beside the time and as a few tokens of the context:

        vector = W z + b,  tokens = reshape(W' z + b', (tokens, width))

    The decoder of Ramesh et al., "Hierarchical Text-Conditional Image Generation with CLIP Latents" (2022), section
    2.1, which loses it in 10 % of the examples in training, and the text in 50 %, each by itself: so their seeds
    must differ.

        conditions={"embedding": ImageEmbedding(128, dropout=0.1, seed=1), "text": TextEncoder(dropout=0.5, seed=2)}

    Args:
        width: of a token, that of the other tokens of the context.
        tokens: how many; 0 for the vector alone.
        absent, dropout, seed: as in `OptionalCondition`; what stands for absence is learned if `absent` is None.
    """

    def __init__(
        self, width: int = 128, tokens: int = 4, absent: Any = None, dropout: float = 0.1, seed: int = 1, **kwargs
    ):
        super().__init__(None, absent, dropout, seed, **kwargs)
        check_integer("ImageEmbedding", "width", width)
        check_integer("ImageEmbedding", "tokens", tokens, 0)
        self.width = width
        self.tokens = tokens

    @classmethod
    def _argument_defaults(cls):
        """Without the layer, which is its own."""
        return {name: default for name, default in super()._argument_defaults().items() if name != "layer"}

    def build(self, x_shape, embed_shape=None):
        """Makes the learned row and the two dense layers; the vector is as wide as `embed`, or as a token."""
        if len(x_shape) != 2:
            raise ValueError(f"ImageEmbedding: one vector an example is expected, (batch, dim); received: {x_shape}")
        super().build(x_shape)
        self._vector = self.width if embed_shape is None else embed_shape[-1]
        options = {"kernel_initializer": kernel_initializer(), "dtype": self.dtype_policy}
        self.to_vector = Dense(self._vector, name="to_vector", **options)
        self.to_vector.build(x_shape)
        if self.tokens:
            self.to_tokens = Dense(self.tokens * self.width, name="to_tokens", **options)
            self.to_tokens.build(x_shape)

    def encode(self, x, embed, training):
        """(batch, dim) to `Encoded`."""
        x = super().encode(x, embed, training)
        tokens = ops.reshape(self.to_tokens(x), (-1, self.tokens, self.width)) if self.tokens else None
        return Encoded(vector=self.to_vector(x), tokens=tokens)

    def compute_output_spec(self, x, embed=None, context=None, training=None):
        """The specification of what `encode` gives."""
        batch, width = x.shape[0], self.width if embed is None else embed.shape[-1]
        tokens = keras.KerasTensor((batch, self.tokens, self.width), self.compute_dtype) if self.tokens else None
        return Encoded(vector=keras.KerasTensor((batch, width), self.compute_dtype), tokens=tokens)


class MaskedTokens(ConfigurableLayer, keras.layers.Layer):
    """Tokens as they come, (batch, length, dim), with a mask that may be missing: of a condition "context", the input
    "context_mask", (batch, length), is not 0 for a token that is attended to.

    Args:
        kwargs: `name` and `dtype`.
    """

    def __init__(self, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.built = True

    def inputs_of(self, name: str) -> dict[str, Input]:
        """The tokens, and the mask, which may be missing."""
        return {name: Input("tokens", None), f"{name}_mask": Input("mask", None, True)}

    def call(self, x, training=None):
        """A dictionary of both to `Encoded`."""
        mask = x.get("mask")
        mask = None if mask is None else ops.not_equal(mask, ops.cast(0, mask.dtype))
        return Encoded(tokens=ops.cast(x["tokens"], self.compute_dtype), mask=mask)

    def compute_output_spec(self, x, training=None):
        """The specification of what `call` gives."""
        mask = None if x.get("mask") is None else keras.KerasTensor(x["mask"].shape, "bool")
        return Encoded(tokens=keras.KerasTensor(x["tokens"].shape, self.compute_dtype), mask=mask)
