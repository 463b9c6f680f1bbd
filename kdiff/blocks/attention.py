"""Self-attention and cross-attention on maps and tokens, as layers and as residual blocks."""

import math
from typing import Any

import keras
from keras import ops

from kdiff import identity_attention, reuse
from kdiff.base import check_integer
from kdiff.blocks.base import (
    Block,
    Tokens,
    build_layer,
    check_given,
    copy_layer,
    kernel_initializer,
)
from kdiff.blocks.layers import Dense
from kdiff.blocks.patterns import Global, Pattern
from kdiff.blocks.positions import RelativePositions
from kdiff.blocks.residual import _Branch

__all__ = [
    "CrossAttention",
    "MultiHeadAttention",
    "SelfAttention",
    "check_heads",
    "check_positions",
    "opened",
    "split_heads",
    "usual_heads",
]


class MultiHeadAttention(Block):
    """Multi-head attention: `softmax(q k^T / sqrt(head_width)) v` in each head, then a dense layer.

    Vaswani et al., "Attention Is All You Need" (2017), equation 1 and section 3.2.2. On a map (batch, height, width,
    channels) or tokens (batch, tokens, channels). Queries come from `x`; keys and values from `context`, (batch,
    tokens, dim), if it is given, and otherwise from `x`. Masked `Tokens` are not attended to; a query all of whose keys
    are masked gets 0 from every head.

    Args:
        heads: the number of heads.
        head_width: the channels per head. If one of the two is None, it follows from the other and the channels of `x`;
            if both are, there is one head.
        bias: whether the projections to queries, keys and values have a bias.
        zero: whether the output layer is initialised to zero.
        pattern: a `Pattern` or its name: which positions of `x` attend to which. It does not apply to a context.
        qk_norm: a template of the normalisation of queries and keys in each head, such as "rms_norm", or None (Henry
            et al., "Query-Key Normalization for Transformers", 2020; Dehghani et al., 2023, section 2.1).
        rotary: `RelativePositions` or their name, applied to queries and keys after `qk_norm`, or None. Not for a
            context.
        output_bias: whether the output layer has a bias.
        merge: whether there is an output layer; without it the heads are concatenated.

    Raises:
        ValueError: if `heads` or `head_width` does not divide the channels of `x`, or the pattern or the positions do
            not fit the shape of `x`.
    """

    def __init__(
        self,
        heads: int | None = None,
        head_width: int | None = None,
        bias: bool = True,
        zero: bool = False,
        pattern: Any = "global",
        qk_norm: Any = None,
        rotary: Any = None,
        output_bias: bool = True,
        merge: bool = True,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_heads(self, heads, head_width)
        self.heads = heads
        self.head_width = head_width
        self.bias = bias
        self.output_bias = output_bias
        self.merge = merge
        self.zero = zero
        self.pattern = Pattern.get(pattern)
        self.qk_norm = None if qk_norm is None else copy_layer(qk_norm, name="qk_norm", dtype=self.dtype_policy)
        self.rotary = None if rotary is None else RelativePositions.get(rotary)
        self.beside, self.beside_count = None, 0

    @property
    def split(self) -> tuple[int, int]:
        """(heads, channels per head), once built."""
        return self._split

    def attend_beside(self, layer: keras.layers.Layer, count: int) -> None:
        """Adds the output of a layer, `layer(q, tokens)`, on the last `count` tokens of a context to the heads.

        The attention itself then sees only the other tokens. Called once, after `build`.
        """
        self._tracker.unlock()
        self.beside, self.beside_count = layer, count
        self._tracker.lock()

    def build(self, x_shape, context_shape=None):
        """Builds the four projections and the normalisations."""
        check_positions(self, x_shape)
        self._split = split_heads(self, x_shape[-1])
        inner = math.prod(self._split)
        context_shape = opened(context_shape)[0]
        source = x_shape if context_shape is None else context_shape
        if context_shape is None:
            self._check_positions(x_shape[1:-1])
        self.query = self._dense("query", x_shape, inner, use_bias=self.bias)
        self.key = self._dense("key", source, inner, use_bias=self.bias)
        self.value = self._dense("value", source, inner, use_bias=self.bias)
        self.query_norm = self._norm("query_norm", x_shape)
        self.key_norm = self._norm("key_norm", source)
        options = {"kernel_initializer": kernel_initializer(self.zero), "use_bias": self.output_bias}
        inner_shape = (*x_shape[:-1], inner)
        self.output_layer = self._dense("output", inner_shape, x_shape[-1], **options) if self.merge else None

    def _check_positions(self, sizes):
        self.pattern.check(sizes)
        if self.rotary is not None:
            self.rotary.check(len(sizes), self._split[1])

    def _dense(self, name, shape, width, **options):
        options = {"kernel_initializer": kernel_initializer(), **options}
        layer = Dense(width, name=name, dtype=self.dtype_policy, **options)
        layer.build(shape)
        return layer

    def _norm(self, name, shape):
        if self.qk_norm is None:
            return None
        layer = copy_layer(self.qk_norm, name=name)
        build_layer(layer, (*shape[:-1], *self._split))
        return layer

    def call(self, x, embed=None, context=None, training=None):
        """Maps `x`, with `context` (batch, other tokens, dim), `Tokens` or None, to the shape of `x`."""
        bias = context.bias if isinstance(context, Tokens) else None
        context, mask = opened(context)
        tokens, count = context, -self.beside_count
        if self.beside is not None:
            context, mask = context[:, :count], None if mask is None else mask[:, :count]
        source = x if context is None else context
        q, k, v = self.projected(x, source)
        if context is None and self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        if context is None and identity_attention.is_on(self.path):
            y = v
        else:
            given = {name: one for name, one in {"mask": mask, "bias": bias}.items() if one is not None}
            y = (self.pattern if context is None else Global())(q, k, v, **given)
        if self.beside is not None:
            y = y + self.beside(q, tokens[:, count:])
        return self.merged(y, x)

    def projected(self, x, source):
        """(queries of `x`, keys of `source`, values of `source`) in heads, (..., heads, head_width), normalised."""
        q = self._in_heads(self.query(x), self.query_norm)

        def keys_and_values():
            return self._in_heads(self.key(source), self.key_norm), self._in_heads(self.value(source))

        if source is x:
            return q, *keys_and_values()
        return q, *reuse.once("context", self, source, keys_and_values)

    def merged(self, y, x):
        """The output layer, applied to the outputs of the heads at each position of `x`."""
        y = ops.reshape(y, (*ops.shape(x)[:-1], math.prod(self._split)))
        return self.output_layer(y) if self.merge else y

    def _in_heads(self, x, norm=None):
        x = ops.reshape(x, (*ops.shape(x)[:-1], *self._split))
        return x if norm is None else norm(x)

    def multiply_adds(self, x_shape, embed_shape=None, context_shape=None):
        """The products `q k` and the weighted sum of `v`."""
        context_shape = opened(context_shape)[0]
        sizes, (heads, width) = x_shape[1:-1], split_heads(self, x_shape[-1])
        keys = self.pattern.keys(sizes, width) if context_shape is None else context_shape[1]
        return 2 * math.prod(x_shape[:-1]) * keys * heads * width


def opened(context: Any) -> tuple[Any, Any]:
    """(values, mask) of a context, or their shapes; either may be None."""
    return context[:2] if isinstance(context, Tokens) else (context, None)


def split_heads(layer: Block, width: int) -> tuple[int, int]:
    """The number of heads and the channels per head; either may follow from the other."""
    if layer.heads and layer.head_width:
        return layer.heads, layer.head_width
    name = "head_width" if layer.head_width else "heads"
    given = layer.head_width or layer.heads or 1
    if width % given:
        raise ValueError(
            f"{type(layer).__name__}: `{name}` must divide the {width} channels of `x`; received: {given}. "
            "Give both `heads` and `head_width` if the widths of the heads do not add up to the channels."
        )
    return (width // given, given) if layer.head_width else (given, width // given)


def usual_heads(width: int) -> int:
    """The largest number of heads of equal width with at least 64 channels each."""
    return max(heads for heads in range(1, max(1, width // 64) + 1) if width % heads == 0)


def check_heads(layer: Block, heads: Any, head_width: Any) -> None:
    """Raises a ValueError unless both are None or positive integers."""
    for name, value in {"heads": heads, "head_width": head_width}.items():
        if value is not None:
            check_integer(type(layer).__name__, name, value)


def check_positions(layer: Block, shape: Any) -> None:
    """Raises a ValueError unless `shape` is that of a map or of tokens."""
    if len(shape) not in (3, 4, 5):
        raise ValueError(
            f"{type(layer).__name__}: `x` must be a map (batch, height, width, channels) or tokens "
            f"(batch, tokens, channels); received the shape: {tuple(shape)}"
        )


class SelfAttention(_Branch):
    """Attention of every position to every position, as a residual: `x + attention(norm(x))`.

    Ho et al. (2020), appendix B; heads as in Dhariwal & Nichol (2021), section 3. On a map (batch, height, width,
    channels) or tokens (batch, tokens, channels). A `context` `Tokens(None, mask, bias)` gives the mask and bias of
    `x`.

    Args:
        heads, head_width, bias, pattern, qk_norm, rotary, output_bias: as in `MultiHeadAttention`.
        normalization: a normalising layer or its name. An `AdaptiveNorm` uses `embed`.
        dropout: the rate of dropout on the residual.
        zero: whether the output layer, or the gate, is initialised to zero, so that the block starts as the identity.
        gated: whether the residual is multiplied by a gate computed from `embed`.
        drop_path: the probability with which the residual of an example is dropped in training; the others are divided
            by 1 - drop_path (Huang et al., "Deep Networks with Stochastic Depth", 2016).
        rescale: divides the sum.
        seed: for the dropouts.

    Raises:
        ValueError: if `gated` and no `embed` is given; as in `MultiHeadAttention`.
    """

    def __init__(
        self,
        heads: int | None = None,
        head_width: int | None = None,
        normalization: Any = "group_norm",
        *,
        bias: bool = True,
        pattern: Any = "global",
        qk_norm: Any = None,
        rotary: Any = None,
        output_bias: bool = True,
        **options,
    ):
        super().__init__(normalization, **options)
        check_heads(self, heads, head_width)
        self.heads = heads
        self.head_width = head_width
        self.bias = bias
        self.output_bias = output_bias
        self.pattern = Pattern.get(pattern)
        self.qk_norm = None if qk_norm is None else copy_layer(qk_norm, name="qk_norm", dtype=self.dtype_policy)
        self.rotary = None if rotary is None else RelativePositions.get(rotary)

    def _build_branch(self, x_shape, context_shape):
        check_positions(self, x_shape)
        options = {name: getattr(self, name) for name in ("pattern", "qk_norm", "rotary", "output_bias")}
        self.attention = _attention(self, **options)
        self.attention.build(x_shape)

    def _branch(self, x, context):
        own = context if isinstance(context, Tokens) and context.values is None else None
        return self.attention(x, context=own)


class CrossAttention(_Branch):
    """Attention of every position to the tokens of a context, as a residual: `x + attention(norm(x), context)`.

    Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), section 3.3: queries from
    `x`, a map or tokens; keys and values from `context`, (batch, tokens, dim).

    Args:
        heads, head_width, bias, qk_norm, output_bias: as in `MultiHeadAttention`.
        normalization, dropout, zero, gated, drop_path, rescale, seed: as in `SelfAttention`.

    Raises:
        ValueError: if `context` is missing, or `embed` if `gated`.
    """

    def __init__(
        self,
        heads: int | None = None,
        head_width: int | None = None,
        normalization: Any = "layer_norm",
        *,
        bias: bool = True,
        qk_norm: Any = None,
        output_bias: bool = True,
        **options,
    ):
        super().__init__(normalization, **options)
        check_heads(self, heads, head_width)
        self.heads = heads
        self.head_width = head_width
        self.bias = bias
        self.output_bias = output_bias
        self.qk_norm = None if qk_norm is None else copy_layer(qk_norm, name="qk_norm", dtype=self.dtype_policy)

    def _build_branch(self, x_shape, context_shape):
        check_given(self, "context", opened(context_shape)[0], "tokens of the shape (batch, tokens, dim)")
        check_positions(self, x_shape)
        self.attention = _attention(self, qk_norm=self.qk_norm, output_bias=self.output_bias)
        self.attention.build(x_shape, context_shape)

    def _branch(self, x, context):
        check_given(self, "context", opened(context)[0], "tokens of the shape (batch, tokens, dim)")
        return self.attention(x, context=context)


def _attention(branch, **options):
    """The attention layer of a residual branch."""
    zero, policy = branch.starts_at_zero, branch.dtype_policy
    return MultiHeadAttention(branch.heads, branch.head_width, branch.bias, zero, dtype=policy, **options)
