"""The transformer's encoder block, on tokens and on maps."""

from typing import Any

import keras

from kdiff.base import check_integer
from kdiff.blocks.attention import CrossAttention, SelfAttention, _Branch, check_heads
from kdiff.blocks.base import Block, build_layer, derive_seed, kernel_initializer
from kdiff.blocks.normalization import AdaptiveNorm


class FeedForward(_Branch):
    """Two dense layers at each position, as a residual: `x + W2 activation(W1 norm(x) + b1) + b2`.

    Vaswani et al. (2017), equation 2. On a map (batch, height, width, channels) or tokens (batch, tokens, channels).

    Args:
        ratio: the hidden width as a multiple of the channels.
        activation: a Keras activation.
        normalization: a normalising layer or its name. An `AdaptiveNorm` uses `embed`.
        dropout: the rate of dropout on the residual.
        zero: whether the last layer is zero at first, so that the block starts as the identity.
        seed: of the dropout.
    """

    def __init__(
        self,
        ratio: int = 4,
        activation: Any = "gelu",
        normalization: Any = "layer_norm",
        dropout: float = 0.0,
        zero: bool = True,
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_integer("FeedForward", "ratio", ratio)
        self._init(normalization, dropout, zero, seed)
        self.ratio = ratio
        self.activation = activation

    def build(self, x_shape, embed_shape=None):
        """Builds the normalisation and the two dense layers."""
        self._build(x_shape, embed_shape)
        width, policy = x_shape[-1], self.dtype_policy
        first, last = kernel_initializer(), kernel_initializer(self.zero)
        self.hidden = keras.layers.Dense(self.ratio * width, self.activation, kernel_initializer=first, dtype=policy)
        self.output_layer = keras.layers.Dense(width, kernel_initializer=last, dtype=policy)
        build_layer(self.output_layer, build_layer(self.hidden, x_shape))

    def _branch(self, x, context):
        return self.output_layer(self.hidden(x))


class TransformerBlock(Block):
    """Self-attention, attention to the context if the block is built with one, and a feed-forward layer.

    Each is a residual after its own normalisation (Xiong et al., "On Layer Normalization in the Transformer
    Architecture", 2020, table 1). On tokens (batch, tokens, channels), or a map (batch, height, width, channels),
    whose positions are the tokens.

    Args:
        heads, head_width: as in `MultiHeadAttention`.
        ratio: the hidden width of the feed-forward layer as a multiple of the channels.
        activation: of the feed-forward layer.
        normalization: a normalising layer or its name.
        adaptive: whether `embed` scales and shifts each normalisation; otherwise it is ignored.
        dropout: the rate of dropout on each residual.
        zero: whether the last layer of each residual is zero at first, so that the block starts as the identity.
        seed: of the dropouts.

    Raises:
        ValueError: if `adaptive` and no `embed` is given, or one built with a context is called without.
    """

    def __init__(
        self,
        heads: int | None = None,
        head_width: int | None = None,
        ratio: int = 4,
        activation: Any = "gelu",
        normalization: Any = "layer_norm",
        adaptive: bool = False,
        dropout: float = 0.0,
        zero: bool = True,
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_heads(self, heads, head_width)
        check_integer("TransformerBlock", "ratio", ratio)
        self.heads = heads
        self.head_width = head_width
        self.ratio = ratio
        self.activation = activation
        self.normalization = normalization
        self.adaptive = adaptive
        self.dropout = dropout
        self.zero = zero
        self.seed = seed

    def build(self, x_shape, embed_shape=None, context_shape=None):
        """Builds the two or three residuals."""
        heads = {"heads": self.heads, "head_width": self.head_width}
        self.self_attention = SelfAttention(**heads, **self._shared(0))
        self.cross_attention = CrossAttention(**heads, **self._shared(1)) if context_shape is not None else None
        self.feed_forward = FeedForward(self.ratio, self.activation, **self._shared(2))
        for branch in self._branches():
            build_layer(branch, x_shape, embed_shape, context_shape)

    def _shared(self, index):
        norm = self.normalization
        return {
            "normalization": AdaptiveNorm(norm, dtype=self.dtype_policy) if self.adaptive else norm,
            "dropout": self.dropout,
            "zero": self.zero,
            "seed": derive_seed(self.seed, index),
            "dtype": self.dtype_policy,
        }

    def _branches(self):
        branches = (self.self_attention, self.cross_attention, self.feed_forward)
        return [branch for branch in branches if branch is not None]

    def call(self, x, embed=None, context=None, training=None):
        """A map or tokens to the same; see the class for `embed` and `context`."""
        for branch in self._branches():
            x = branch(x, embed=embed, context=context, training=training)
        return x
