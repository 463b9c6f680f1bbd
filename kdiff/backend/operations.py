"""The operations of layers, each in the form that is fastest on a backend.

examples/benchmarks/kernels.py measures the forms; tests compare each with its formula.
"""

import functools
import math
from typing import Any

import numpy as np
from keras import ops

from kdiff.backend.running import BACKEND, on_cpu
from kdiff.backend.tangents import forward_mode_is_on

__all__ = [
    "average_pool",
    "dense",
    "gelu_tanh",
    "group_norm",
    "layer_norm",
    "max_pool",
    "scaled",
    "upsample_bilinear",
    "upsample_nearest",
]


def dense(x: Any, kernel: Any, bias: Any = None) -> Any:
    """`x kernel + bias` over the last axis of `x`; the kernel is (channels, width); the bias may be None.

    On JAX it is a matrix product with a custom gradient (see `_product_of_jax`).
    """
    if BACKEND == "torch":
        import torch

        return torch.nn.functional.linear(x, ops.convert_to_tensor(kernel).T, _tensor(bias))
    if BACKEND == "jax" and None not in x.shape and on_cpu() and not forward_mode_is_on():
        y = _product_of_jax()(ops.reshape(x, (-1, x.shape[-1])), ops.convert_to_tensor(kernel))
        y = ops.reshape(y, (*x.shape[:-1], y.shape[-1]))
    else:
        y = ops.matmul(x, kernel)
    return y if bias is None else ops.add(y, bias)


@functools.cache
def _product_of_jax():
    """The product of two matrices, with gradients that are matrix products in the given memory layout.

    For arrays with more axes XLA transposes a copy for the gradient of the kernel. A gradient with short rows is
    computed as one with long rows, then transposed; the barrier keeps XLA from undoing this. The barrier before the
    product keeps XLA from fusing the last block of a transformer into one operation, which takes half as long again.
    """
    import jax

    barrier = jax.lax.optimization_barrier

    @jax.custom_vjp
    def product(x, kernel):
        return barrier(x) @ kernel

    def gradient(values, dy):
        x, kernel = values
        rows, columns = kernel.shape
        slope = x.T @ dy if rows <= columns else barrier(dy.T @ x).T
        return dy @ kernel.T, slope

    product.defvjp(lambda x, kernel: (barrier(x) @ kernel, (x, kernel)), gradient)
    return product


def _tensor(variable: Any, dtype: Any = None) -> Any:
    """The value of a variable, or None."""
    return None if variable is None else ops.convert_to_tensor(variable, dtype)


def scaled(x: Any, factor: Any, shift: Any) -> Any:
    """`x factor + shift`, with broadcasting; in one pass on PyTorch."""
    if BACKEND == "torch":
        import torch

        return torch.addcmul(shift, x, factor)
    return x * factor + shift


def layer_norm(x: Any, gamma: Any, beta: Any, epsilon: float) -> Any:
    """`gamma (x - mean) / sqrt(var + epsilon) + beta` over the last axis of `x`; `gamma` and `beta` may be None.

    Statistics are float32; the result has the type of `x`. PyTorch has a kernel for it.
    """
    if BACKEND == "torch":
        import torch

        weights = [_tensor(w, x.dtype) for w in (gamma, beta)]
        return torch.nn.functional.layer_norm(x, x.shape[-1:], *weights, epsilon)
    y = ops.cast(x, "float32")
    y = y - ops.mean(y, axis=-1, keepdims=True)
    y = y * ops.rsqrt(ops.mean(ops.square(y), axis=-1, keepdims=True) + epsilon)
    y = y if gamma is None else ops.cast(gamma, "float32") * y
    return ops.cast(y if beta is None else y + ops.cast(beta, "float32"), x.dtype)


def group_norm(x: Any, groups: int, gamma: Any, beta: Any, epsilon: float) -> Any:
    """`gamma (x - mean) / sqrt(var + epsilon) + beta` over each group of channels of `x`, (batch, ..., channels).

    Statistics are float32; the result has the type of `x`; `gamma` and `beta` may be None. It is one multiplication and
    one addition, by values per example and channel; Keras' own layer broadcasts five-dimensional arrays. PyTorch has a
    kernel, which on a CPU needs channels first: on channels-last maps its gradient is slow, and it loses digits if the
    mean is far from 0 (an error of 5e-4 at 10 standard deviations).
    """
    if BACKEND == "torch" and not forward_mode_is_on():
        return _group_norm_of_torch(x, groups, gamma, beta, epsilon)
    batch, channels = ops.shape(x)[0], x.shape[-1]
    y = ops.reshape(ops.cast(x, "float32"), (batch, -1, channels))

    def group_mean(per_channel):
        """The mean over the group of each channel. On JAX a matrix product is faster; accelerators would round it."""
        if BACKEND == "jax" and on_cpu():
            same = np.kron(np.eye(groups), np.ones([channels // groups] * 2)) * (groups / channels)
            return ops.matmul(per_channel, ops.convert_to_tensor(same, "float32"))[:, None]
        mean = ops.mean(ops.reshape(per_channel, (batch, groups, -1)), axis=-1, keepdims=True)
        # Not `ops.repeat`, of which TensorFlow makes a dozen operations, and as many of its gradient.
        return ops.reshape(ops.broadcast_to(mean, (batch, groups, channels // groups)), (batch, 1, channels))

    mean = group_mean(ops.mean(y, axis=1))
    variance = group_mean(ops.mean(ops.square(y - mean), axis=1))
    scale = ops.rsqrt(variance + epsilon)
    scale = scale if gamma is None else scale * ops.cast(gamma, "float32")
    shift = -mean * scale if beta is None else ops.cast(beta, "float32") - mean * scale
    return ops.cast(ops.reshape(y * scale + shift, ops.shape(x)), x.dtype)


def _group_norm_of_torch(x, groups, gamma, beta, epsilon):
    import torch

    if x.device.type != "cpu":
        weights = [_tensor(w, x.dtype) for w in (gamma, beta)]
        # A copy: the channels-last kernel loses a digit, and crashes if `gamma` needs a gradient but `x` does not.
        y = torch.nn.functional.group_norm(torch.movedim(x, -1, 1).contiguous(), groups, *weights, epsilon)
        return torch.movedim(y, 1, -1)
    channels = x.shape[-1]
    gamma = torch.ones(channels) if gamma is None else ops.cast(gamma, "float32")
    beta = torch.zeros(channels) if beta is None else ops.cast(beta, "float32")
    y = _group_norm_function().apply(x.to(torch.float32).reshape(len(x), -1, channels), gamma, beta, groups, epsilon)
    return y.view(x.shape).to(x.dtype)


@functools.cache
def _group_norm_function():
    """The group norm of (batch, positions, channels) as a function with a custom gradient, in few passes."""
    import torch

    class GroupNorm(torch.autograd.Function):
        """With s = 1 / sqrt(var + epsilon), z = (x - mean) s, and <> for the mean over a group, the gradient is

            s (gamma dy - <gamma dy> - z <gamma dy z>),

        that is, dy, x and 1, each times a value per example and channel.
        """

        @staticmethod
        def forward(context, x, gamma, beta, groups, epsilon):
            shape = (len(x), groups, -1)
            of_channels = x.mean(1).view(shape)
            mean = of_channels.mean(2, keepdim=True)
            if x[0].numel() < 2**16:
                variance = (x - _spread(mean, x)).square_().mean(1).view(shape).mean(2, keepdim=True)
            else:
                variance = _variances(x).view(shape) + (of_channels - mean).square()
                variance = variance.mean(2, keepdim=True)
            inverse = torch.rsqrt(variance + epsilon)
            context.save_for_backward(x, gamma, mean, inverse)
            scale = gamma * _spread(inverse, x)
            return torch.addcmul(beta - _spread(mean, x) * scale, x, scale)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(context, dy):
            x, gamma, mean, inverse = context.saved_tensors
            positions, shape = x.shape[1], (len(x), mean.shape[1], -1)
            of_beta = dy.sum(1)
            of_gamma = ((dy * x).sum(1) - _spread(mean, x)[:, 0] * of_beta) * _spread(inverse, x)[:, 0]
            plain, along = ((gamma * one / positions).view(shape).mean(2, keepdim=True) for one in (of_beta, of_gamma))
            slope = -along * inverse.square()
            dx = torch.addcmul(_spread(-inverse * plain - slope * mean, x), x, _spread(slope, x))
            return dx.addcmul_(dy, gamma * _spread(inverse, x)), of_gamma.sum(0), of_beta.sum(0), None, None

    return GroupNorm


def _variances(x):
    """Those of the channels of each example, (batch, channels): PyTorch's batch norm makes no array of differences."""
    import torch

    maps = [one.T[None, :, :, None] for one in x]  # as it lies: channels last
    return torch.stack([torch.batch_norm_update_stats(one, None, None, 0.0)[1] for one in maps])


def _spread(of_groups, x):
    """Maps (batch, groups, 1) to (batch, 1, channels)."""
    batch, groups, _ = of_groups.shape
    return of_groups.expand(batch, groups, x.shape[-1] // groups).reshape(batch, 1, -1)


def gelu_tanh(x: Any) -> Any:
    """`x (1 + tanh(u)) / 2`, `u = sqrt(2 / pi) (x + 0.044715 x^3)`: the tanh approximation of GELU.

    TensorFlow computes it on a CPU as `x sigmoid(2 u)`, compiled as one operation without stored intermediates.
    """
    if BACKEND == "tensorflow" and not _has_gpu() and not forward_mode_is_on():
        return _gelu_of_tensorflow()(x)
    return ops.gelu(x, approximate=True)


@functools.cache
def _has_gpu() -> bool:
    import tensorflow as tf

    return bool(tf.config.get_visible_devices("GPU"))


@functools.cache
def _gelu_of_tensorflow():
    import tensorflow as tf

    slope = math.sqrt(8 / math.pi)

    @tf.function(jit_compile=True, autograph=False)
    def gelu(x):
        return x * tf.sigmoid(slope * x * (1 + 0.044715 * x * x))

    return gelu


def upsample_nearest(x: Any) -> Any:
    """Each pixel of maps (batch, height, width, channels) as a 2x2 square; also with one or three axes."""
    batch, *sizes, channels = ops.shape(x)
    twice = [2 * size for size in sizes]
    if BACKEND == "jax":
        between = (slice(None), *[part for _ in sizes for part in (slice(None), None)])
        x = ops.broadcast_to(x[between], (batch, *[part for size in sizes for part in (size, 2)], channels))
        return ops.reshape(x, (batch, *twice, channels))
    if len(sizes) != 2 or forward_mode_is_on():  # one axis at a time: TensorFlow broadcasts at most six
        for axis in range(1, len(sizes) + 1):
            x = ops.repeat(x, 2, axis=axis)
        return x
    return ops.image.resize(x, twice, "nearest", data_format="channels_last")


def upsample_bilinear(x: Any) -> Any:
    """Maps (batch, height, width, channels) at twice the size, by bilinear interpolation between pixel centres; also
    with one or three axes.
    """
    if len(x.shape) == 4:
        height, width = ops.shape(x)[1:3]
        y = ops.image.resize(x, (2 * height, 2 * width), "bilinear", data_format="channels_last")
        return ops.cast(y, x.dtype)
    for axis in range(1, len(x.shape) - 1):
        size = ops.shape(x)[axis]
        before, after = ops.maximum(ops.arange(size) - 1, 0), ops.minimum(ops.arange(size) + 1, size - 1)
        pair = [0.75 * x + 0.25 * ops.take(x, beside, axis=axis) for beside in (before, after)]
        shape = ops.shape(x)
        x = ops.reshape(ops.stack(pair, axis=axis + 1), (*shape[:axis], 2 * size, *shape[axis + 1 :]))
    return x


def average_pool(x: Any) -> Any:
    """The average of each 2x2 square of maps (batch, height, width, channels) of even size; also with other axes."""
    if BACKEND == "jax":
        batch, *sizes, channels = x.shape
        split = [part for size in sizes for part in (size // 2, 2)]
        return ops.mean(ops.reshape(x, (batch, *split, channels)), axis=tuple(range(2, 2 * len(sizes) + 1, 2)))
    return ops.average_pool(x, 2, 2, "valid", "channels_last")


def max_pool(x: Any) -> Any:
    """The maximum of each 2x2 square of maps (batch, height, width, channels) of even size; also with other axes."""
    return ops.max_pool(x, 2, 2, "valid", "channels_last")
