"""The operations that layers are made of, each in the form that is fastest on a backend.

examples/benchmarks/kernels.py measures the forms; the tests compare each with the formula.
"""

import functools
import math
from typing import Any

import numpy as np
from keras import ops

from kdiff import circular_padding
from kdiff.backend.running import BACKEND
from kdiff.backend.tangents import forward_mode_is_on

__all__ = [
    "HIDDEN",
    "attention",
    "average_pool",
    "convolution",
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
    """`x kernel + bias` over the last axis of `x`; the kernel is (channels, width), and the bias may be None.

    On JAX it is a product of two matrices with a gradient of its own (see `_product_of_jax`).
    """
    if BACKEND == "torch":
        import torch

        return torch.nn.functional.linear(x, ops.convert_to_tensor(kernel).T, _tensor(bias))
    if BACKEND == "jax" and None not in x.shape and _on_cpu() and not forward_mode_is_on():
        y = _product_of_jax()(ops.reshape(x, (-1, x.shape[-1])), ops.convert_to_tensor(kernel))
        y = ops.reshape(y, (*x.shape[:-1], y.shape[-1]))
    else:
        y = ops.matmul(x, kernel)
    return y if bias is None else ops.add(y, bias)


@functools.cache
def _product_of_jax():
    """The product of two matrices, whose gradients are products as they lie.

    Of arrays with more axes XLA turns a copy for the gradient of the kernel. A gradient with short rows is computed as
    one with long rows, and then turned; the barrier keeps XLA from computing it the other way round. That before the
    product keeps it from making one operation of a transformer's last block, which takes half as long again.
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


def convolution(
    x: Any, kernel: Any, bias: Any, strides: tuple[int, ...], padding: str, dilation: tuple[int, ...]
) -> Any:
    """The convolution of maps (batch, *sizes, channels) with a kernel (*sizes, channels, width), of one to three axes.

    `padding` is "same" or "valid", and the bias may be None. On PyTorch the map is looked at as one of channels first;
    Keras copies it twice.
    """
    if padding == "same" and circular_padding.is_on():
        zeros = _zeros_around(x.shape[1:-1], kernel.shape[:-2], strides, padding, dilation)
        x, padding = circular_padding.padded(x, *zeros), "valid"
    if BACKEND != "torch":
        options = {"strides": strides, "padding": padding, "data_format": "channels_last", "dilation_rate": dilation}
        y = ops.conv(x, kernel, **options)
        return y if bias is None else ops.add(y, bias)
    import torch

    functional, axes = torch.nn.functional, range(x.ndim - 2)
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[len(axes) - 1]
    x, kernel = torch.movedim(x, -1, 1), ops.convert_to_tensor(kernel).permute(len(axes) + 1, len(axes), *axes)
    kernel = kernel.contiguous() if len(kernel) == 1 else kernel  # as it lies it has no gradient: see one_channel.py
    before, after = _zeros_around(x.shape[2:], kernel.shape[2:], strides, padding, dilation)
    if before != after:
        x = functional.pad(x, [zeros for axis in reversed(axes) for zeros in (before[axis], after[axis])])
        before = 0
    y = convolve(x, kernel, _tensor(bias), strides, before, dilation, x.shape[1] // kernel.shape[1])
    return torch.movedim(y, 1, -1)


def _tensor(variable: Any, dtype: Any = None) -> Any:
    """The value of a variable, which may be None."""
    return None if variable is None else ops.convert_to_tensor(variable, dtype)


def _zeros_around(sizes, kernel, strides, padding, dilation) -> tuple[tuple, tuple]:
    """How many zeros a convolution adds before and after the map, along each axis."""
    if padding == "valid":
        return (0,) * len(sizes), (0,) * len(sizes)
    # Of size n and stride s there are ceil(n / s) windows. A size that is not known is a multiple of the stride.
    sizes = [stride if size is None else size for size, stride in zip(sizes, strides, strict=True)]
    windows = [-(-size // stride) for size, stride in zip(sizes, strides, strict=True)]
    extents = [(length - 1) * step + 1 for length, step in zip(kernel, dilation, strict=True)]
    parts = zip(windows, strides, extents, sizes, strict=True)
    total = [max(0, (count - 1) * stride + extent - size) for count, stride, extent, size in parts]
    return tuple(zeros // 2 for zeros in total), tuple(zeros - zeros // 2 for zeros in total)


def scaled(x: Any, factor: Any, shift: Any) -> Any:
    """`x factor + shift`, which broadcast; in one pass on PyTorch."""
    if BACKEND == "torch":
        import torch

        return torch.addcmul(shift, x, factor)
    return x * factor + shift


def layer_norm(x: Any, gamma: Any, beta: Any, epsilon: float) -> Any:
    """`gamma (x - mean) / sqrt(var + epsilon) + beta` over the last axis of `x`; `gamma` and `beta` may be None.

    Statistics are float32, the result has the type of `x`. PyTorch has a kernel for it.
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

    Statistics are float32, the result has the type of `x`; `gamma` and `beta` may be None. It is one multiplication
    and one addition, by numbers that depend on example and channel: Keras' own layer broadcasts five-dimensional
    arrays. PyTorch has a kernel for it, which on a CPU wants channels first: of maps as they lie it is slow in its
    gradient, and loses digits where the mean is far from 0 (an error of 5e-4 at 10 standard deviations).
    """
    if BACKEND == "torch" and not forward_mode_is_on():
        return _group_norm_of_torch(x, groups, gamma, beta, epsilon)
    batch, channels = ops.shape(x)[0], x.shape[-1]
    y = ops.reshape(ops.cast(x, "float32"), (batch, -1, channels))

    def group_mean(per_channel):
        """The mean over the group of each channel. As a product it is faster on JAX; accelerators would round it."""
        if BACKEND == "jax" and _on_cpu():
            same = np.kron(np.eye(groups), np.ones([channels // groups] * 2)) * (groups / channels)
            return ops.matmul(per_channel, ops.convert_to_tensor(same, "float32"))[:, None]
        mean = ops.mean(ops.reshape(per_channel, (batch, groups, -1)), axis=-1, keepdims=True)
        return ops.reshape(ops.repeat(mean, channels // groups, axis=-1), (batch, 1, channels))

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
        # A copy: the kernel for channels-last loses a digit, and crashes where `x` needs no gradient but `gamma` does.
        y = torch.nn.functional.group_norm(torch.movedim(x, -1, 1).contiguous(), groups, *weights, epsilon)
        return torch.movedim(y, 1, -1)
    channels = x.shape[-1]
    gamma = torch.ones(channels) if gamma is None else ops.cast(gamma, "float32")
    beta = torch.zeros(channels) if beta is None else ops.cast(beta, "float32")
    y = _group_norm_function().apply(x.to(torch.float32).reshape(len(x), -1, channels), gamma, beta, groups, epsilon)
    return y.view(x.shape).to(x.dtype)


@functools.cache
def _group_norm_function():
    """The group norm of (batch, positions, channels) as a function with a gradient of its own, in few passes."""
    import torch

    class GroupNorm(torch.autograd.Function):
        """With s = 1 / sqrt(var + epsilon), z = (x - mean) s, and <> for the mean over a group, the gradient is

            s (gamma dy - <gamma dy> - z <gamma dy z>),

        that is, dy, x and 1, each times a number for each example and channel.
        """

        @staticmethod
        def forward(context, x, gamma, beta, groups, epsilon):
            shape = (len(x), groups, -1)
            mean = x.mean(1).view(shape).mean(2, keepdim=True)
            variance = (x - _spread(mean, x)).square_().mean(1).view(shape).mean(2, keepdim=True)
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


def _spread(of_groups, x):
    """(batch, groups, 1) to (batch, 1, channels)."""
    batch, groups, _ = of_groups.shape
    return of_groups.expand(batch, groups, x.shape[-1] // groups).reshape(batch, 1, -1)


def gelu_tanh(x: Any) -> Any:
    """`x (1 + tanh(u)) / 2`, `u = sqrt(2 / pi) (x + 0.044715 x^3)`: GELU's approximation by tanh.

    TensorFlow computes it on a CPU as `x sigmoid(2 u)`, compiled as one operation, and forgets what is in between.
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


def attention(q: Any, k: Any, v: Any, mask: Any = None, bias: Any = None) -> Any:
    """`softmax(q k^T / sqrt(width) + bias) v` in each head, for q, k and v of the shape (batch, tokens, heads, width).

    Where a `mask`, (batch, query tokens, key tokens) or (batch, 1, key tokens), is False, the weight is 0. With the
    latter, queries that see nothing get 0; with the former each must see something. Logits and softmax are float32,
    whatever the type of q, k and v: in float16 the products overflow. The `bias` is (batch or 1, heads, query tokens,
    key tokens), or None. PyTorch has a kernel that never holds the whole table of weights; JAX has one on accelerators,
    and goes block by block on a CPU, unless the queries have masks of their own, or a bias.
    """
    plain = forward_mode_is_on()
    if BACKEND == "torch" and not plain:
        return _attention_of_torch(q, k, v, mask, bias)
    if BACKEND == "jax" and not plain and _on_cpu() and bias is None and (mask is None or mask.shape[1] == 1):
        y = _attention_by_blocks(q, k, v, mask)
    elif BACKEND == "jax" and not plain and mask is None and bias is None:
        y = ops.dot_product_attention(q, k, v)
    else:
        logits = _float32_product("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
        logits = logits if bias is None else logits + ops.cast(bias, "float32")
        logits = logits if mask is None else ops.where(mask[:, None], logits, HIDDEN)
        y = ops.einsum("bhqk,bkhd->bqhd", ops.cast(_softmax(logits), v.dtype), v)
    # Where all is hidden, the softmax of equal logits is a mean.
    return y if mask is None or mask.shape[1] != 1 else ops.where(ops.any(mask, axis=-1)[..., None, None], y, 0)


def _float32_product(equation: str, x: Any, y: Any) -> Any:
    """The einsum of two tensors of one type, summed and returned in float32.

    TensorFlow has no product of 16-bit numbers that is float32: there the tensors are cast before.
    """
    if BACKEND == "jax":
        import jax.numpy as jnp

        return jnp.einsum(equation, x, y, preferred_element_type="float32")
    return ops.einsum(equation, ops.cast(x, "float32"), ops.cast(y, "float32"))


def _softmax(logits: Any) -> Any:
    """The softmax over the last axis. What Keras' own gives on TensorFlow keeps the logits as an attribute."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.nn.softmax(logits)
    return ops.softmax(logits, axis=-1)


HIDDEN = -1e30  # the logit of what is masked: not infinite, for the softmax of infinities alone is NaN


def _attention_of_torch(q, k, v, mask, bias):
    """Its kernel, which on a CPU takes longer for heads of 8 channels than of 16: zeros fill them up.

    It takes a mask or a bias, in one argument.
    """
    import torch

    width = q.shape[-1]
    mask, scale = None if mask is None else mask[:, None], width**-0.5
    hidden = mask if bias is not None else None
    if bias is not None:
        bias = bias.to(q.dtype)
        mask = bias if mask is None else torch.where(mask, bias, torch.finfo(q.dtype).min)
    if q.device.type == "cpu" and width < 16:
        q, k, v = (torch.nn.functional.pad(x, (0, 16 - width)) for x in (q, k, v))
    q, k, v = (torch.transpose(x, 1, 2) for x in (q, k, v))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    if hidden is not None and hidden.shape[2] == 1:
        y = torch.where(torch.any(hidden, dim=-1)[..., None], y, 0)
    return torch.transpose(y[..., :width], 1, 2)


def _on_cpu() -> bool:
    import jax

    return jax.default_backend() == "cpu"


def _attention_by_blocks(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
    """Attention on JAX: of some heads at a time, or of some of the queries of one head, so that the table of weights
    stays in the cache. It is not kept for the gradient, but computed again. Positions come last, not channels: heads
    are narrow, and XLA multiplies matrices with short rows slowly. `mask` is (batch, 1, keys).
    """
    import jax

    (batch, tokens, heads, width), keys = q.shape, k.shape[1]
    in_table = 2**19  # numbers: 2 MiB
    blocks = _divisor(batch * heads, in_table // (tokens * keys))
    queries = _divisor(tokens, in_table // keys) if blocks == 1 else tokens
    q, k, v = (ops.reshape(ops.transpose(x, (0, 2, 3, 1)), (-1, blocks, width, x.shape[1])) for x in (q, k, v))
    q = ops.transpose(ops.reshape(q * width**-0.5, (*q.shape[:-1], -1, queries)), (0, 3, 1, 2, 4))
    if mask is not None:
        mask = ops.reshape(ops.broadcast_to(mask, (batch, heads, keys)), (-1, blocks, keys, 1))

    @jax.checkpoint
    def of_queries(q, k, v, mask):
        logits = _float32_product("bdk,bdq->bkq", k, q)
        logits = logits if mask is None else ops.where(mask, logits, HIDDEN)
        weights = ops.exp(logits - jax.lax.stop_gradient(ops.max(logits, axis=1, keepdims=True)))
        y = _float32_product("bdk,bkq->bdq", v, ops.cast(weights, v.dtype))
        return ops.cast(y / ops.sum(weights, axis=1, keepdims=True), v.dtype)

    y = jax.lax.map(lambda block: jax.lax.map(lambda some: of_queries(some, *block[1:]), block[0]), (q, k, v, mask))
    y = ops.reshape(ops.transpose(y, (0, 2, 3, 1, 4)), (batch, heads, width, tokens))
    return ops.transpose(y, (0, 3, 1, 2))


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`, or 1."""
    return max(d for d in range(1, number + 1) if number % d == 0 and d <= max(1, most))


def upsample_nearest(x: Any) -> Any:
    """Each pixel of maps (batch, height, width, channels) as a 2x2 square; also with one or three axes."""
    batch, *sizes, channels = ops.shape(x)
    twice = [2 * size for size in sizes]
    if BACKEND == "jax":
        between = (slice(None), *[part for _ in sizes for part in (slice(None), None)])
        x = ops.broadcast_to(x[between], (batch, *[part for size in sizes for part in (size, 2)], channels))
        return ops.reshape(x, (batch, *twice, channels))
    if len(sizes) != 2 or forward_mode_is_on():  # an axis at a time: TensorFlow broadcasts no more than six
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
