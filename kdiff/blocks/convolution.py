"""Convolutional blocks on maps, (batch, height, width, channels)."""

from typing import Any

import keras

from kdiff.base import check_integer, check_number
from kdiff.blocks.base import (
    Block,
    apply_layer,
    build_layer,
    check_embed,
    check_map,
    copy_layer,
    dropout_layer,
    kernel_initializer,
    over_positions,
    projection_of,
)
from kdiff.blocks.normalization import AdaptiveNorm


class ConvBlock(Block):
    """A convolution, a normalisation, an activation, in that order: `activation(norm(conv(x)) + W activation(embed))`.

    The order of Ioffe & Szegedy, "Batch Normalization" (2015), section 3.2. The last term is there if the block is
    built with an embedding.

    Args:
        width: the channels of the output; None keeps those of the input.
        kernel_size: of the convolution, whose padding keeps the size.
        normalization: a normalising layer or its name.
        activation: a Keras activation.
    """

    def __init__(
        self,
        width: int | None = None,
        kernel_size: int = 3,
        normalization: Any = "group_norm",
        activation: Any = "silu",
        **kwargs,
    ):
        super().__init__(**kwargs)
        if width is not None:
            check_integer("ConvBlock", "width", width)
        check_integer("ConvBlock", "kernel_size", kernel_size)
        self.width = width
        self.kernel_size = kernel_size
        self.normalization = copy_layer(normalization, name="normalization", dtype=self.dtype_policy)
        self.activation = activation
        self._activate = keras.activations.get(activation)

    def build(self, x_shape, embed_shape=None):
        """Builds the convolution, the normalisation and, if there is an embedding, its projection."""
        check_map(self, x_shape)
        self.embedded = embed_shape is not None
        width = self.width or x_shape[-1]
        options = {"kernel_initializer": kernel_initializer(), "dtype": self.dtype_policy}
        self.convolution = keras.layers.Conv2D(width, self.kernel_size, padding="same", **options)
        build_layer(self.normalization, build_layer(self.convolution, x_shape))
        self.projection = projection_of(self, embed_shape, width)

    def call(self, x, embed=None, context=None, training=None):
        """(batch, height, width, channels) to the same with `self.width` channels."""
        check_embed(self, embed)
        y = apply_layer(self.normalization, self.convolution(x), training=training)
        if embed is not None:
            y = y + over_positions(self.projection(self._activate(embed)), y)
        return self._activate(y)


class ResidualBlock(Block):
    """Two convolutions and a shortcut: `x + conv(dropout(silu(norm'(conv(silu(norm(x)))))))`.

    The embedding, if the block is built with one, enters between the convolutions: as the scale and shift of the second
    normalisation (Dhariwal & Nichol, 2021, equation 4) or added before it (Ho et al., 2020, appendix B). The last
    convolution is zero at first, so the block starts as its shortcut, which is the identity, or a 1x1
    convolution where the widths differ.

    Args:
        width: the channels of the output; None keeps those of the input.
        scale_shift: whether the embedding scales and shifts (True) or is added (False).
        dropout: the rate of dropout before the last convolution.
        kernel_size: of both convolutions, whose padding keeps the size.
        normalization: a normalising layer or its name.
        activation: a Keras activation.
        seed: of the dropout.
    """

    def __init__(
        self,
        width: int | None = None,
        scale_shift: bool = True,
        dropout: float = 0.0,
        kernel_size: int = 3,
        normalization: Any = "group_norm",
        activation: Any = "silu",
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if width is not None:
            check_integer("ResidualBlock", "width", width)
        check_integer("ResidualBlock", "kernel_size", kernel_size)
        check_number("ResidualBlock", "dropout", dropout, 0, 1)
        self.width = width
        self.scale_shift = scale_shift
        self.dropout = dropout
        self.kernel_size = kernel_size
        self.normalization = copy_layer(normalization, name="normalization", dtype=self.dtype_policy)
        self.activation = activation
        self.seed = seed
        self._activate = keras.activations.get(activation)

    def build(self, x_shape, embed_shape=None):
        """Builds both halves, the projection of the embedding, if there is one, and the shortcut, if it is needed."""
        check_map(self, x_shape)
        self.embedded = embed_shape is not None
        width = self.width or x_shape[-1]
        inner_shape = (*x_shape[:-1], width)
        build_layer(self.normalization, x_shape)
        self.first = self._convolution(x_shape, width)
        self.second_normalization = self._second_normalization(inner_shape, embed_shape)
        self.projection = None if self.scale_shift else projection_of(self, embed_shape, width)
        self.drop = dropout_layer(self)
        self.second = self._convolution(inner_shape, width, zero=True)
        self.shortcut = None if width == x_shape[-1] else self._convolution(x_shape, width, kernel_size=1)

    def _convolution(self, shape, width, kernel_size=None, zero=False):
        layer = keras.layers.Conv2D(
            width,
            kernel_size or self.kernel_size,
            padding="same",
            kernel_initializer=kernel_initializer(zero),
            dtype=self.dtype_policy,
        )
        layer.build(shape)
        return layer

    def _second_normalization(self, shape, embed_shape):
        layer = copy_layer(self.normalization)
        if self.scale_shift and embed_shape is not None:
            layer = AdaptiveNorm(layer, self.activation, zero=False, dtype=self.dtype_policy)
        build_layer(layer, shape, embed_shape)
        return layer

    def call(self, x, embed=None, context=None, training=None):
        """(batch, height, width, channels) to the same with `self.width` channels; `embed` is (batch, dim) or None."""
        check_embed(self, embed)
        y = self.first(self._activate(apply_layer(self.normalization, x, training=training)))
        if self.projection is not None:
            y = y + over_positions(self.projection(self._activate(embed)), y)
        y = self._activate(apply_layer(self.second_normalization, y, embed, training=training))
        y = self.second(self.drop(y, training=training))
        return (x if self.shortcut is None else self.shortcut(x)) + y
