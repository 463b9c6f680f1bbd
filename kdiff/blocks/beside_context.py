"""Image prompts: decoupled attention to the tokens of an image, and the resampler that makes such tokens."""

import keras
from keras import ops

from kdiff.base import check_integer
from kdiff.blocks.base import Block, build_layer, kernel_initializer
from kdiff.blocks.context_attention import ContextAttention
from kdiff.blocks.layers import Dense
from kdiff.blocks.lookup import LearnedEmbedding
from kdiff.blocks.normalization import LayerNorm
from kdiff.blocks.patterns import Global
from kdiff.blocks.transformer import FeedForward

__all__ = ["DecoupledAttention", "PerceiverResampler"]


class DecoupledAttention(keras.layers.Layer):
    """A term added to the heads of an attention to text: `scale softmax(q k'^T / sqrt(head_width)) v'`.

    Ye et al., "IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models" (2023), equations
    4 and 5: queries from the attention, keys k' and values v' from the tokens of an image, without bias.
    `scale` is a weight, initially 1. None of the weights is trained.

    Args:
        heads, head_width: of the attention.
        kwargs: `name` and `dtype`.
    """

    frozen = True

    def __init__(self, heads: int, head_width: int, **kwargs):
        super().__init__(**kwargs)
        self.split = (heads, head_width)

    def build(self, shape):
        """Creates the projections of tokens (batch, tokens, dim) to keys and values."""
        width, options = self.split[0] * self.split[1], {"use_bias": False, "dtype": self.dtype_policy}
        self.key = Dense(width, kernel_initializer=kernel_initializer(), name="key", **options)
        self.value = Dense(width, kernel_initializer=kernel_initializer(), name="value", **options)
        for layer in (self.key, self.value):
            build_layer(layer, shape)
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale", dtype="float32")
        self.trainable = False
        for weight in self.weights:
            weight.averaged = False

    def call(self, q, tokens):
        """Maps queries (batch, ..., heads, head_width) and tokens (batch, tokens, dim) to the shape of the queries."""
        k, v = (ops.reshape(layer(tokens), (*ops.shape(tokens)[:2], *self.split)) for layer in (self.key, self.value))
        return ops.cast(self.scale, q.dtype) * Global()(q, k, v)


class PerceiverResampler(Block):
    """The perceiver resampler: any number of tokens to `count` tokens, by `depth` rounds of

        y <- y + attention(norm(y), [norm'(W_in x); norm(y)]),  y <- y + W2 gelu(W1 norm(y)),  finally norm(W_out y)

    from learned initial y. Alayrac et al., "Flamingo" (2022), figure 5 and appendix A.1.1, in the form of IP-Adapter
    Plus (Ye et al., 2023).

    Args:
        count: the number of output tokens.
        width: the width of the tokens y.
        out_width: the width of the output tokens.
        depth: the number of rounds.
        heads: of the attention.
        head_width: the channels per head.
        ratio: the hidden width of the feed-forward layers as a multiple of `width`.
    """

    formerly = ("kdiff.blocks>Resampler",)

    def __init__(
        self,
        count: int = 16,
        width: int = 768,
        out_width: int = 768,
        depth: int = 4,
        heads: int = 12,
        head_width: int = 64,
        ratio: float = 4,
        **kwargs,
    ):
        super().__init__(**kwargs)
        sizes = {"count": count, "width": width, "out_width": out_width, "depth": depth}
        for name, value in sizes.items():
            check_integer("PerceiverResampler", name, value)
        self.count = count
        self.width = width
        self.out_width = out_width
        self.depth = depth
        self.heads = heads
        self.head_width = head_width
        self.ratio = ratio

    def build(self, x_shape):
        """Creates all weights, for tokens (batch, tokens, dim)."""
        policy = {"dtype": self.dtype_policy}
        inner, own = (*x_shape[:2], self.width), (x_shape[0], self.count, self.width)
        self.learned = LearnedEmbedding(stddev=self.width**-0.5, name="learned", **policy)
        self.projection_in = Dense(self.width, name="projection_in", **policy)
        self.projection_out = Dense(self.out_width, name="projection_out", **policy)
        self.norm = LayerNorm(name="norm", **policy)
        build_layer(self.learned, own)
        build_layer(self.projection_in, x_shape)
        norm = LayerNorm()
        options = {"bias": False, "context_normalization": norm, "zero": False, **policy}
        hidden = {"bias": False, "zero": False, **policy}
        self.attention = [ContextAttention(self.heads, self.head_width, norm, **options) for _ in range(self.depth)]
        self.feed_forward = [FeedForward(self.ratio, "gelu", norm, **hidden) for _ in range(self.depth)]
        for attention, feed_forward in zip(self.attention, self.feed_forward, strict=True):
            build_layer(attention, own, None, inner)
            build_layer(feed_forward, own)
        build_layer(self.norm, build_layer(self.projection_out, own))

    def call(self, x, embed=None, context=None, training=None):
        """Maps (batch, tokens, dim) to (batch, count, out_width)."""
        x = self.projection_in(ops.cast(x, self.compute_dtype))
        y = self.learned(ops.zeros((ops.shape(x)[0], self.count, self.width), x.dtype))
        for attention, feed_forward in zip(self.attention, self.feed_forward, strict=True):
            y = feed_forward(attention(y, context=x, training=training), training=training)
        return self.norm(self.projection_out(y))

    def compute_output_shape(self, x_shape, embed_shape=None, context_shape=None):
        """(batch, count, out_width)."""
        return (x_shape[0], self.count, self.out_width)
