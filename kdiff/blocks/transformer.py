"""Transformer blocks on tokens and on maps, and the stack of them used in U-Nets."""

from functools import partial
from typing import Any

import keras
from keras import ops

from kdiff import backend
from kdiff.base import check_integer, check_number
from kdiff.blocks.attention import (
    CrossAttention,
    SelfAttention,
    check_heads,
    check_positions,
    opened,
    split_heads,
)
from kdiff.blocks.base import (
    Block,
    apply_layer,
    build_layer,
    copy_layer,
    derive_seed,
    get_layer,
    kernel_initializer,
)
from kdiff.blocks.layers import Dense
from kdiff.blocks.normalization import AdaptiveNorm, GroupNorm, LayerNorm
from kdiff.blocks.patterns import Pattern
from kdiff.blocks.positions import RelativePositions
from kdiff.blocks.residual import _Branch

__all__ = ["FeedForward", "SpatialTransformer", "TransformerBlock", "adaptive_block", "check_ratio", "get_activation"]


class FeedForward(_Branch):
    """Two dense layers at each position, as a residual: `x + W2 activation(W1 norm(x) + b1) + b2`.

    Vaswani et al. (2017), equation 2. With `glu` the output of the first layer has two halves, and the hidden vector is
    `value * activation(gate)`, that is, GEGLU with "gelu" and SwiGLU with "silu" (Shazeer, "GLU Variants Improve
    Transformer", 2020, equations 5 and 6). On a map (batch, height, width, channels), tokens (batch, tokens, channels)
    or vectors (batch, channels).

    Args:
        ratio: the hidden width as a multiple of the channels, rounded down.
        activation: a Keras activation, where "gelu" is exact, or its approximations "gelu_tanh" and "quick_gelu".
        normalization: a normalising layer or its name. An `AdaptiveNorm` uses `embed`.
        glu: whether half of the first layer's output gates the other half. The value comes first.
        bias: whether both layers have a bias.
        dropout, zero, gated, drop_path, rescale, seed: as in `SelfAttention`; `zero` applies to the last layer.

    Raises:
        ValueError: if `gated` and no `embed` is given.
    """

    def __init__(
        self,
        ratio: float = 4,
        activation: Any = "gelu",
        normalization: Any = "layer_norm",
        *,
        glu: bool = False,
        bias: bool = True,
        **options,
    ):
        super().__init__(normalization, **options)
        check_ratio(self, ratio)
        self.ratio = ratio
        self.activation = activation
        self.glu = glu
        self.bias = bias
        self._activate = get_activation(activation)

    def _build_branch(self, x_shape, context_shape):
        width, hidden = x_shape[-1], max(1, int(self.ratio * x_shape[-1]))
        first, last = kernel_initializer(), kernel_initializer(self.starts_at_zero)
        options = {"use_bias": self.bias, "dtype": self.dtype_policy}
        self.hidden = Dense((1 + self.glu) * hidden, kernel_initializer=first, name="hidden", **options)
        self.output_layer = Dense(width, kernel_initializer=last, name="output", **options)
        self.hidden.build(x_shape)
        self.output_layer.build((*x_shape[:-1], hidden))

    def _branch(self, x, context):
        *values, gate = ops.split(self.hidden(x), 1 + self.glu, axis=-1)
        hidden = self._activate(gate)
        return self.output_layer(values[0] * hidden if values else hidden)


def get_activation(identifier: Any):
    """A Keras activation, or an approximation of `gelu`: "gelu_tanh", or `x sigmoid(1.702 x)`, "quick_gelu".

    Both are from Hendrycks & Gimpel, "Gaussian Error Linear Units" (2016), section 2.
    """
    approximations = {"gelu_tanh": backend.gelu_tanh, "quick_gelu": _quick_gelu}
    if isinstance(identifier, str) and identifier in approximations:
        return approximations[identifier]
    return keras.activations.get(identifier)


def _quick_gelu(x):
    return x * ops.sigmoid(1.702 * x)


def check_ratio(layer: Block, ratio: Any) -> None:
    """Raises a ValueError unless `ratio` is a positive number."""
    check_number(type(layer).__name__, "ratio", ratio, 1e-6)


class TransformerBlock(Block):
    """Self-attention, cross-attention if the block is built with a context, and a feed-forward layer.

    Each is a pre-normalised residual (Xiong et al., "On Layer Normalization in the Transformer
    Architecture", 2020, table 1). On tokens (batch, tokens, channels), or a map (batch, height, width, channels),
    whose positions are the tokens.

    DiT's block (Peebles & Xie, 2022, section 3.2) is `adaptive` and `gated`, with
    `normalization=LayerNorm(1e-6, affine=False)` and "gelu_tanh"; the block of Stable Diffusion (Rombach et al., 2022,
    appendix E.2.1) has `bias=False`, `glu=True` and a context.

    Args:
        heads, head_width, bias, pattern, qk_norm, rotary: as in `MultiHeadAttention`.
        ratio, activation, glu: as in `FeedForward`.
        normalization: a normalising layer or its name, or a list with one per residual.
        adaptive: whether `embed` scales and shifts each normalisation.
        gated, drop_path, rescale: as in `SelfAttention`, of each residual.
        dropout: the rate of dropout on each residual.
        zero: whether the last layer, or the gate, of each residual is initialised to zero, so that the block starts as
            the identity.
        seed: for the dropouts.
        output_bias: whether the output layer of the attention, and both layers of the feed-forward layer, have a bias.
        only_context: whether the first attention is also to the context instead of to `x`, if there is a context.

    Raises:
        ValueError: if `adaptive` or `gated` and no `embed` is given, or a block that was built with a context is called
            without one; if the length of a list of normalisations is not the number of residuals.
    """

    def __init__(
        self,
        heads: int | None = None,
        head_width: int | None = None,
        ratio: float = 4,
        activation: Any = "gelu",
        normalization: Any = "layer_norm",
        adaptive: bool = False,
        gated: bool = False,
        pattern: Any = "global",
        qk_norm: Any = None,
        rotary: Any = None,
        bias: bool = True,
        glu: bool = False,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        rescale: float = 1.0,
        zero: bool = True,
        seed: int = 0,
        output_bias: bool = True,
        only_context: bool = False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_heads(self, heads, head_width)
        check_ratio(self, ratio)
        self.heads = heads
        self.head_width = head_width
        self.ratio = ratio
        self.activation = activation
        self.normalization = normalization
        self.adaptive = adaptive
        self.gated = gated
        self.pattern = Pattern.get(pattern)
        self.qk_norm = qk_norm
        self.rotary = None if rotary is None else RelativePositions.get(rotary)
        self.bias = bias
        self.glu = glu
        self.dropout = dropout
        self.drop_path = drop_path
        self.rescale = rescale
        self.zero = zero
        self.seed = seed
        self.output_bias = output_bias
        self.only_context = only_context

    def build(self, x_shape, embed_shape=None, context_shape=None):
        """Builds the two or three residuals."""
        attention = self._arguments("heads", "head_width", "bias", "qk_norm", "output_bias")
        own = self._arguments("pattern", "rotary")
        crossed = opened(context_shape)[0] is not None
        first = CrossAttention if crossed and self.only_context else partial(SelfAttention, **own)
        norms = self._norms(3 if crossed else 2)
        self.self_attention = first(**attention, **self._shared(0, norms[0]))
        self.cross_attention = CrossAttention(**attention, **self._shared(1, norms[1])) if crossed else None
        hidden = {**self._arguments("ratio", "activation", "glu"), "bias": self.output_bias}
        self.feed_forward = FeedForward(**hidden, **self._shared(2, norms[-1]))
        for branch in self._branches():
            build_layer(branch, x_shape, embed_shape, context_shape)

    def _arguments(self, *names):
        return {name: getattr(self, name) for name in names}

    def _norms(self, count):
        norms = self.normalization if isinstance(self.normalization, list | tuple) else [self.normalization] * count
        if len(norms) != count:
            raise ValueError(f"{self.name}: `normalization` must be one, or a list of {count}; received {len(norms)}")
        return norms

    def _shared(self, index, norm):
        return {
            **self._arguments("dropout", "zero", "gated", "drop_path", "rescale"),
            "normalization": AdaptiveNorm(norm, dtype=self.dtype_policy) if self.adaptive else norm,
            "seed": derive_seed(self.seed, index),
            "dtype": self.dtype_policy,
        }

    def _branches(self):
        branches = (self.self_attention, self.cross_attention, self.feed_forward)
        return [branch for branch in branches if branch is not None]

    def call(self, x, embed=None, context=None, training=None):
        """Maps a map or tokens to the same shape; for `embed` and `context` see the class."""
        for branch in self._branches():
            x = branch(x, embed=embed, context=context, training=training)
        return x


def adaptive_block(heads: int | None = None, head_width: int | None = None, **options) -> TransformerBlock:
    """DiT's adaLN-Zero block: a `TransformerBlock` with these options whose scale, shift and gate come from `embed`."""
    defaults = {"normalization": LayerNorm(1e-6, affine=False), "activation": "gelu_tanh"}
    return TransformerBlock(heads, head_width, **{**defaults, "adaptive": True, "gated": True, **options})


class SpatialTransformer(Block):
    """Transformer blocks between two dense layers, with a residual connection: `x + W2 blocks(W1 norm(x) + b1) + b2`.

    Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), appendix E.2.1. On a map
    (batch, height, width, channels), where the dense layers are 1x1 convolutions, or tokens (batch, tokens, channels).

    Args:
        depth: the number of blocks.
        heads, head_width: of the blocks, whose width is their product; a None is inferred as in `MultiHeadAttention`.
        block: a template of the blocks; None for Stable Diffusion's, `TransformerBlock(bias=False, glu=True)`.
        normalization: a normalising layer or its name; None for `GroupNorm(epsilon=1e-6)`.
        zero: whether the last dense layer is initialised to zero, so that the block starts as the identity.
        seed: from which the seed of each block is derived.

    Raises:
        ValueError: as raised by the blocks.
    """

    def __init__(
        self,
        depth: int = 1,
        heads: int | None = None,
        head_width: int | None = None,
        block: Any = None,
        normalization: Any = None,
        zero: bool = True,
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_integer("SpatialTransformer", "depth", depth)
        check_heads(self, heads, head_width)
        self.depth = depth
        self.heads = heads
        self.head_width = head_width
        self.block = TransformerBlock(bias=False, glu=True, zero=False) if block is None else get_layer(block)
        normalization = GroupNorm(epsilon=1e-6) if normalization is None else normalization
        self.normalization = copy_layer(normalization, name="normalization", dtype=self.dtype_policy)
        self.zero = zero
        self.seed = seed

    def build(self, x_shape, embed_shape=None, context_shape=None):
        """Builds the normalisation, the dense layers and the blocks."""
        check_positions(self, x_shape)
        split = split_heads(self, x_shape[-1])
        inner_shape = (*x_shape[:-1], split[0] * split[1])
        build_layer(self.normalization, x_shape, embed_shape)
        self.projection_in = self._dense(x_shape, inner_shape[-1])
        self.blocks = [self._copy(i, *split) for i in range(self.depth)]
        for block in self.blocks:
            build_layer(block, inner_shape, embed_shape, context_shape)
        self.projection_out = self._dense(inner_shape, x_shape[-1], self.zero)

    def _dense(self, shape, width, zero=False):
        layer = Dense(width, kernel_initializer=kernel_initializer(zero), dtype=self.dtype_policy)
        layer.build(shape)
        return layer

    def _copy(self, index, heads, head_width):
        """A copy of the template, with those of these arguments that it accepts."""
        wanted = {"heads": heads, "head_width": head_width, "seed": derive_seed(self.seed, index)}
        changes = {name: value for name, value in wanted.items() if name in self.block.get_config()}
        return copy_layer(self.block, dtype=self.dtype_policy, **changes)

    def call(self, x, embed=None, context=None, training=None):
        """Maps a map or tokens to the same shape; `embed` and `context` are passed to the blocks."""
        y = self.projection_in(apply_layer(self.normalization, x, embed, training=training))
        for block in self.blocks:
            y = apply_layer(block, y, embed, context, training)
        return x + self.projection_out(y)
