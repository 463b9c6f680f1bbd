"""Normalisations, with statistics in float32 at any precision, and adaptive ones, steered by an embedding or a map."""

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
    kernel_initializer,
    over_positions,
)
from kdiff.blocks.layers import Dense

__all__ = ["AdaptiveNorm", "GroupNorm", "LayerNorm", "RMSNorm", "SpatialNorm"]


class GroupNorm(Block):
    """Group normalisation, over each group of channels: `gamma (x - mean) / sqrt(var + epsilon) + beta`.

    Wu & He, "Group Normalization" (2018), equations 1, 2 and 7. The default epsilon is PyTorch's, not Keras'.

    Args:
        groups: the number of groups, which must divide the channels. None takes the largest number, at most 32, with at
            least four channels per group: a group of one channel would cancel an embedding added just before.
        epsilon: added to the variance.
        affine: whether `gamma` and `beta` are learned.
    """

    def __init__(self, groups: int | None = None, epsilon: float = 1e-5, affine: bool = True, **kwargs):
        super().__init__(**kwargs)
        if groups is not None:
            check_integer("GroupNorm", "groups", groups)
        check_number("GroupNorm", "epsilon", epsilon, 0)
        self.groups = groups
        self.epsilon = epsilon
        self.affine = affine

    def build(self, x_shape):
        """Creates `gamma` and `beta`, (channels,)."""
        channels = x_shape[-1]
        divisors = [g for g in range(1, channels + 1) if channels % g == 0]
        if self.groups is not None and self.groups not in divisors:
            raise ValueError(
                f"GroupNorm: `groups` must divide the {channels} channels, that is, be one of {divisors} or None; "
                f"received: {self.groups}"
            )
        self.groups_used = self.groups or max(g for g in divisors if g == 1 or g <= min(32, channels // 4))
        self.gamma = self.add_weight(shape=(channels,), initializer="ones", name="gamma") if self.affine else None
        self.beta = self.add_weight(shape=(channels,), initializer="zeros", name="beta") if self.affine else None

    def call(self, x, embed=None, context=None, training=None):
        """Maps (batch, ..., channels) to the same shape."""
        return backend.group_norm(x, self.groups_used, self.gamma, self.beta, self.epsilon)


class LayerNorm(Block):
    """Layer normalisation, over the channels at each position: `gamma (x - mean) / sqrt(var + epsilon) + beta`.

    Ba, Kiros & Hinton, "Layer Normalization" (2016), equation 4, over the last axis.

    Args:
        epsilon: added to the variance.
        affine: whether `gamma` and `beta` are learned.
    """

    def __init__(self, epsilon: float = 1e-5, affine: bool = True, **kwargs):
        super().__init__(**kwargs)
        check_number("LayerNorm", "epsilon", epsilon, 0)
        self.epsilon = epsilon
        self.affine = affine

    def build(self, x_shape):
        """Creates `gamma` and `beta`, (channels,)."""
        channels = x_shape[-1:]
        self.gamma = self.add_weight(shape=channels, initializer="ones", name="gamma") if self.affine else None
        self.beta = self.add_weight(shape=channels, initializer="zeros", name="beta") if self.affine else None

    def call(self, x, embed=None, context=None, training=None):
        """Maps (..., channels) to the same shape."""
        return backend.layer_norm(x, self.gamma, self.beta, self.epsilon)


class RMSNorm(Block):
    """Root mean square normalisation, over the channels at each position: `gamma x / sqrt(mean(x^2) + epsilon)`.

    Zhang & Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4, over the last axis.

    Args:
        epsilon: added to the mean square.
        affine: whether `gamma` is learned.
    """

    def __init__(self, epsilon: float = 1e-6, affine: bool = True, **kwargs):
        super().__init__(**kwargs)
        check_number("RMSNorm", "epsilon", epsilon, 0)
        self.epsilon = epsilon
        self.affine = affine

    def build(self, x_shape):
        """Creates `gamma`, (channels,)."""
        self.gamma = self.add_weight(shape=x_shape[-1:], initializer="ones", name="gamma") if self.affine else None

    def call(self, x, embed=None, context=None, training=None):
        """Maps (..., channels) to the same shape."""
        y = ops.cast(x, "float32")
        y = y * ops.rsqrt(ops.mean(ops.square(y), axis=-1, keepdims=True) + self.epsilon)
        return ops.cast(y * ops.cast(self.gamma, "float32") if self.affine else y, x.dtype)


class AdaptiveNorm(Block):
    """A normalisation whose scale and shift come from the embedding: `norm(x) (1 + scale) + shift`.

    `scale, shift = Dense(activation(embed))`. Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis"
    (2021), equation 4 (AdaGN, on a group norm); Peebles & Xie, "Scalable Diffusion Models with Transformers" (2022),
    section 3.2 (adaLN, on a layer norm that is not affine).

    Args:
        normalization: a normalising layer or its name.
        activation: applied to the embedding first; None if it is already activated.
        zero: whether scale and shift are initialised to zero, so that this starts as the plain normalisation.

    Raises:
        ValueError: if `embed` is not given.
    """

    def __init__(self, normalization: Any = "group_norm", activation: Any = "silu", zero: bool = True, **kwargs):
        super().__init__(**kwargs)
        self.normalization = copy_layer(normalization, name="normalization", dtype=self.dtype_policy)
        self.activation = activation
        self.zero = zero
        self._activate = keras.activations.get(activation)

    def build(self, x_shape, embed_shape=None):
        """Builds the normalisation and the projection of the embedding to scale and shift."""
        check_given(self, "embed", embed_shape, "one vector per example")
        build_layer(self.normalization, x_shape)
        self.projection = Dense(
            2 * x_shape[-1], kernel_initializer=kernel_initializer(self.zero), dtype=self.dtype_policy
        )
        self.projection.build(embed_shape)

    def call(self, x, embed=None, context=None, training=None):
        """Maps `x`, (batch, ..., channels), and `embed`, (batch, dim), to the shape of `x`."""
        check_given(self, "embed", embed, "one vector per example")
        scale, shift = ops.split(over_positions(self.projection(self._activate(embed)), x), 2, axis=-1)
        return backend.scaled(apply_layer(self.normalization, x, training=training), 1 + scale, shift)


class SpatialNorm(Block):
    """A normalisation whose scale and shift at each position come from a map: `norm(x) (W z + b) + W' z + b'`.

    Zheng et al., "MoVQ: Modulating Quantized Vectors for High-Fidelity Image Generation" (2022), section 3.2: z is the
    vector at the nearest position of a map, which may be smaller, given as `embed`, (batch, height, width, dim).

    Args:
        normalization: a normalising layer or its name.

    Raises:
        ValueError: if `embed` is not given, or is not a map.
    """

    def __init__(self, normalization: Any = "group_norm", **kwargs):
        super().__init__(**kwargs)
        self.normalization = copy_layer(normalization, name="normalization", dtype=self.dtype_policy)

    def build(self, x_shape, embed_shape=None):
        """Builds the normalisation and the two dense layers."""
        if embed_shape is None or len(embed_shape) != len(x_shape):
            raise ValueError(f"SpatialNorm: `embed` must be a map, as `x`, {tuple(x_shape)}; received: {embed_shape}")
        build_layer(self.normalization, x_shape)
        options = {"kernel_initializer": kernel_initializer(), "dtype": self.dtype_policy}
        self.scale = Dense(x_shape[-1], bias_initializer="ones", name="scale", **options)
        self.shift = Dense(x_shape[-1], name="shift", **options)
        for layer in (self.scale, self.shift):
            layer.build(embed_shape)

    def call(self, x, embed=None, context=None, training=None):
        """Maps `x`, (batch, ..., channels), and a map `embed`, (batch, ..., dim), to the shape of `x`."""
        check_given(self, "embed", embed, "a map")
        scale, shift = (_nearest(layer(embed), x) for layer in (self.scale, self.shift))
        return backend.scaled(apply_layer(self.normalization, x, training=training), scale, shift)


def _nearest(z, x):
    """A map, resized to the positions of `x` by nearest neighbour."""
    for axis in range(1, len(x.shape) - 1):
        size, own = ops.shape(x)[axis], ops.shape(z)[axis]
        z = ops.take(z, ops.arange(size) * own // size, axis=axis)
    return z
