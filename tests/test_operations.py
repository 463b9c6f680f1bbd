"""The operations of layers: each backend's form, its gradient and its lower precision, against the formula."""

import keras
import numpy as np
import pytest
from keras import ops

from kdiff import backend, blocks
from kdiff.backend import BACKEND
from tests.toys import mostly_once


def numpy(tensor):
    return ops.convert_to_numpy(ops.stop_gradient(tensor))


def drawn(*shape, seed=3):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def value_and_gradients(function, arrays):
    """f(*arrays), and the gradient of <f, dy> for one dy with respect to each array, as NumPy arrays."""
    tensors = [ops.convert_to_tensor(array) for array in arrays]
    gradients = []
    for i, tensor in enumerate(tensors):

        def of_one(x, i=i):
            return function(*tensors[:i], x, *tensors[i + 1 :]), None

        y, pull, _ = backend.vjp(of_one, tensor)
        gradients.append(ops.convert_to_numpy(pull(ops.convert_to_tensor(drawn(*y.shape, seed=9)))))
    return ops.convert_to_numpy(y), gradients


def assert_same(function, reference, *arrays, tolerance=1e-5):
    (y, gradients), (wanted, slopes) = (value_and_gradients(f, arrays) for f in (function, reference))
    for found, expected in zip((y, *gradients), (wanted, *slopes), strict=True):
        np.testing.assert_allclose(found, expected, atol=tolerance * max(1, np.abs(expected).max()))


def assert_close_in_bfloat16(function, *arrays):
    exact = ops.convert_to_numpy(function(*map(ops.convert_to_tensor, arrays)))
    y = function(*(ops.cast(array, "bfloat16") for array in arrays))
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    error = ops.convert_to_numpy(ops.cast(y, "float32")) - exact
    assert np.sqrt(np.mean(error**2)) < 0.02 * np.sqrt(np.mean(exact**2))


@pytest.mark.parametrize("shape", [(5, 6), (2, 7, 6), (2, 3, 4, 6)])
@pytest.mark.parametrize("width", [4, 6, 9])
def test_dense(shape, width):
    x, kernel, bias = drawn(*shape), drawn(6, width), drawn(width)
    dy = drawn(*shape[:-1], width, seed=9)
    y, (dx, slope, of_bias) = value_and_gradients(backend.dense, (x, kernel, bias))
    flat, flat_dy = x.reshape(-1, 6), dy.reshape(-1, width)
    np.testing.assert_allclose(y, x @ kernel + bias, atol=1e-5)
    np.testing.assert_allclose(dx, dy @ kernel.T, atol=1e-5)
    np.testing.assert_allclose(slope, flat.T @ flat_dy, atol=2e-5)
    np.testing.assert_allclose(of_bias, flat_dy.sum(0), atol=2e-5)
    assert_close_in_bfloat16(backend.dense, x, kernel, bias)
    y = backend.dense(ops.convert_to_tensor(x), ops.convert_to_tensor(kernel))
    np.testing.assert_allclose(ops.convert_to_numpy(y), x @ kernel, atol=1e-5)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(
    ("size", "kernel", "strides", "dilation"),
    [
        ((6, 5), (3, 3), (1, 1), (1, 1)),
        ((6, 5), (3, 3), (2, 2), (1, 1)),
        ((5, 7), (4, 2), (2, 1), (1, 1)),
        ((6, 6), (1, 1), (1, 1), (1, 1)),
        ((9, 8), (3, 3), (1, 1), (2, 3)),
        ((9,), (4,), (2,), (1,)),
        ((4, 5, 6), (3, 2, 3), (2, 1, 2), (1, 1, 1)),
    ],
)
def test_convolution(size, kernel, strides, dilation, padding):
    options = {"strides": strides, "padding": padding, "dilation_rate": dilation, "data_format": "channels_last"}
    assert_same(
        lambda x, kernel, bias: backend.convolution(x, kernel, bias, strides, padding, dilation),
        lambda x, kernel, bias: ops.conv(x, kernel, **options) + bias,
        drawn(2, *size, 3),
        drawn(*kernel, 3, 4),
        drawn(4),
    )


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (1, 1)])
def test_convolution_by_a_large_kernel(kernel, padding):
    """On JAX and PyTorch it is a product of patches: 16,384 numbers for each position, and more."""
    x, weights = drawn(1, 3, 4, 256), drawn(*kernel, 256, 1024)
    before = [(size - 1) // 2 * (padding == "same") for size in kernel]
    after = [size // 2 * (padding == "same") for size in kernel]
    padded = np.pad(x, [(0, 0), *zip(before, after, strict=True), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(
        padded, kernel, (1, 2)
    )  # (batch, height, width, channels, *kernel)
    expected = np.einsum("bhwcij,ijcd->bhwd", windows.astype("float64"), weights.astype("float64"))
    function = lambda x, kernel: backend.convolution(x, kernel, None, (1, 1), padding, (1, 1))  # noqa: E731
    y, (_, slope) = value_and_gradients(function, (x, weights))
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())
    dy = drawn(*expected.shape, seed=9).astype("float64")
    wanted = np.einsum("bhwcij,bhwd->ijcd", windows, dy)
    np.testing.assert_allclose(slope, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "dilation"),
    [
        ((6, 5), (3, 3), 1, 1),
        ((7, 6), (4, 2), 2, 1),
        ((9, 8), (3, 3), 1, 2),
        ((9,), (4,), 2, 1),
        ((4, 5, 6), (3, 2, 3), 1, 1),
        ((16, 15), (12, 12), 1, 1),  # too large for shifted maps
    ],
)
@pytest.mark.parametrize("multiplier", mostly_once([1, 2]))
def test_depthwise_convolution(size, kernel, stride, dilation, padding, multiplier):
    """Each channel's is a convolution of one channel."""
    strides, rates = (stride,) * len(size), (dilation,) * len(size)

    def by_channel(x, kernel, bias):
        maps = [
            backend.convolution(x[..., i : i + 1], kernel[..., i : i + 1, :], None, strides, padding, rates)
            for i in range(3)
        ]
        return ops.concatenate(maps, axis=-1) + bias

    def function(x, kernel, bias):
        return backend.depthwise_convolution(x, kernel, bias, strides, padding, rates)

    arrays = drawn(2, *size, 3), drawn(*kernel, 3, multiplier), drawn(3 * multiplier)
    assert_same(function, by_channel, *arrays)
    if (kernel, dilation) == ((3, 3), 1):
        assert_close_in_bfloat16(function, *arrays)


@pytest.mark.parametrize("size", [(8,), (8, 8), (4, 4, 4)])
def test_the_gradient_of_a_kernel_to_one_channel(size):
    """In a batch of one: PyTorch has none on a CPU, of the kernel as it lies."""
    x, kernel = ops.convert_to_tensor(drawn(1, *size, 3)), ops.convert_to_tensor(drawn(*[3] * len(size), 3, 1))
    ones = (1,) * len(size)
    pull = backend.vjp(lambda one: (backend.convolution(x, one, None, ones, "same", ones), None), kernel)[1]
    gradient = ops.convert_to_numpy(pull(ops.ones((1, *size, 1))))
    padded = np.pad(numpy(x), [(0, 0), *[(1, 1)] * len(size), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, size, tuple(range(1, len(size) + 1)))
    np.testing.assert_allclose(gradient[..., 0], windows.sum(tuple(range(-len(size), 0)))[0], atol=1e-4)


def test_convolution_by_hand():
    x, kernel = drawn(1, 4, 4, 2), drawn(3, 3, 2, 5)
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    expected = sum(padded[:, i : i + 4, j : j + 4] @ kernel[i, j] for i in range(3) for j in range(3))
    function = lambda x, kernel: backend.convolution(x, kernel, None, (1, 1), "same", (1, 1))  # noqa: E731
    y = function(ops.convert_to_tensor(x), ops.convert_to_tensor(kernel))
    np.testing.assert_allclose(ops.convert_to_numpy(y), expected, atol=1e-5)
    assert_close_in_bfloat16(function, x, kernel)


LARGE = (2, 96, 64, 12)  # of maps of more than 2^16 numbers PyTorch finds the variances in another way


@pytest.mark.parametrize("shape", [(2, 3, 5, 12), (2, 7, 12), (3, 12), LARGE])
def test_the_gradient_of_group_norm(shape):
    def reference(x, gamma, beta):
        groups = ops.reshape(x, (shape[0], -1, 4, 3))
        mean, variance = ops.moments(groups, axes=(1, 3), keepdims=True)
        return ops.reshape((groups - mean) * ops.rsqrt(variance + 1e-3), shape) * gamma + beta

    x, gamma, beta = 3 * drawn(*shape) + 5, drawn(12), drawn(12) + 1
    assert_same(lambda *arrays: backend.group_norm(arrays[0], 4, *arrays[1:], 1e-3), reference, x, gamma, beta)
    assert_close_in_bfloat16(lambda x: backend.group_norm(x, 4, None, None, 1e-3), drawn(*shape))


@pytest.mark.parametrize("shape", [(2, 3, 5, 12), LARGE])
def test_group_norm_keeps_its_digits(shape):
    """Where the mean is 100 standard deviations from 0: in float32 the numbers themselves are known to 4e-6 there."""
    x = (100.0 + drawn(*shape)).astype("float32")
    parts = x.astype("float64").reshape(shape[0], -1, 4, 3)
    mean, variance = parts.mean((1, 3), keepdims=True), parts.var((1, 3), keepdims=True)
    expected = ((parts - mean) / np.sqrt(variance + 1e-5)).reshape(shape)
    y = ops.convert_to_numpy(backend.group_norm(ops.convert_to_tensor(x), 4, None, None, 1e-5))
    np.testing.assert_allclose(y, expected, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 5, 12), (2, 3, 2, 12)])
def test_layer_norm(shape):
    def reference(x, gamma, beta):
        mean, variance = ops.moments(x, axes=-1, keepdims=True)
        return (x - mean) * ops.rsqrt(variance + 1e-3) * gamma + beta

    x, gamma, beta = drawn(*shape) + 2, drawn(12), drawn(12) + 1
    assert_same(lambda *arrays: backend.layer_norm(*arrays, 1e-3), reference, x, gamma, beta)
    assert_close_in_bfloat16(lambda x: backend.layer_norm(x, None, None, 1e-3), drawn(*shape))


def test_scaled():
    x, factor, shift = drawn(2, 3, 4, 5), drawn(2, 1, 1, 5), drawn(2, 1, 1, 5)
    assert_same(backend.scaled, lambda x, factor, shift: x * factor + shift, x, factor, shift)
    assert_same(backend.scaled, lambda x, factor, shift: x * factor + shift, x, factor, drawn(2, 3, 4, 5))
    assert_close_in_bfloat16(backend.scaled, x, factor, shift)


def test_gelu_tanh():
    def reference(x):
        return x * (1 + ops.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x * x * x))) / 2

    assert_same(backend.gelu_tanh, reference, np.linspace(-6, 6, 101, dtype="float32"))
    assert_close_in_bfloat16(backend.gelu_tanh, drawn(50))


@pytest.mark.parametrize("width", [4, 8, 12, 16])
def test_narrow_heads(width):
    """On PyTorch zeros fill them up; all of the queries, keys and values have their gradients."""

    def reference(q, k, v):
        weights = ops.softmax(ops.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(width), axis=-1)
        return ops.einsum("bhqk,bkhd->bqhd", weights, v)

    q, k, v = (drawn(2, 6, 3, width, seed=seed) for seed in range(3))
    assert_same(backend.attention, reference, q, k, v)


def test_layers_are_those_of_keras():
    x = drawn(2, 6, 6, 4)
    pairs = [
        (blocks.Dense(5, activation="relu", use_bias=False), keras.layers.Dense(5, activation="relu", use_bias=False)),
        (blocks.Conv2D(5, 3, 2, "same", activation="silu"), keras.layers.Conv2D(5, 3, 2, "same", activation="silu")),
        (blocks.Conv2D(4, 3, groups=2, use_bias=False), keras.layers.Conv2D(4, 3, groups=2, use_bias=False)),
    ]
    for own, plain in pairs:
        wanted = ops.convert_to_numpy(plain(x))
        own.build(x.shape)
        own.set_weights(plain.get_weights())
        np.testing.assert_allclose(ops.convert_to_numpy(own(x)), wanted, atol=1e-5)
        again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(own))
        assert type(again) is type(own)
        assert again.get_config() == own.get_config()
    with pytest.raises(ValueError, match="channels_last"):
        blocks.Conv2D(4, 3, data_format="channels_first")


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch alone has a group norm whose gradient is written by hand")
def test_a_second_derivative_of_group_norm_is_an_error():
    import torch

    x = torch.randn(2, 4, 4, requires_grad=True)
    (slope,) = torch.autograd.grad(backend.group_norm(x, 2, None, None, 1e-5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.skipif(BACKEND != "torch", reason="the others prepare a call once, when they compile")
def test_direct_calls_are_those_of_keras():
    """Without Keras' preparations where they change nothing, and with them where a hook or a precision asks for it."""
    x = ops.convert_to_tensor(drawn(2, 4, 4, 8))
    block = blocks.ResidualBlock(normalization=blocks.GroupNorm(2))
    block.build(x.shape)
    assert backend.needs_no_preparation(block, (x,), {"training": False})
    direct, prepared = block(x, training=False), keras.layers.Layer.__call__(block, x, training=False)
    np.testing.assert_array_equal(numpy(direct), numpy(prepared))
    assert not backend.needs_no_preparation(block, (x,), {})  # the layers around it may be training
    seen = []
    handle = block.second.register_forward_hook(lambda *arguments: seen.append(1))
    block(x, training=False)
    assert seen == [1]
    handle.remove()
    with keras.src.backend.AutocastScope("bfloat16"):
        assert not backend.needs_no_preparation(block, (x,), {"training": False})
    lower = blocks.Dense(3, dtype="mixed_bfloat16")
    assert "bfloat16" in str(lower(x).dtype)
    assert blocks.Dense(3)(inputs=drawn(2, 8)).shape == (2, 3)  # an array, of a layer that is not built
    output = blocks.Dense(3)(keras.Input((8,)))
    assert isinstance(output, keras.KerasTensor)
    layer = blocks.Dense(3)
    layer.build(x.shape)
    np.testing.assert_array_equal(numpy(layer(x, training=False)), numpy(layer(x)))  # which its `call` does not take


@pytest.mark.parametrize("masked", [None, "keys", "pairs"])
@pytest.mark.parametrize(("tokens", "size"), [(4096, 1.0), (8, 150.0)])
def test_attention_in_float16_neither_overflows_nor_forgets(tokens, size, masked):
    """Weights that sum to 4096 before they are normalised, logits of 180,000: the largest number is 65,504."""
    if masked == "pairs" and tokens > 8:
        tokens = 1024  # the whole table is held
    q = ops.full((1, tokens, 1, 64), size, "float16")
    v = drawn(1, tokens, 1, 64)
    v[:, : tokens // 2] += 40.0
    mask = {None: None, "keys": np.ones((1, 1, tokens), bool), "pairs": np.ones((1, tokens, tokens), bool)}[masked]
    if mask is not None:
        mask[..., -tokens // 4 :] = False
        mask = ops.convert_to_tensor(mask)
    y = numpy(backend.attention(q, q, ops.convert_to_tensor(v.astype("float16")), mask)).astype("float64")
    seen = v[:, : tokens if mask is None else tokens - tokens // 4].astype("float16").astype("float64")
    np.testing.assert_allclose(y, np.broadcast_to(seen.mean(1, keepdims=True), y.shape), rtol=5e-3, atol=5e-3)
