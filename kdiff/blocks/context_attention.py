"""Joint attention to oneself and to a context, and attention pooling."""

import math
from typing import Any

from keras import ops

from kdiff import reuse
from kdiff.blocks.attention import check_heads, check_positions, opened, split_heads
from kdiff.blocks.base import Block, apply_layer, build_layer, check_given, copy_layer, kernel_initializer
from kdiff.blocks.layers import Dense
from kdiff.blocks.lookup import LearnedEmbedding
from kdiff.blocks.patterns import Global
from kdiff.blocks.residual import _Branch

__all__ = ["AttentionPool", "ContextAttention"]


class ContextAttention(_Branch):
    """Attention of every position to the tokens of a context and to all positions at once, as a residual.

        x + W softmax(q [k_c; k]^T / sqrt(head_width)) [v_c; v],    q, k, v from norm(x), and k_c, v_c from
        norm'(context)

    Nichol et al., "GLIDE" (2022), section 4; also in Imagen, DeepFloyd IF, DALL-E 2 and Kandinsky. On a map (batch,
    height, width, channels) or tokens (batch, tokens, channels). Masked `Tokens` are not attended to.

    Args:
        heads, head_width, bias: as in `MultiHeadAttention`.
        normalization: the normalising layer of `x`, or its name.
        context_normalization: a template of the normalising layer of the context, or its name; None for none.
        only_context: whether `k` and `v` are left out, so that `x` attends to the context alone.
        dropout, zero, gated, drop_path, rescale, seed: as in `SelfAttention`.

    Raises:
        ValueError: if `context` is missing, or `embed` if `gated`.
    """

    def __init__(
        self,
        heads: int | None = None,
        head_width: int | None = None,
        normalization: Any = "group_norm",
        *,
        bias: bool = True,
        context_normalization: Any = None,
        only_context: bool = False,
        **options,
    ):
        super().__init__(normalization, **options)
        check_heads(self, heads, head_width)
        self.heads = heads
        self.head_width = head_width
        self.bias = bias
        norm = context_normalization
        norm = None if norm is None else copy_layer(norm, name="context_normalization", dtype=self.dtype_policy)
        self.context_normalization = norm
        self.only_context = only_context

    def _build_branch(self, x_shape, context_shape):
        context_shape = opened(context_shape)[0]
        check_given(self, "context", context_shape, "tokens of the shape (batch, tokens, dim)")
        check_positions(self, x_shape)
        self._split = split_heads(self, x_shape[-1])
        inner = math.prod(self._split)
        if self.context_normalization is not None:
            build_layer(self.context_normalization, context_shape)
        self.query = self._dense("query", x_shape, inner)
        self.key, self.value = (
            None if self.only_context else self._dense(name, x_shape, inner) for name in ("key", "value")
        )
        self.context_key = self._dense("context_key", context_shape, inner)
        self.context_value = self._dense("context_value", context_shape, inner)
        last = kernel_initializer(self.starts_at_zero)
        self.output_layer = self._dense("output", (*x_shape[:-1], inner), x_shape[-1], True, last)

    def _dense(self, name, shape, width, bias=None, initializer=None):
        options = {"use_bias": self.bias if bias is None else bias, "dtype": self.dtype_policy, "name": name}
        layer = Dense(width, kernel_initializer=initializer or kernel_initializer(), **options)
        layer.build(shape)
        return layer

    def _branch(self, x, context):
        context, mask = opened(context)
        check_given(self, "context", context, "tokens of the shape (batch, tokens, dim)")
        k, v = reuse.once("context", self, context, lambda: self._of_context(context))
        if not self.only_context:
            k = ops.concatenate([k, self._in_heads(self.key(x))], axis=1)
            v = ops.concatenate([v, self._in_heads(self.value(x))], axis=1)
        q = ops.reshape(self.query(x), (*ops.shape(x)[:-1], *self._split))
        y = Global()(q, k, v, self._mask(mask, k))
        return self.output_layer(ops.reshape(y, (*ops.shape(x)[:-1], math.prod(self._split))))

    def _of_context(self, context):
        """Keys and values."""
        if self.context_normalization is not None:
            context = apply_layer(self.context_normalization, context)
        return self._in_heads(self.context_key(context)), self._in_heads(self.context_value(context))

    def _in_heads(self, x):
        """Reshapes a map or tokens to (batch, tokens, heads, head_width)."""
        return ops.reshape(x, (ops.shape(x)[0], -1, *self._split))

    def _mask(self, mask, k):
        """The mask of the context, extended by True for every position of `x`."""
        if mask is None:
            return None
        mask = ops.cast(mask, "bool")
        return ops.concatenate([mask, ops.ones((ops.shape(k)[0], ops.shape(k)[1] - ops.shape(mask)[1]), "bool")], 1)

    def multiply_adds(self, x_shape, embed_shape=None, context_shape=None):
        """The logits and the weighted sum of values."""
        keys = opened(context_shape)[0][1] + (0 if self.only_context else math.prod(x_shape[1:-1]))
        return 2 * math.prod(x_shape[:-1]) * keys * math.prod(split_heads(self, x_shape[-1]))


class AttentionPool(Block):
    """Attention pooling of tokens to one vector: their mean plus a learned vector attends to itself and to them.

        softmax(q k^T / sqrt(head_width)) v,    q from m = mean(x) + p, and k, v from [m; x]

    The pooling of the text in DeepFloyd IF, after Radford et al., "CLIP" (2021), section 2.4, without the output layer
    of `MultiHeadAttention`.

    Args:
        heads: the number of heads, which must divide the channels.
    """

    def __init__(self, heads: int = 64, **kwargs):
        super().__init__(**kwargs)
        check_heads(self, heads, None)
        self.heads = heads

    head_width = None

    def build(self, x_shape):
        """Builds the learned vector and the three projections."""
        self._split, width = split_heads(self, x_shape[-1]), x_shape[-1]
        self.position = LearnedEmbedding(stddev=width**-0.5, dtype=self.dtype_policy)
        self.position.build((x_shape[0], 1, width))
        for name in ("query", "key", "value"):
            layer = Dense(width, kernel_initializer=kernel_initializer(), dtype=self.dtype_policy, name=name)
            layer.build(x_shape)
            setattr(self, name, layer)

    def call(self, x, embed=None, context=None, training=None):
        """Maps (batch, tokens, dim) to (batch, dim)."""
        mean = self.position(ops.mean(x, axis=1, keepdims=True))
        x = ops.concatenate([mean, x], axis=1)
        q, k, v = (self._in_heads(layer(y)) for layer, y in ((self.query, mean), (self.key, x), (self.value, x)))
        return ops.reshape(Global()(q, k, v), (ops.shape(x)[0], x.shape[-1]))

    def _in_heads(self, x):
        return ops.reshape(x, (*ops.shape(x)[:-1], *self._split))

    def compute_output_shape(self, x_shape, embed_shape=None, context_shape=None):
        """(batch, dim)."""
        return (x_shape[0], x_shape[-1])

    def multiply_adds(self, x_shape, embed_shape=None, context_shape=None):
        """The logits and the weighted sum of values."""
        return 2 * math.prod(x_shape) + 2 * x_shape[-1]
