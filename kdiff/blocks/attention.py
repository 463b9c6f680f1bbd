"""Attention between positions: on tokens, on maps, and from either to a context."""

from typing import Any

import keras
from keras import ops

from kdiff import backend
from kdiff.base import check_integer, check_number
from kdiff.blocks.base import (
    Block,
    apply_layer,
    build_layer,
    check_given,
    copy_layer,
    dropout_layer,
    kernel_initializer,
)


class MultiHeadAttention(Block):
    """Attention of tokens to tokens: `softmax(q k^T / sqrt(head_width)) v` in each head, then a dense layer.

    Vaswani et al., "Attention Is All You Need" (2017), equation 1 and section 3.2.2. Queries come from `x`; keys and
    values from `context` where it is given, else from `x`.

    Args:
        heads: the number of heads.
        head_width: the channels of a head. Of the two, one that is None follows from the other and the channels of
            `x`; with neither there is one head.
        bias: whether the projections to queries, keys and values have one.
        zero: whether the output layer is zero at first.

    Raises:
        ValueError: if the number given does not divide the channels of `x`.
    """

    def __init__(
        self,
        heads: int | None = None,
        head_width: int | None = None,
        bias: bool = True,
        zero: bool = False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_heads(self, heads, head_width)
        self.heads = heads
        self.head_width = head_width
        self.bias = bias
        self.zero = zero

    def build(self, x_shape, context_shape=None):
        """Builds the four projections."""
        if len(x_shape) != 3:
            raise ValueError(
                f"MultiHeadAttention: `x` must have the shape (batch, tokens, channels); received: {tuple(x_shape)}"
            )
        width = x_shape[-1]
        self._split = _split(self, width)
        inner = self._split[0] * self._split[1]
        source = x_shape if context_shape is None else context_shape
        self.query = self._dense("query", x_shape, inner, use_bias=self.bias)
        self.key = self._dense("key", source, inner, use_bias=self.bias)
        self.value = self._dense("value", source, inner, use_bias=self.bias)
        initializer = kernel_initializer(self.zero)
        self.output_layer = self._dense("output", (*x_shape[:-1], inner), width, kernel_initializer=initializer)

    def _dense(self, name, shape, width, **options):
        options = {"kernel_initializer": kernel_initializer(), **options}
        layer = keras.layers.Dense(width, name=name, dtype=self.dtype_policy, **options)
        layer.build(shape)
        return layer

    def call(self, x, embed=None, context=None, training=None):
        """(batch, tokens, channels), with `context` (batch, other tokens, dim) or None, to the shape of `x`."""
        source = x if context is None else context
        q, k, v = (self._in_heads(y) for y in (self.query(x), self.key(source), self.value(source)))
        y = backend.attention(q, k, v)
        return self.output_layer(ops.reshape(y, (*ops.shape(y)[:2], self._split[0] * self._split[1])))

    def _in_heads(self, x):
        return ops.reshape(x, (*ops.shape(x)[:2], *self._split))


def _split(layer: MultiHeadAttention, width: int) -> tuple[int, int]:
    """The number of heads and the width of each, of which one may follow from the other."""
    if layer.heads and layer.head_width:
        return layer.heads, layer.head_width
    name = "head_width" if layer.head_width else "heads"
    given = layer.head_width or layer.heads or 1
    if width % given:
        raise ValueError(
            f"{type(layer).__name__}: `{name}` must divide the {width} channels of `x`; received: {given}. "
            "Give both `heads` and `head_width` for heads whose widths do not add up to the channels."
        )
    return (width // given, given) if layer.head_width else (given, width // given)


def check_heads(layer: Block, heads: Any, head_width: Any) -> None:
    """Raises a ValueError unless both are None or whole numbers above zero."""
    for name, value in {"heads": heads, "head_width": head_width}.items():
        if value is not None:
            check_integer(type(layer).__name__, name, value)


class _Branch(Block):
    """A pre-normalised residual branch: `x + dropout(branch(norm(x, embed)))`, on maps and on tokens."""

    def _init(self, normalization, dropout, zero, seed):
        check_number(type(self).__name__, "dropout", dropout, 0, 1)
        self.normalization = copy_layer(normalization, name="normalization", dtype=self.dtype_policy)
        self.dropout = dropout
        self.zero = zero
        self.seed = seed

    def _build(self, x_shape, embed_shape):
        if len(x_shape) not in (3, 4):
            raise ValueError(
                f"{type(self).__name__}: `x` must be a map (batch, height, width, channels) or tokens "
                f"(batch, tokens, channels); received the shape: {tuple(x_shape)}"
            )
        build_layer(self.normalization, x_shape, embed_shape)
        self.drop = dropout_layer(self)

    def call(self, x, embed=None, context=None, training=None):
        """A map or tokens to the same; see the class for `embed` and `context`."""
        y = apply_layer(self.normalization, x, embed, training=training)
        return x + self.drop(self._branch(y, context), training=training)

    def _attend(self, x, context=None):
        tokens = ops.reshape(x, (ops.shape(x)[0], -1, x.shape[-1]))
        return ops.reshape(self.attention(tokens, context=context), ops.shape(x))


class SelfAttention(_Branch):
    """Attention of every position to every position, as a residual: `x + attention(norm(x))`.

    Ho et al. (2020), appendix B; heads as in Dhariwal & Nichol (2021), section 3. On a map (batch, height, width,
    channels) or tokens (batch, tokens, channels).

    Args:
        heads, head_width: as in `MultiHeadAttention`.
        normalization: a normalising layer or its name. An `AdaptiveNorm` uses `embed`.
        dropout: the rate of dropout on the residual.
        zero: whether the output layer is zero at first, so that the block starts as the identity.
        seed: of the dropout.
    """

    def __init__(
        self,
        heads: int | None = None,
        head_width: int | None = None,
        normalization: Any = "group_norm",
        dropout: float = 0.0,
        zero: bool = True,
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_heads(self, heads, head_width)
        self._init(normalization, dropout, zero, seed)
        self.heads = heads
        self.head_width = head_width

    def build(self, x_shape, embed_shape=None):
        """Builds the normalisation and the attention."""
        self._build(x_shape, embed_shape)
        self.attention = MultiHeadAttention(self.heads, self.head_width, zero=self.zero, dtype=self.dtype_policy)
        self.attention.build((x_shape[0], None, x_shape[-1]))

    def _branch(self, x, context):
        return self._attend(x)


class CrossAttention(_Branch):
    """Attention of every position to the tokens of a context, as a residual: `x + attention(norm(x), context)`.

    Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), section 3.3: queries from
    `x`, a map or tokens; keys and values from `context`, (batch, tokens, dim).

    Args:
        heads, head_width: as in `MultiHeadAttention`.
        normalization: a normalising layer or its name. An `AdaptiveNorm` uses `embed`.
        dropout: the rate of dropout on the residual.
        zero: whether the output layer is zero at first, so that the block starts as the identity.
        seed: of the dropout.

    Raises:
        ValueError: if `context` is not given.
    """

    def __init__(
        self,
        heads: int | None = None,
        head_width: int | None = None,
        normalization: Any = "layer_norm",
        dropout: float = 0.0,
        zero: bool = True,
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_heads(self, heads, head_width)
        self._init(normalization, dropout, zero, seed)
        self.heads = heads
        self.head_width = head_width

    def build(self, x_shape, embed_shape=None, context_shape=None):
        """Builds the normalisation and the attention."""
        check_given(self, "context", context_shape, "tokens of the shape (batch, tokens, dim)")
        self._build(x_shape, embed_shape)
        self.attention = MultiHeadAttention(self.heads, self.head_width, zero=self.zero, dtype=self.dtype_policy)
        self.attention.build((x_shape[0], None, x_shape[-1]), context_shape)

    def _branch(self, x, context):
        check_given(self, "context", context, "tokens of the shape (batch, tokens, dim)")
        return self._attend(x, context)
