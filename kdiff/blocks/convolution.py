"""Convolutional blocks on maps, (batch, height, width, channels), or with one or three axes in their place."""

from typing import Any

import keras
from keras import ops

from kdiff.base import check_integer, check_number
from kdiff.blocks.base import (
    Block,
    Shape,
    apply_layer,
    build_layer,
    check_embed,
    check_map,
    copy_layer,
    dropout_layer,
    dropped,
    kernel_initializer,
    output_shape,
    over_positions,
    projection_of,
)
from kdiff.blocks.initializers import Normal
from kdiff.blocks.layers import Conv2D, Dense, DepthwiseConv2D
from kdiff.blocks.normalization import AdaptiveNorm, GroupNorm

__all__ = ["ConvBlock", "ConvNeXtBlock", "ResidualBlock", "SimpleBlock", "normalization_of"]


class ConvBlock(Block):
    """A convolution, a normalisation, an activation, in that order: `activation(norm(conv(x)) + W activation(embed))`.

    The order of Ioffe & Szegedy, "Batch Normalization" (2015), section 3.2. The last term is present if the block is
    built with an embedding.

    Args:
        width: the channels of the output; None keeps those of the input.
        kernel_size: of the convolution, with "same" padding.
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
        self.convolution = Conv2D(width, self.kernel_size, padding="same", **options)
        build_layer(self.normalization, build_layer(self.convolution, x_shape))
        self.projection = projection_of(self, embed_shape, width)

    def call(self, x, embed=None, context=None, training=None):
        """Maps (batch, height, width, channels) to `self.width` channels."""
        check_embed(self, embed)
        y = apply_layer(self.normalization, self.convolution(x), training=training)
        if embed is not None:
            y = y + over_positions(self.projection(self._activate(embed)), y)
        return self._activate(y)


class ResidualBlock(Block):
    """Two convolutions and a shortcut: `(x + conv(dropout(silu(norm'(conv(silu(norm(x)))))))) / rescale`.

    The embedding, if the block is built with one, enters between the convolutions: as the scale and shift of the second
    normalisation (Dhariwal & Nichol, 2021, equation 4) or as a sum before it (Ho et al., 2020, appendix B). The last
    convolution is initialised to zero, so that the block starts as its shortcut, which is the identity, or a 1x1
    convolution where the widths differ.

    With `resample` the block changes the size of the map in both branches (Brock et al., "Large Scale GAN Training",
    2019, appendix B; Song et al., NCSN++, 2021, appendix H): the shortcut uses `resample(x)`, and the first convolution
    is applied to `resample(silu(norm(x)))`.

    Args:
        width: the channels of the output; None keeps those of the input.
        scale_shift: whether the embedding gives a scale and shift (True) or is added (False); None passes it to both
            normalisations, such as `SpatialNorm`, instead.
        dropout: the rate of dropout before the last convolution.
        kernel_size: of both convolutions, with "same" padding.
        normalization: a normalising layer or its name.
        activation: a Keras activation.
        seed: for the dropout.
        resample: a layer without weights that changes the size, such as `Downsample("average")`, `FIRDownsample()` or
            `Upsample(convolution=False)`; None keeps the size.
        rescale: divides the sum; the square root of 2 keeps the variance of equal halves (Song et al., 2021).
        project: whether the shortcut is a 1x1 convolution even if the widths agree.
        embed_activation: applied to the embedding before its projection; None for `activation`, "linear" for none.

    Raises:
        ValueError: if `resample` has weights, or the block is built with an `embed` and called without, or vice versa.
    """

    def __init__(
        self,
        width: int | None = None,
        scale_shift: bool | None = True,
        dropout: float = 0.0,
        kernel_size: int = 3,
        normalization: Any = "group_norm",
        activation: Any = "silu",
        seed: int = 0,
        resample: Any = None,
        rescale: float = 1.0,
        project: bool = False,
        embed_activation: Any = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if width is not None:
            check_integer("ResidualBlock", "width", width)
        check_integer("ResidualBlock", "kernel_size", kernel_size)
        check_number("ResidualBlock", "dropout", dropout, 0, 1)
        check_number("ResidualBlock", "rescale", rescale, 1e-6)
        self.width = width
        self.scale_shift = scale_shift
        self.dropout = dropout
        self.kernel_size = kernel_size
        self.normalization = copy_layer(normalization, name="normalization", dtype=self.dtype_policy)
        self.activation = activation
        self.seed = seed
        self.resample = None if resample is None else copy_layer(resample, name="resample", dtype=self.dtype_policy)
        self.rescale = rescale
        self.project = project
        self.embed_activation = embed_activation
        self._activate = keras.activations.get(activation)
        self._embed_activation = activation if embed_activation is None else embed_activation
        self._activate_embed = keras.activations.get(self._embed_activation)

    def build(self, x_shape, embed_shape=None):
        """Builds both halves, and the projections of the embedding and of the shortcut if they are needed."""
        check_map(self, x_shape)
        self.embedded = embed_shape is not None
        width = self.width or x_shape[-1]
        build_layer(self.normalization, x_shape, self._steering(embed_shape))
        x_shape = self._resampled_shape(x_shape)
        inner_shape = (*x_shape[:-1], width)
        self.first = self._convolution(x_shape, width)
        self.second_normalization = normalization_of(self, inner_shape, embed_shape, self._embed_activation)
        self.projection = projection_of(self, embed_shape, width) if self.scale_shift is False else None
        self.drop = dropout_layer(self)
        self.second = self._convolution(inner_shape, width, zero=True)
        projected = self.project or width != x_shape[-1]
        self.shortcut = self._convolution(x_shape, width, kernel_size=1) if projected else None

    def _steering(self, embed):
        """The embedding (or its shape) as passed to the first normalisation."""
        return embed if self.scale_shift is None else None

    def _resampled_shape(self, x_shape):
        if self.resample is None:
            return x_shape
        shape = build_layer(self.resample, x_shape)
        if self.resample.weights or shape[-1] != x_shape[-1]:
            raise ValueError(
                "ResidualBlock: `resample` must have no weights, as both branches use it, and keep the channels; "
                f"received: {self.resample!r}"
            )
        return shape

    def compute_output_shape(self, x_shape, embed_shape=None, context_shape=None):
        """The shape of `x`, resampled, with `self.width` channels."""
        shape = x_shape if self.resample is None else output_shape(self.resample, x_shape)
        return (*shape[:-1], self.width or x_shape[-1])

    def _convolution(self, shape, width, kernel_size=None, zero=False):
        layer = Conv2D(
            width,
            kernel_size or self.kernel_size,
            padding="same",
            kernel_initializer=kernel_initializer(zero),
            dtype=self.dtype_policy,
        )
        layer.build(shape)
        return layer

    def call(self, x, embed=None, context=None, training=None):
        """Maps (batch, height, width, channels) to `self.width` channels; `embed` is (batch, dim) or None."""
        check_embed(self, embed)
        y = self._activate(apply_layer(self.normalization, x, self._steering(embed), training=training))
        if self.resample is not None:
            x, y = self.resample(x), self.resample(y)
        y = self.first(y)
        if self.projection is not None:
            y = y + over_positions(self.projection(self._activate_embed(embed)), y)
        y = self._activate(apply_layer(self.second_normalization, y, embed, training=training))
        y = self.second(dropped(self.drop, y, training))
        y = (x if self.shortcut is None else self.shortcut(x)) + y
        return y if self.rescale == 1 else y / self.rescale


def normalization_of(block: Block, shape: Shape, embed_shape: Shape | None, activation: Any = "silu"):
    """A built copy of the normalisation of a block; adaptive if the embedding scales and shifts it."""
    layer = copy_layer(block.normalization)
    if block.scale_shift and embed_shape is not None:
        layer = AdaptiveNorm(layer, activation, zero=False, dtype=block.dtype_policy)
    build_layer(layer, shape, embed_shape)
    return layer


class ConvNeXtBlock(Block):
    """A wide depthwise convolution, then two dense layers: `x + scale * W2 gelu(W1 norm(depthwise(x)))`.

    Liu et al., "A ConvNet for the 2020s" (2022), section 2.6 and figure 4. The embedding, if the block is built with
    one, scales and shifts the normalised values, or is added before the normalisation. The block starts as its
    shortcut, which is the identity, or a 1x1 convolution where the widths differ: its last layer is initialised to zero
    or, with `layer_scale`, is multiplied by a small number.

    Args:
        width: the channels of the output; None keeps those of the input.
        kernel_size: of the depthwise convolution.
        ratio: the hidden width as a multiple of `width`.
        scale_shift: whether the embedding gives a scale and shift (True) or is added (False).
        normalization: a normalising layer or its name.
        activation: a Keras activation.
        layer_scale: the initial value of `scale`, one number per channel (Touvron et al., "Going Deeper with Image
            Transformers", 2021, equation 4), 1e-6 in the paper; None for no scale.
    """

    def __init__(
        self,
        width: int | None = None,
        kernel_size: int = 7,
        ratio: int = 4,
        scale_shift: bool = True,
        normalization: Any = "layer_norm",
        activation: Any = "gelu",
        layer_scale: float | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        for name, value in {"width": width or 1, "kernel_size": kernel_size, "ratio": ratio}.items():
            check_integer("ConvNeXtBlock", name, value)
        if layer_scale is not None:
            check_number("ConvNeXtBlock", "layer_scale", layer_scale, 0)
        self.width = width
        self.kernel_size = kernel_size
        self.ratio = ratio
        self.scale_shift = scale_shift
        self.normalization = copy_layer(normalization, name="normalization", dtype=self.dtype_policy)
        self.activation = activation
        self.layer_scale = layer_scale
        self._activate = keras.activations.get(activation)

    def build(self, x_shape, embed_shape=None):
        """Builds the convolution, the dense layers, and the scale and the shortcut if they are needed."""
        check_map(self, x_shape)
        self.embedded = embed_shape is not None
        width = self.width or x_shape[-1]
        options = {"depthwise_initializer": Normal(1 / self.kernel_size), "dtype": self.dtype_policy}
        self.depthwise = DepthwiseConv2D(self.kernel_size, padding="same", **options)
        self.projection = None if self.scale_shift else projection_of(self, embed_shape, x_shape[-1])
        self.inner_normalization = normalization_of(self, x_shape, embed_shape)
        self.hidden = self._dense(x_shape, self.ratio * width)
        self.output_layer = self._dense((*x_shape[:-1], self.ratio * width), width, self.layer_scale is None)
        self.shortcut = None if width == x_shape[-1] else self._dense(x_shape, width)
        build_layer(self.depthwise, x_shape)
        if self.layer_scale is not None:
            initializer = keras.initializers.Constant(self.layer_scale)
            self.scale = self.add_weight(shape=(width,), initializer=initializer, name="scale")

    def _dense(self, shape, width, zero=False):
        layer = Dense(width, kernel_initializer=kernel_initializer(zero), dtype=self.dtype_policy)
        layer.build(shape)
        return layer

    def call(self, x, embed=None, context=None, training=None):
        """Maps (batch, height, width, channels) to `self.width` channels; `embed` is (batch, dim) or None."""
        check_embed(self, embed)
        y = self.depthwise(x)
        if self.projection is not None:
            y = y + over_positions(self.projection(ops.silu(embed)), y)
        y = self.hidden(apply_layer(self.inner_normalization, y, embed, training=training))
        y = self.output_layer(self._activate(y))
        y = y if self.layer_scale is None else y * ops.cast(self.scale, y.dtype)
        return (x if self.shortcut is None else self.shortcut(x)) + y


class SimpleBlock(Block):
    """The block of `SimpleUNet`: `W x + norm'(silu(conv'(norm(silu(conv(x))) + V silu(embed))))`.

    The convolutions are 3x3. `W` is a 1x1 convolution where the widths differ, and otherwise the identity. `V` is
    present if the block is built with an embedding.

    Args:
        width: the channels of the output, a multiple of `groups`; None keeps those of the input.
        groups: the number of groups of the group norms.
    """

    def __init__(self, width: int | None = None, groups: int = 8, **kwargs):
        super().__init__(**kwargs)
        if width is not None:
            check_integer("SimpleBlock", "width", width)
        self.width = width
        self.groups = groups
        self.first_norm = GroupNorm(groups, dtype=self.dtype_policy)
        self.second_norm = GroupNorm(groups, dtype=self.dtype_policy)

    def build(self, x_shape, embed_shape=None):
        """Builds the convolutions, the normalisations and the projection of the embedding, if any."""
        check_map(self, x_shape)
        self.embedded = embed_shape is not None
        width = self.width or x_shape[-1]
        inner_shape = (*x_shape[:-1], width)
        options = {"padding": "same", "kernel_initializer": kernel_initializer(), "dtype": self.dtype_policy}
        self.first = Conv2D(width, 3, **options)
        self.second = Conv2D(width, 3, **options)
        self.shortcut = None if width == x_shape[-1] else Conv2D(width, 1, **options)
        self.projection = projection_of(self, embed_shape, width)
        for layer, shape in ((self.first, x_shape), (self.second, inner_shape), (self.shortcut, x_shape)):
            if layer is not None:
                build_layer(layer, shape)
        for layer in (self.first_norm, self.second_norm):
            build_layer(layer, inner_shape)

    def call(self, x, embed=None, context=None, training=None):
        """Maps (batch, height, width, channels) to `self.width` channels; `embed` is (batch, dim) or None."""
        check_embed(self, embed)
        y = self.first_norm(ops.silu(self.first(x)))
        if embed is not None:
            y = y + over_positions(self.projection(ops.silu(embed)), y)
        y = self.second_norm(ops.silu(self.second(y)))
        return (x if self.shortcut is None else self.shortcut(x)) + y
