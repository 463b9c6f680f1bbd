"""The block of MMDiT: image and text tokens, each with their own weights, under joint attention."""

import math
from typing import Any

import keras
from keras import ops

from kdiff.blocks.attention import MultiHeadAttention, SelfAttention, check_positions, opened, split_heads
from kdiff.blocks.base import (
    Block,
    Tokens,
    apply_layer,
    build_layer,
    check_given,
    copy_layer,
    derive_seed,
    get_layer,
)
from kdiff.blocks.patterns import Global
from kdiff.blocks.transformer import TransformerBlock

__all__ = ["JointBlock"]


class JointBlock(Block):
    """An MMDiT block: image and text have a `TransformerBlock` each, and one joint attention:

        y, z = split(softmax([q_x; q_c] [k_x; k_c]^T / sqrt(head_width)) [v_x; v_c])
        x' = x + gate_x W_x y,   x'' = feed_forward_x(x');    c' = c + gate_c W_c z,   c'' = feed_forward_c(c')

    with q_x, k_x, v_x from norm_x(x), and q_c, k_c, v_c from norm_c(c); norms and gates depend on `embed` if the
    template is adaptive and gated. Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image
    Synthesis" (2024), section 4 and figure 2b. `x` is a map (batch, height, width, channels) or tokens (batch, tokens,
    channels), the context tokens (batch, tokens, channels) with the same channels. Masked `Tokens` are not attended to.

    It returns a pair, `x''` and the context for the next block (with the mask, if any), and is therefore used in
    `MMDiT`, not in a `Chain` with other blocks.

    Args:
        block: a template of both `TransformerBlock`s, such as `adaptive_block(24, qk_norm="rms_norm")`.
        dual: whether the image has a second attention, to itself alone, with weights of its own, the result of which is
            added: `x' = x + gate_x W_x y + gate_d attention(norm_d(x))`, as in Stable Diffusion 3.5 medium.
        last: whether this is the last block, in which the text has only queries, keys and values. It returns no
            context.

    Raises:
        TypeError: if `block` is not a `TransformerBlock`.
        ValueError: if its attention is not global, or is rotary; if the context is missing or has other channels.
    """

    def __init__(self, block: Any, dual: bool = False, last: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.block = get_layer(block)
        if not isinstance(self.block, TransformerBlock):
            raise TypeError(f"JointBlock: `block` must be a TransformerBlock; received: {self.block!r}")
        if self.block.pattern != Global() or self.block.rotary is not None:
            raise ValueError(
                "JointBlock: joint attention is global and without rotary positions; received a `block` with "
                f"pattern={self.block.pattern!r}, rotary={self.block.rotary!r}"
            )
        self.dual = dual
        self.last = last

    def build(self, x_shape, embed_shape=None, context_shape=None):
        """Builds both blocks; in the last, only the used part of the text block."""
        check_positions(self, x_shape)
        tokens = opened(context_shape)[0]
        check_given(self, "context", tokens, "tokens of the shape (batch, tokens, channels)")
        if tokens[-1] != x_shape[-1]:
            raise ValueError(
                f"JointBlock: the tokens of the context must have {x_shape[-1]} channels, as `x` has; received the "
                f"shape: {tuple(tokens)}"
            )
        policy = {"dtype": self.dtype_policy}
        self.image = copy_layer(self.block, name="image", **policy)
        build_layer(self.image, x_shape, embed_shape)
        self.dual_attention = self._dual() if self.dual else None
        if self.dual:
            build_layer(self.dual_attention, x_shape, embed_shape)
        seed = derive_seed(self.block.seed, 3)
        self.text = None if self.last else copy_layer(self.block, name="text", seed=seed, **policy)
        if self.last:
            attention = self.image.self_attention
            self.text_norm = copy_layer(attention.normalization, name="text_norm", **policy)
            options = {"qk_norm": attention.qk_norm, "merge": False, "name": "text_attention", **policy}
            self.text_attention = MultiHeadAttention(attention.heads, attention.head_width, attention.bias, **options)
            build_layer(self.text_norm, tokens, embed_shape)
            build_layer(self.text_attention, tokens)
        else:
            build_layer(self.text, tokens, embed_shape)

    def _dual(self):
        attention = self.image.self_attention
        changes = {"name": "dual_attention", "seed": derive_seed(self.block.seed, 4), "dtype": self.dtype_policy}
        layer: SelfAttention = copy_layer(attention, **changes)
        return layer

    def call(self, x, embed=None, context=None, training=None):
        """Maps image and context to new ones (see the class). The context is None if this is the `last`."""
        tokens, mask = opened(context)
        check_given(self, "context", tokens, "tokens of the shape (batch, tokens, channels)")
        own = self.image.self_attention
        found, of_text = self._attended(own.normed(x, embed, training), self._text(tokens, embed, training), mask)
        y = own.residual(x, own.attention.merged(found, x), embed, training)
        if self.dual:
            beside = self.dual_attention
            y = beside.residual(y, beside.attention(beside.normed(x, embed, training)), embed, training)
        y = self.image.feed_forward(y, embed=embed, training=training)
        if self.last:
            return y, None
        theirs = self.text.self_attention
        tokens = theirs.residual(tokens, theirs.attention.merged(of_text, tokens), embed, training)
        tokens = self.text.feed_forward(tokens, embed=embed, training=training)
        return y, tokens if mask is None else Tokens(tokens, mask)

    def _text(self, tokens, embed, training):
        """Queries, keys and values of the text, split into heads."""
        if self.last:
            attention, normed = self.text_attention, apply_layer(self.text_norm, tokens, embed, training=training)
        else:
            attention, normed = (
                self.text.self_attention.attention,
                self.text.self_attention.normed(tokens, embed, training),
            )
        return attention.projected(normed, normed)

    def _attended(self, x, of_text, mask):
        """The joint attention of image positions and text tokens, in heads."""
        attention = self.image.self_attention.attention
        in_line = [ops.reshape(one, (ops.shape(one)[0], -1, *attention._split)) for one in attention.projected(x, x)]
        length = ops.shape(in_line[0])[1]
        q, k, v = (ops.concatenate(pair, axis=1) for pair in zip(in_line, of_text, strict=True))
        if mask is not None:
            seen = ops.ones((ops.shape(q)[0], length), "bool")
            mask = ops.concatenate([seen, ops.cast(mask, "bool")], axis=1)
        y = Global()(q, k, v, mask)
        return y[:, :length], y[:, length:]

    def compute_output_spec(self, x, embed=None, context=None, training=None):
        """The specifications of the image and the context."""
        tokens, mask = opened(context)
        image = keras.KerasTensor(x.shape, self.compute_dtype)
        if self.last:
            return image, None
        tokens = keras.KerasTensor(tokens.shape, self.compute_dtype)
        return image, tokens if mask is None else Tokens(tokens, mask)

    def multiply_adds(self, x_shape, embed_shape=None, context_shape=None):
        """The logits and the weighted sum of values, over both sequences."""
        tokens = opened(context_shape)[0]
        length = math.prod(x_shape[1:-1]) + tokens[1]
        return 2 * x_shape[0] * length**2 * math.prod(split_heads(self.block, x_shape[-1]))
