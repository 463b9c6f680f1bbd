"""Attention between positions: on tokens, on maps, and from either to a context; and the residual branch around it."""

import math
from typing import Any

import keras
from keras import ops

from kdiff import backend, identity_attention
from kdiff.base import check_integer, check_number
from kdiff.blocks.base import (
    Block,
    Tokens,
    apply_layer,
    build_layer,
    check_given,
    copy_layer,
    derive_seed,
    dropout_layer,
    dropped,
    kernel_initializer,
    over_positions,
)
from kdiff.blocks.layers import Dense
from kdiff.blocks.patterns import Global, Pattern
from kdiff.blocks.positions import RelativePositions

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
    """Attention of positions to positions: `softmax(q k^T / sqrt(head_width)) v` in each head, then a dense layer.

    Vaswani et al., "Attention Is All You Need" (2017), equation 1 and section 3.2.2. On a map (batch, height, width,
    channels) or tokens (batch, tokens, channels). Queries come from `x`; keys and values from `context`, (batch,
    tokens, dim), where it is given, else from `x`. What the mask of `Tokens` hides is not attended to; who sees nothing
    at all gets 0 from the heads.

    Args:
        heads: the number of heads.
        head_width: the channels of a head. Of the two, one that is None follows from the other and the channels of
            `x`; with neither there is one head.
        bias: whether the projections to queries, keys and values have one.
        zero: whether the output layer is zero at first.
        pattern: a `Pattern` or its name: which positions of `x` attend to which. All attend to all of a context.
        qk_norm: a template of the normalisations of each head's queries and keys, such as "rms_norm", or None (Henry
            et al., "Query-Key Normalization for Transformers", 2020; Dehghani et al., 2023, section 2.1).
        rotary: `RelativePositions` or their name, applied after that to queries and keys, or None. A context has none.
        output_bias: whether the output layer has a bias.
        merge: whether there is an output layer; without it the heads stay side by side.

    Raises:
        ValueError: if the number given does not divide the channels of `x`, or the pattern or the positions do not suit
            the shape of `x`.
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
        """(heads, channels of a head) of a built one."""
        return self._split

    def attend_beside(self, layer: keras.layers.Layer, count: int) -> None:
        """Lets a layer, `layer(q, tokens)`, add to the heads what it makes of the last `count` tokens of a context.

        The attention itself is then to the others. Call it once, when this is built.
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
        """A map or tokens, with `context` (batch, other tokens, dim), `Tokens` or None, to the shape of `x`."""
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
        k = self._in_heads(self.key(source), self.key_norm)
        return q, k, self._in_heads(self.value(source))

    def merged(self, y, x):
        """The output layer of what the heads have found for each position of `x`."""
        y = ops.reshape(y, (*ops.shape(x)[:-1], math.prod(self._split)))
        return self.output_layer(y) if self.merge else y

    def _in_heads(self, x, norm=None):
        x = ops.reshape(x, (*ops.shape(x)[:-1], *self._split))
        return x if norm is None else norm(x)

    def multiply_adds(self, x_shape, embed_shape=None, context_shape=None):
        """Those of `q k` and of the weighted sum of `v`."""
        context_shape = opened(context_shape)[0]
        sizes, (heads, width) = x_shape[1:-1], split_heads(self, x_shape[-1])
        keys = self.pattern.keys(sizes, width) if context_shape is None else context_shape[1]
        return 2 * math.prod(x_shape[:-1]) * keys * heads * width


def opened(context: Any) -> tuple[Any, Any]:
    """(values, mask) of a context, either of which may be None; or their shapes."""
    return context[:2] if isinstance(context, Tokens) else (context, None)


def split_heads(layer: Block, width: int) -> tuple[int, int]:
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


def usual_heads(width: int) -> int:
    """As many heads as there can be, equally wide and of 64 channels or more."""
    return max(heads for heads in range(1, max(1, width // 64) + 1) if width % heads == 0)


def check_heads(layer: Block, heads: Any, head_width: Any) -> None:
    """Raises a ValueError unless both are None or whole numbers above zero."""
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


class _Branch(Block):
    """A pre-normalised residual: `(x + drop_path(gate * dropout(branch(norm(x, embed))))) / rescale`.

    A subclass names its own arguments and passes the others, `**options`, to this constructor; in `_build_branch` it
    builds its layers, whose last is zero at first if `self.starts_at_zero`; `_branch` calls them. With `gated`, as in
    AdaLN-Zero (Peebles & Xie, "Scalable Diffusion Models with Transformers", 2022, section 3.2),
    `gate = Dense(silu(embed))` and is zero at first in place of the branch's last layer: were both, neither would
    learn.
    """

    def __init__(
        self,
        normalization: Any = "layer_norm",
        dropout: float = 0.0,
        zero: bool = True,
        gated: bool = False,
        drop_path: float = 0.0,
        rescale: float = 1.0,
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_number(type(self).__name__, "dropout", dropout, 0, 1)
        check_number(type(self).__name__, "drop_path", drop_path, 0, 1)
        check_number(type(self).__name__, "rescale", rescale, 1e-6)
        self.normalization = copy_layer(normalization, name="normalization", dtype=self.dtype_policy)
        self.dropout = dropout
        self.zero = zero
        self.gated = gated
        self.drop_path = drop_path
        self.rescale = rescale
        self.seed = seed

    @classmethod
    def _argument_defaults(cls):
        """The subclass's own arguments, then those that it passes on."""
        own, shared = super()._argument_defaults(), super(_Branch, _Branch)._argument_defaults()
        return own | {name: default for name, default in shared.items() if name not in own}

    @property
    def starts_at_zero(self) -> bool:
        """Whether the last layer of the branch is zero at first."""
        return self.zero and not self.gated

    def build(self, x_shape, embed_shape=None, context_shape=None):
        """Builds the normalisation, the branch and, if there is one, the gate."""
        self._build_branch(x_shape, context_shape)
        build_layer(self.normalization, x_shape, embed_shape)
        self.drop = dropout_layer(self)
        self.gate = self._build_gate(x_shape[-1], embed_shape) if self.gated else None
        of_examples = {"noise_shape": (None, *[1] * (len(x_shape) - 1)), "seed": derive_seed(self.seed, 1)}
        self.drop_example = keras.layers.Dropout(self.drop_path, dtype=self.dtype_policy, **of_examples)

    def _build_gate(self, width, embed_shape):
        check_given(self, "embed", embed_shape, "one vector an example, for the gate")
        initializer = kernel_initializer(self.zero)
        layer = Dense(width, name="gate", kernel_initializer=initializer, dtype=self.dtype_policy)
        layer.build(embed_shape)
        return layer

    def call(self, x, embed=None, context=None, training=None):
        """A map or tokens to the same; see the class for `embed` and `context`."""
        return self.residual(x, self._branch(self.normed(x, embed, training), context), embed, training)

    def normed(self, x, embed=None, training=None):
        """What the branch takes of `x`."""
        return apply_layer(self.normalization, x, embed, training=training)

    def residual(self, x, y, embed=None, training=None):
        """`x` with what the branch has made, `y`."""
        y = dropped(self.drop_example, dropped(self.drop, y, training), training)
        if self.gate is None:
            y = x + y
        else:
            check_given(self, "embed", embed, "one vector an example, for the gate")
            y = backend.scaled(y, over_positions(self.gate(ops.silu(embed)), x), x)
        return y if self.rescale == 1 else y / self.rescale


class SelfAttention(_Branch):
    """Attention of every position to every position, as a residual: `x + attention(norm(x))`.

    Ho et al. (2020), appendix B; heads as in Dhariwal & Nichol (2021), section 3. On a map (batch, height, width,
    channels) or tokens (batch, tokens, channels). Where `context` is `Tokens(None, mask, bias)`, they are those of `x`.

    Args:
        heads, head_width, bias, pattern, qk_norm, rotary, output_bias: as in `MultiHeadAttention`.
        normalization: a normalising layer or its name. An `AdaptiveNorm` uses `embed`.
        dropout: the rate of dropout on the residual.
        zero: whether the output layer, or the gate, is zero at first, so that the block starts as the identity.
        gated: whether the residual is multiplied by a gate that `embed` gives.
        drop_path: the probability that an example's residual is dropped whole in training; those kept are divided by
            1 - drop_path (Huang et al., "Deep Networks with Stochastic Depth", 2016).
        rescale: divides the sum.
        seed: of the dropouts.

    Raises:
        ValueError: if `gated` and no `embed` is given; of `MultiHeadAttention`.
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
        ValueError: if `context` is not given, or `gated` and no `embed`.
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
    """The attention of a residual."""
    zero, policy = branch.starts_at_zero, branch.dtype_policy
    return MultiHeadAttention(branch.heads, branch.head_width, branch.bias, zero, dtype=policy, **options)
