"""Convolutions, each in the form that is fastest on a backend.

examples/benchmarks/kernels.py measures the forms; tests compare each with its formula.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from kdiff import circular_padding
from kdiff.backend.running import BACKEND, on_cpu
from kdiff.backend.tangents import forward_mode_is_on

__all__ = ["convolution", "depthwise_convolution"]


def convolution(
    x: Any, kernel: Any, bias: Any, strides: tuple[int, ...], padding: str, dilation: tuple[int, ...]
) -> Any:
    """The convolution of maps (batch, *sizes, channels) with a kernel (*sizes, channels, width), of one to three axes.

    `padding` is "same" or "valid", and the bias may be None. On PyTorch the map is viewed as channels-first,
    while Keras copies it twice. A large kernel on few positions is a matrix product (see `_suits_product`).
    """
    x, padding = _closed(x, kernel, strides, padding, dilation)
    product = _suits_product(x, kernel, strides, dilation)
    if product or BACKEND != "torch":
        options = {"strides": strides, "padding": padding, "data_format": "channels_last", "dilation_rate": dilation}
        y = _product_of_patches(x, kernel, padding) if product else ops.conv(x, kernel, **options)
        return y if bias is None else ops.add(y, bias)
    import torch

    functional, axes = torch.nn.functional, range(x.ndim - 2)
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[len(axes) - 1]
    x, kernel = torch.movedim(x, -1, 1), ops.convert_to_tensor(kernel).permute(len(axes) + 1, len(axes), *axes)
    kernel = kernel.contiguous() if len(kernel) == 1 else kernel  # this layout has no gradient: see one_channel.py
    before, after = _zeros_around(x.shape[2:], kernel.shape[2:], strides, padding, dilation)
    if before != after:
        x = functional.pad(x, [zeros for axis in reversed(axes) for zeros in (before[axis], after[axis])])
        before = 0
    y = convolve(
        x,
        kernel,
        None if bias is None else ops.convert_to_tensor(bias),
        strides,
        before,
        dilation,
        x.shape[1] // kernel.shape[1],
    )
    return torch.movedim(y, 1, -1)


def _suits_product(x: Any, kernel: Any, strides: tuple[int, ...], dilation: tuple[int, ...]) -> bool:
    """Whether `_product_of_patches` is faster: on JAX and PyTorch on a CPU, with a large kernel on few positions.

    Both rearrange the kernel at each call, which then takes longer than the multiplications. If the kernel has 16,384
    numbers or more for each position of the batch, the product takes 0.4 to 0.9 of the time, with gradients 0.3 to 0.7.
    """
    on_a_cpu = on_cpu() if BACKEND == "jax" else BACKEND == "torch" and x.device.type == "cpu"
    if not on_a_cpu or len(x.shape) != 4 or None in x.shape:
        return False
    if any(step != 1 for step in (*strides, *dilation)) or x.shape[-1] != kernel.shape[-2]:
        return False
    return math.prod(kernel.shape) >= 16384 * math.prod(x.shape[:-1])


def _product_of_patches(x: Any, kernel: Any, padding: str) -> Any:
    """The convolution of 2-D maps, without strides, as one matrix product of all patches with the kernel."""
    rows, columns, _, width = kernel.shape
    kernel = ops.reshape(ops.convert_to_tensor(kernel), (-1, width))
    before, after = _zeros_around(x.shape[1:3], (rows, columns), (1, 1), padding, (1, 1))
    x = ops.pad(x, [(0, 0), *zip(before, after, strict=True), (0, 0)])
    batch, height, across = x.shape[0], x.shape[1] - rows + 1, x.shape[2] - columns + 1
    shifted = [x[:, i : i + height, j : j + across] for i in range(rows) for j in range(columns)]
    patches = ops.reshape(ops.concatenate(shifted, axis=-1), (batch * height * across, -1))
    return ops.reshape(ops.matmul(patches, kernel), (batch, height, across, width))


def depthwise_convolution(
    x: Any, kernel: Any, bias: Any, strides: tuple[int, ...], padding: str, dilation: tuple[int, ...]
) -> Any:
    """The convolution of each channel of maps (batch, *sizes, channels) with a kernel (*sizes, channels, multiplier).

    The arguments are those of `convolution`. On PyTorch it is a convolution of groups of one channel. XLA has no fast
    form on a CPU, and TensorFlow none of volumes: there the shifted maps are multiplied and added, which XLA fuses.
    """
    x, padding = _closed(x, kernel, strides, padding, dilation)
    *sizes, channels, multiplier = kernel.shape
    if BACKEND == "torch":
        kernel = ops.reshape(kernel, (*sizes, 1, channels * multiplier))
        return convolution(x, kernel, bias, strides, padding, dilation)
    fused = BACKEND == "jax" and on_cpu() and math.prod(sizes) <= _MOST_SHIFTS
    if fused or len(sizes) == 3:
        zeros = zip(*_zeros_around(x.shape[1:-1], sizes, strides, padding, dilation), strict=True)
        x, kernel = ops.pad(x, [(0, 0), *zeros, (0, 0)]), ops.convert_to_tensor(kernel)
        if multiplier > 1:
            x = ops.repeat(x, multiplier, axis=-1)
        gradient = fused and not forward_mode_is_on()
        summed = _sum_of_shifted_of_jax(strides, dilation) if gradient else _sum_of_shifted(strides, dilation)
        y = summed(x, ops.reshape(kernel, (*sizes, channels * multiplier)))
    else:
        options = {"strides": strides, "padding": padding, "data_format": "channels_last", "dilation_rate": dilation}
        y = ops.depthwise_conv(x, kernel, **options)
    return y if bias is None else ops.add(y, bias)


_MOST_SHIFTS = 121  # of a kernel of 11 x 11; each is an operation to compile


def _sum_of_shifted(strides: tuple[int, ...], dilation: tuple[int, ...]) -> Callable[[Any, Any], Any]:
    """The depthwise convolution, "valid", by a kernel (*sizes, channels); accumulated in float32."""

    def summed(x, kernel):
        y = 0.0
        for position in np.ndindex(*kernel.shape[:-1]):
            parts = zip(position, kernel.shape[:-1], strides, dilation, strict=True)
            seen = [slice(i * apart, (i + 1 - size) * apart or None, stride) for i, size, stride, apart in parts]
            y = y + ops.cast(x[(slice(None), *seen)], "float32") * ops.cast(kernel[position], "float32")
        return ops.cast(y, x.dtype)

    return summed


@functools.cache
def _sum_of_shifted_of_jax(strides: tuple[int, ...], dilation: tuple[int, ...]) -> Callable[[Any, Any], Any]:
    """The same with faster gradients: XLA would compute that of the map from as many padded maps.

    dx = the convolution of dy, with zeros between its numbers and around it, with the flipped kernel
    dkernel[i] = sum over the positions of (the i-th shifted map) dy, one i after the other
    """
    import jax
    from jax import lax

    summed = jax.custom_vjp(_sum_of_shifted(strides, dilation))

    def gradient(values, dy):
        x, kernel = values
        sizes, axes = kernel.shape[:-1], tuple(range(kernel.ndim - 1))
        extents = [(size - 1) * apart + 1 for size, apart in zip(sizes, dilation, strict=True)]
        ends = zip(x.shape[1:-1], extents, dy.shape[1:-1], strides, strict=True)
        after = [n - (count - 1) * stride - 1 for n, _, count, stride in ends]
        around = [(extent - 1, end, step - 1) for extent, end, step in zip(extents, after, strides, strict=True)]
        wide = lax.pad(dy, jax.numpy.zeros((), dy.dtype), [(0, 0, 0), *around, (0, 0, 0)])
        dx = _sum_of_shifted_of_jax((1,) * len(sizes), dilation)(wide, ops.flip(kernel, axes))
        lengths = [(count - 1) * stride + 1 for count, stride in zip(dy.shape[1:-1], strides, strict=True)]

        def slope(start):
            seen = lax.dynamic_slice(x, (0, *start, 0), (len(x), *lengths, x.shape[-1]))
            seen = seen[(slice(None), *[slice(None, None, stride) for stride in strides])]
            products = ops.cast(seen, "float32") * ops.cast(dy, "float32")
            return ops.sum(ops.sum(products, axis=0), axis=axes)

        starts = np.array(list(np.ndindex(*sizes)), "int32") * np.array(dilation, "int32")
        return dx, ops.cast(ops.reshape(lax.map(slope, starts), kernel.shape), kernel.dtype)

    summed.defvjp(lambda x, kernel: (summed(x, kernel), (x, kernel)), jax.jit(gradient))
    return jax.jit(summed)


def _closed(x, kernel, strides, padding, dilation) -> tuple[Any, str]:
    """The map, padded with its opposite edges if circular padding is on, and the padding that is left to do."""
    if padding == "valid" or not circular_padding.is_on():
        return x, padding
    zeros = _zeros_around(x.shape[1:-1], kernel.shape[:-2], strides, padding, dilation)
    return circular_padding.padded(x, *zeros), "valid"


def _zeros_around(sizes, kernel, strides, padding, dilation) -> tuple[tuple, tuple]:
    """The zero padding of a convolution before and after the map, along each axis."""
    if padding == "valid":
        return (0,) * len(sizes), (0,) * len(sizes)
    # For size n and stride s there are ceil(n / s) windows. An unknown size is taken as a multiple of the stride.
    sizes = [stride if size is None else size for size, stride in zip(sizes, strides, strict=True)]
    windows = [-(-size // stride) for size, stride in zip(sizes, strides, strict=True)]
    extents = [(length - 1) * step + 1 for length, step in zip(kernel, dilation, strict=True)]
    parts = zip(windows, strides, extents, sizes, strict=True)
    total = [max(0, (count - 1) * stride + extent - size) for count, stride, extent, size in parts]
    return tuple(zeros // 2 for zeros in total), tuple(zeros - zeros // 2 for zeros in total)
