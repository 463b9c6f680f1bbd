"""Magnitude-preserving layers: inputs of unit variance give outputs of unit variance, throughout training.

Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2, 2024). Without normalisation
in the network the growth of the weights in training makes activations grow too, and the effective learning rate decay.
So every operation is divided by the standard deviation of its output for independent inputs of unit variance:

    weights         w / |w| for each output                    equation 47
    silu            silu(x) / 0.596                            equation 81
    sum             ((1 - t) a + t b) / sqrt((1-t)^2 + t^2)    equation 88
    concatenation   parts weighted (1 - t) : t            equation 103
    features        sqrt(2) cos(2 pi (f x + phase))            equation 75

and the weights are normalised to unit magnitude after each training step (equation 66) by the Keras constraint
`UnitMagnitude`, which optimizers apply.
"""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from kdiff import backend
from kdiff.base import Value, check_integer, check_number
from kdiff.blocks.base import (
    Block,
    build_layer,
    check_embed,
    check_map,
    copy_layer,
    dropout_layer,
    dropped,
    output_shape,
    over_positions,
)
from kdiff.blocks.initializers import Normal

__all__ = [
    "MPConv",
    "MPDense",
    "MPFourierEmbedding",
    "MagnitudePreservingBlock",
    "UnitMagnitude",
    "mp_concatenate",
    "mp_silu",
    "mp_sum",
    "unit_magnitude",
]


def mp_silu(x: Any) -> Any:
    """`silu(x) / 0.596`, since `silu(x)` has mean square 0.596^2 for a standard normal x (equation 81)."""
    return ops.silu(x) / 0.596


def mp_sum(a: Any, b: Any, t: float = 0.5) -> Any:
    """`((1 - t) a + t b) / sqrt((1 - t)^2 + t^2)`: the magnitude-preserving sum of a and b (equation 88)."""
    return ((1 - t) * a + t * b) / math.hypot(1 - t, t)


def mp_concatenate(a: Any, b: Any, t: float = 0.5) -> Any:
    """The concatenation of the channels of a and b, with magnitudes weighted (1 - t) : t (equation 103).

    `c [(1 - t) a / sqrt(n_a), t b / sqrt(n_b)]` with `c = sqrt((n_a + n_b) / ((1 - t)^2 + t^2))`. For equal numbers of
    channels and t = 1/2 it is the plain concatenation.
    """
    n_a, n_b = a.shape[-1], b.shape[-1]
    c = math.sqrt(n_a + n_b) / math.hypot(1 - t, t)
    return ops.concatenate([c * (1 - t) / math.sqrt(n_a) * a, c * t / math.sqrt(n_b) * b], axis=-1)


def unit_magnitude(x: Any, axis: Any, epsilon: float = 1e-4) -> Any:
    """`x / (epsilon + rms(x))`, with the root mean square over these axes, in float32."""
    y = ops.cast(x, "float32")
    rms = ops.sqrt(ops.mean(ops.square(y), axis=axis, keepdims=True))
    return ops.cast(y / (epsilon + rms), x.dtype)


class UnitMagnitude(Value, keras.constraints.Constraint):
    """A kernel constraint, for shape (..., out): the weights of each output have mean square 1 (equation 66).

    Keras' optimizers apply it after each step: the forced weight normalisation of EDM2.
    """

    def __call__(self, w):
        """The kernel, normalised."""
        return unit_magnitude(w, tuple(range(len(w.shape) - 1)))


class _MPKernel(Block):
    """A layer with one kernel, whose weights are divided by their norm, for each output, in each call."""

    def __init__(self, width: int | None = None, **kwargs):
        super().__init__(**kwargs)
        if width is not None:
            check_integer(type(self).__name__, "width", width)
        self.width = width

    def _add_kernel(self, *shape):
        self.kernel = self.add_weight(
            shape=shape, initializer=Normal(1.0), constraint=UnitMagnitude(), name="kernel", autocast=False
        )

    def _weights(self):
        """`w / |w|` for each output, (..., out)."""
        w = unit_magnitude(ops.cast(self.kernel, "float32"), tuple(range(len(self.kernel.shape) - 1)))
        return ops.cast(w / math.sqrt(math.prod(self.kernel.shape[:-1])), self.compute_dtype)

    def multiply_adds(self, x_shape, embed_shape=None, context_shape=None):
        """The products with the kernel at each position."""
        return math.prod(x_shape[:-1]) * math.prod(self.kernel.shape)


class MPDense(_MPKernel):
    """A magnitude-preserving dense layer without bias: `(W / |W|) x`, with one norm for each output.

    Karras et al. (EDM2, 2024), equation 47.

    Args:
        width: the channels of the output; None keeps those of the input.
    """

    def build(self, x_shape):
        """Creates the kernel, (channels, width)."""
        self._add_kernel(x_shape[-1], self.width or x_shape[-1])

    def call(self, x, embed=None, context=None, training=None):
        """Maps (..., channels) to (..., self.width)."""
        return backend.dense(x, self._weights())


class MPConv(_MPKernel):
    """A magnitude-preserving convolution without bias: `(W / |W|) * x`, with one norm for each output.

    Karras et al. (EDM2, 2024), equation 47. At the borders zero padding lowers the magnitude.

    Args:
        width: the channels of the output; None keeps those of the input.
        kernel_size: of the convolution, with "same" padding.
    """

    def __init__(self, width: int | None = None, kernel_size: int = 3, **kwargs):
        super().__init__(width, **kwargs)
        check_integer("MPConv", "kernel_size", kernel_size)
        self.kernel_size = kernel_size

    def build(self, x_shape):
        """Creates the kernel, (kernel_size, kernel_size, channels, width)."""
        check_map(self, x_shape)
        sizes = [self.kernel_size] * (len(x_shape) - 2)
        self._add_kernel(*sizes, x_shape[-1], self.width or x_shape[-1])

    def call(self, x, embed=None, context=None, training=None):
        """Maps (batch, height, width, channels) to `self.width` channels."""
        ones = (1,) * (len(x.shape) - 2)
        return backend.convolution(x, self._weights(), None, ones, "same", ones)


class MPFourierEmbedding(Block):
    """Random Fourier features of a number, with random phases: `sqrt(2) cos(2 pi (scale f_i t + phase_i))`.

    Karras et al. (EDM2, 2024), equation 75: `f_i ~ N(0, 1)` and `phase_i ~ U(0, 1)`, so that each feature has mean
    square 1 over the phases. Both are non-trainable weights, the same on every backend.

    Args:
        width: the size of the embedding.
        scale: the standard deviation of the frequencies.
        seed: for the frequencies and phases.
    """

    def __init__(self, width: int, scale: float = 1.0, seed: int = 0, **kwargs):
        super().__init__(autocast=False, **kwargs)
        check_integer("MPFourierEmbedding", "width", width)
        check_integer("MPFourierEmbedding", "seed", seed, 0)
        self.width = width
        self.scale = scale
        self.seed = seed

    def build(self, x_shape):
        """Draws the frequencies and the phases, (width,) each."""
        generator = np.random.default_rng(self.seed)
        self.frequencies = self._constant("frequencies", self.scale * generator.standard_normal(self.width))
        self.phases = self._constant("phases_of_frequencies", generator.random(self.width))

    def _constant(self, name, drawn):
        def initializer(shape, dtype):
            return ops.convert_to_tensor(drawn, dtype=dtype)

        options = {"dtype": "float32", "autocast": False, "trainable": False}
        return self.add_weight(shape=drawn.shape, initializer=initializer, name=name, **options)

    def call(self, x, embed=None, context=None, training=None):
        """Maps numbers of any shape, usually (batch,), to (..., width)."""
        turns = ops.expand_dims(ops.cast(x, "float32"), -1) * self.frequencies + self.phases
        return ops.cast(math.sqrt(2) * ops.cos(2 * math.pi * turns), self.compute_dtype)

    def compute_output_shape(self, x_shape, embed_shape=None, context_shape=None):
        """(..., width)."""
        return (*x_shape, self.width)


class MagnitudePreservingBlock(Block):
    """The residual block of EDM2: `mp_sum(x, conv(dropout(mp_silu(conv(mp_silu(x)) (1 + gain V mp_silu(embed))))), t)`.

    Karras et al. (2024), configuration G: no biases, no group norms, normalised weights; `gain`, a scalar, is initially
    zero. Encoder blocks first normalise each position to unit magnitude (`normalize`); decoder blocks do not.

    Args:
        width: the channels of the output; None keeps those of the input. Where they differ, there is a 1x1 convolution:
            before everything else if `normalize`, and otherwise in the shortcut.
        normalize: whether the channels at each position are divided by their root mean square first.
        dropout: the rate of dropout before the last convolution.
        kernel_size: of both convolutions.
        resample: a layer without weights that changes the size, applied first; None keeps the size.
        balance: the weight t of the residual in the sum.
        clip: limits the output to [-clip, clip], for float16; None for no limit.
        seed: for the dropout.
    """

    def __init__(
        self,
        width: int | None = None,
        normalize: bool = True,
        dropout: float = 0.0,
        kernel_size: int = 3,
        resample: Any = None,
        balance: float = 0.3,
        clip: float | None = 256.0,
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        for name, value in {"width": width or 1, "kernel_size": kernel_size}.items():
            check_integer("MagnitudePreservingBlock", name, value)
        check_number("MagnitudePreservingBlock", "dropout", dropout, 0, 1)
        check_number("MagnitudePreservingBlock", "balance", balance, 0, 1)
        self.width = width
        self.normalize = normalize
        self.dropout = dropout
        self.kernel_size = kernel_size
        self.resample = None if resample is None else copy_layer(resample, name="resample", dtype=self.dtype_policy)
        self.balance = balance
        self.clip = clip
        self.seed = seed

    def build(self, x_shape, embed_shape=None):
        """Builds both convolutions, the projection of the embedding, if any, and the 1x1 convolution."""
        check_map(self, x_shape)
        self.embedded = embed_shape is not None
        x_shape = x_shape if self.resample is None else build_layer(self.resample, x_shape)
        width = self.width or x_shape[-1]
        inner_shape = (*x_shape[:-1], width)
        self.shortcut = (
            self._built(MPConv(width, 1, dtype=self.dtype_policy), x_shape) if width != x_shape[-1] else None
        )
        first = MPConv(width, self.kernel_size, dtype=self.dtype_policy)
        self.first = self._built(first, inner_shape if self.normalize else x_shape)
        self.second = self._built(MPConv(width, self.kernel_size, dtype=self.dtype_policy), inner_shape)
        self.drop = dropout_layer(self)
        if self.embedded:
            self.projection = self._built(MPDense(width, dtype=self.dtype_policy), embed_shape)
            self.gain = self.add_weight(shape=(), initializer="zeros", name="gain")

    def _built(self, layer, shape):
        layer.build(shape)
        return layer

    def call(self, x, embed=None, context=None, training=None):
        """Maps (batch, height, width, channels) to `self.width` channels; `embed` is (batch, dim) or None."""
        check_embed(self, embed)
        x = x if self.resample is None else self.resample(x)
        if self.normalize:
            x = unit_magnitude(self._shortcut(x), -1)
        y = self.first(mp_silu(x))
        y = dropped(self.drop, mp_silu(self._modulated(y, embed)), training)
        x = x if self.normalize else self._shortcut(x)
        y = mp_sum(x, self.second(y), self.balance)
        return y if self.clip is None else ops.clip(y, -self.clip, self.clip)

    def _shortcut(self, x):
        return x if self.shortcut is None else self.shortcut(x)

    def _modulated(self, y, embed):
        if embed is None:
            return y
        scale = 1 + ops.cast(self.gain, y.dtype) * self.projection(mp_silu(embed))
        return y * over_positions(scale, y)

    def compute_output_shape(self, x_shape, embed_shape=None, context_shape=None):
        """The shape of `x`, resampled, with `self.width` channels."""
        shape = x_shape if self.resample is None else output_shape(self.resample, x_shape)
        return (*shape[:-1], self.width or x_shape[-1])
