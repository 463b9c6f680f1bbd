"""Residual, ConvNeXt and magnitude-preserving blocks and resampling: formulas, laws, and diffusers."""

import math

import keras
import numpy as np
import pytest
from keras import ops

from kdiff import blocks
from kdiff.blocks import Downsample, FIRDownsample, FIRUpsample, ResidualBlock, Upsample
from kdiff.blocks.convolution import ConvNeXtBlock, SimpleBlock
from kdiff.blocks.magnitude import unit_magnitude
from tests.helpers_gradients import perturb, run
from tests.test_blocks import EMBED, MAP, NORM, arrays, check_block, model_of

HALF, TWICE = (2, 2, 2, 8), (2, 8, 8, 8)
AVERAGE, NEAREST = Downsample("average"), Upsample(convolution=False)

# name: (block, shape of x, shape of the output, shapes of other inputs)
CASES = {
    "residual_down": (ResidualBlock(normalization=NORM, resample=AVERAGE), MAP, HALF, {"embed": EMBED}),
    "residual_up": (
        ResidualBlock(12, False, 0.2, normalization=NORM, resample=NEAREST, rescale=math.sqrt(2)),
        MAP,
        (2, 8, 8, 12),
        {"embed": EMBED},
    ),
    "residual_spatial": (
        ResidualBlock(6, None, normalization=blocks.SpatialNorm(NORM)),
        MAP,
        (2, 4, 4, 6),
        {"embed": (2, 2, 2, 3)},
    ),
    "residual_fir_down": (ResidualBlock(normalization=NORM, resample="fir_downsample", project=True), MAP, HALF, {}),
    "residual_fir_up": (ResidualBlock(6, normalization=NORM, resample=FIRUpsample()), MAP, (2, 8, 8, 6), {}),
    "downsample_symmetric": (Downsample(padding="symmetric"), MAP, HALF, {}),
    "upsample_aligned": (Upsample("aligned", 6), MAP, (2, 8, 8, 6), {}),
    "fir_down": (FIRDownsample(), MAP, HALF, {}),
    "fir_down_convolution": (FIRDownsample((1, 2, 1), 6, convolution=True), MAP, (2, 2, 2, 6), {}),
    "fir_up": (FIRUpsample((1, 1)), MAP, TWICE, {}),
    "convnext": (ConvNeXtBlock(12, 5, 2), MAP, (2, 4, 4, 12), {"embed": EMBED}),
    "convnext_added": (ConvNeXtBlock(scale_shift=False, layer_scale=1e-6), MAP, MAP, {"embed": EMBED}),
    "convnext_alone": (ConvNeXtBlock(normalization=NORM, activation="relu"), MAP, MAP, {}),
    "simple": (SimpleBlock(6, groups=2), MAP, (2, 4, 4, 6), {"embed": EMBED}),
    "simple_alone": (SimpleBlock(groups=4), MAP, MAP, {}),
    "mp_dense": (blocks.MPDense(6), MAP, (2, 4, 4, 6), {}),
    "mp_conv": (blocks.MPConv(6), MAP, (2, 4, 4, 6), {}),
    "mp_block": (blocks.MagnitudePreservingBlock(12, dropout=0.2), MAP, (2, 4, 4, 12), {"embed": EMBED}),
    "mp_block_up": (
        blocks.MagnitudePreservingBlock(12, normalize=False, resample=NEAREST, balance=0.5, clip=None, kernel_size=1),
        MAP,
        (2, 8, 8, 12),
        {"embed": EMBED},
    ),
    "mp_block_alone": (blocks.MagnitudePreservingBlock(), MAP, MAP, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_block(name, tmp_path):
    check_block(*CASES[name], tmp_path)


@pytest.mark.parametrize("name", ["residual_up", "mp_block"])
def test_dropout_is_for_training(name):
    block, shape, _, others = CASES[name]
    model, inputs = model_of(block.clone(), shape, others), arrays(shape, others)
    perturb(model)
    np.testing.assert_array_equal(run(model, inputs), run(model, inputs))
    assert np.abs(run(model, inputs, training=True) - run(model, inputs)).max() > 1e-3


@pytest.mark.parametrize("block", [ConvNeXtBlock(), ConvNeXtBlock(layer_scale=0.0)])
def test_convnext_starts_as_the_identity(block):
    x = _random(2, 4, 4, 8)
    np.testing.assert_allclose(_numpy(block(x, embed=_random(2, 3))), x, atol=1e-6)


def _random(*shape):
    return np.random.default_rng(3).standard_normal(shape).astype("float32")


def _numpy(x):
    return ops.convert_to_numpy(ops.stop_gradient(x))


# --- resampling


@pytest.mark.parametrize("taps", [(1, 3, 3, 1), (1, 1), (1, 2, 1), (1, 4, 2, 5)])
def test_fir_is_the_convolution(taps):
    """At each output pixel, the sum over pixels of the filter at the distance between the two."""
    x, n, k = _random(2, 6, 6, 3), 6, len(taps)
    filter_ = np.array(taps) / sum(taps)
    before = (k - 2 + 1) // 2

    def matrix(rows, columns, place):
        taps_at = {i: f for i, f in enumerate(filter_)}
        return np.array([[taps_at.get(place(i, j), 0) for j in range(columns)] for i in range(rows)])

    down = matrix(n // 2, n, lambda i, j: k - 1 - (j + before - 2 * i))
    up = 2 * matrix(2 * n, n, lambda i, j: k - 1 - (2 * j + before + 1 - i))
    for layer, m in ((FIRDownsample(taps), down), (FIRUpsample(taps), up)):
        expected = np.einsum("ai,bj,nijc->nabc", m, m, x)
        np.testing.assert_allclose(_numpy(layer(x)), expected, atol=1e-5)


def test_fir_keeps_a_constant_inside():
    x = np.ones((1, 8, 8, 2), "float32")
    np.testing.assert_allclose(_numpy(FIRDownsample()(x))[:, 1:-1, 1:-1], 1, atol=1e-6)
    np.testing.assert_allclose(_numpy(FIRUpsample()(x))[:, 1:-1, 1:-1], 1, atol=1e-6)


def test_fir_of_two_taps_is_average_and_nearest():
    x = _random(2, 4, 6, 3)
    np.testing.assert_allclose(_numpy(FIRDownsample((1, 1))(x)), _numpy(AVERAGE.clone()(x)), atol=1e-6)
    np.testing.assert_allclose(_numpy(FIRUpsample((1, 1))(x)), _numpy(NEAREST.clone()(x)), atol=1e-6)


def test_aligned_upsampling_keeps_the_corners():
    x = _random(2, 3, 5, 4)
    y = _numpy(Upsample("aligned", convolution=False)(x))
    np.testing.assert_allclose(y[:, [0, -1]][:, :, [0, -1]], x[:, [0, -1]][:, :, [0, -1]], atol=1e-6)

    def along(x, axis):
        places = np.arange(2 * x.shape[axis]) * (x.shape[axis] - 1) / (2 * x.shape[axis] - 1)
        return np.apply_along_axis(lambda line: np.interp(places, np.arange(len(line)), line), axis, x)

    np.testing.assert_allclose(y, along(along(x, 1), 2), atol=1e-5)
    one = Upsample("aligned", convolution=False)(np.full((1, 1, 1, 1), 3.0, "float32"))
    np.testing.assert_array_equal(_numpy(one), np.full((1, 2, 2, 1), 3.0))


@pytest.mark.parametrize("sizes", [(4, 6), (2, 2)])
def test_symmetric_padding_is_the_formula(sizes):
    x, layer = _random(2, *sizes, 3), Downsample(width=5, padding="symmetric")
    y = _numpy(layer(x))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::2, ::2]
    np.testing.assert_allclose(y, np.einsum("nijcab,abcd->nijd", windows, layer.get_weights()[0]), atol=1e-5)


# --- magnitude


def test_activations_keep_their_magnitude():
    a, b = map(ops.convert_to_tensor, np.random.default_rng(0).standard_normal((2, 400, 400)).astype("float32"))
    assert np.mean(_numpy(blocks.mp_silu(a)) ** 2) == pytest.approx(1, abs=0.01)
    for t in (0.0, 0.3, 0.5, 1.0):
        assert np.mean(_numpy(blocks.mp_sum(a, b, t)) ** 2) == pytest.approx(1, abs=0.01)
        joined = _numpy(blocks.mp_concatenate(a, b[:, :50], t))
        parts = np.sum(joined[:, :400] ** 2), np.sum(joined[:, 400:] ** 2)
        assert sum(parts) / joined.size == pytest.approx(1, abs=0.02)
        assert parts[1] / sum(parts) == pytest.approx(t**2 / (t**2 + (1 - t) ** 2), abs=0.02)
    np.testing.assert_allclose(
        _numpy(blocks.mp_concatenate(a, b)), np.concatenate([_numpy(a), _numpy(b)], -1), rtol=1e-6
    )


@pytest.mark.parametrize("layer", [blocks.MPDense(64), blocks.MPConv(64, 1), blocks.MPConv(64, 3)])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_layers_keep_their_magnitude_whatever_the_scale_of_the_weights(layer, scale):
    layer, x = layer.clone(), _random(16, 16, 16, 32)
    layer.build(x.shape)
    layer.kernel.assign(scale * ops.convert_to_numpy(layer.kernel))
    y = _numpy(layer(x))[:, 1:-1, 1:-1]
    assert np.mean(y**2) == pytest.approx(1, abs=0.05)


def test_waves_keep_their_magnitude():
    layer = blocks.MPFourierEmbedding(5000, scale=2.0, seed=1)
    time = np.array([-3.0, 0.0, 0.1, 2.0], "float32")
    y = _numpy(layer(time))
    np.testing.assert_allclose(np.mean(y**2, -1), 1, atol=0.06)
    frequencies, phases = layer.get_weights()
    expected = np.sqrt(2) * np.cos(2 * np.pi * (time[:, None] * frequencies + phases))
    np.testing.assert_allclose(y, expected, atol=1e-3)
    assert (frequencies.std(), phases.min() >= 0, phases.max() <= 1) == (pytest.approx(2, abs=0.1), True, True)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("width", [128, 192])
def test_blocks_keep_their_magnitude(normalize, width):
    x = _random(8, 8, 8, 128)
    for _ in range(4):  # one after the other
        block = blocks.MagnitudePreservingBlock(width, normalize, kernel_size=1)
        x = block(x)
        assert np.mean(_numpy(x) ** 2) == pytest.approx(1, abs=0.15)


def test_training_sets_weights_back_to_unit_magnitude():
    model = model_of(blocks.MPConv(6), MAP, {})
    model.compile(keras.optimizers.SGD(10.0), "mse", jit_compile=False)
    model.fit(arrays(MAP, {}), _random(2, 4, 4, 6), verbose=0)
    (kernel,) = model.get_weights()
    np.testing.assert_allclose(np.mean(kernel**2, (0, 1, 2)), 1, atol=1e-3)


def test_unit_magnitude_is_the_formula():
    x = 5 * _random(3, 4)
    expected = x / (1e-4 + np.sqrt(np.mean(x**2, -1, keepdims=True)))
    np.testing.assert_allclose(_numpy(unit_magnitude(ops.convert_to_tensor(x), -1)), expected, rtol=1e-5)


# --- errors


@pytest.mark.once
def test_errors():
    x = np.ones((1, 4, 4, 8), "float32")
    cases = [
        (lambda: ResidualBlock(resample=Downsample())(x), "`resample` must have no weights.*Downsample"),
        (lambda: ResidualBlock(rescale=0), "`rescale`.*received: 0"),
        (lambda: Downsample(padding="valid"), "'same', 'symmetric'.*received: 'valid'"),
        (lambda: FIRDownsample((1,)), "`taps` must be at least two numbers"),
        (lambda: FIRUpsample((1, -1)), "nonzero sum"),
        (lambda: FIRDownsample(width=3), "`width` needs `convolution=True`; received: 3"),
        (lambda: FIRDownsample()(x[:, 1:]), "FIRDownsample: height and width must be even"),
        (lambda: ConvNeXtBlock(ratio=0), "`ratio`.*received: 0"),
        (lambda: ConvNeXtBlock(layer_scale=-1), "`layer_scale`.*received: -1"),
        (lambda: SimpleBlock(width=0), "`width`.*received: 0"),
        (lambda: SimpleBlock(4)(x), "must divide the 4 channels"),
        (lambda: blocks.MPConv(kernel_size=0), "MPConv: `kernel_size`"),
        (lambda: blocks.MPDense(0), "MPDense: `width`"),
        (lambda: blocks.MPFourierEmbedding(0), "`width`.*received: 0"),
        (lambda: blocks.MagnitudePreservingBlock(balance=2), r"`balance`.*\[0, 1\]; received: 2"),
        (lambda: blocks.MPConv()(x[0, 0]), "batch, height, width, channels"),
    ]
    for function, message in cases:
        with pytest.raises(ValueError, match=message):
            function()


# --- other ranks


@pytest.mark.parametrize(
    "layer",
    [
        Downsample("average"),
        FIRDownsample(),
        FIRUpsample(),
        *[Upsample(mode, convolution=False) for mode in ("nearest", "bilinear", "aligned")],
        blocks.SinCos2D(),
    ],
    ids=repr,
)
def test_each_axis_alone(layer):
    """What treats the axes of a map one after the other does to a series, and to a volume, what it does to a map."""
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 12)).astype("float32")

    def called(x):
        copied = blocks.base.copy_layer(layer)
        copied.build(x.shape)
        return ops.convert_to_numpy(copied(ops.convert_to_tensor(x)))

    if isinstance(layer, blocks.SinCos2D):
        waves = called(0 * x[:, :, 0, :6])[0]  # along an axis: its half of the channels of a map
        np.testing.assert_allclose(called(0 * x)[0, :, 0, 6:], waves, atol=1e-6)
        volume = called(np.zeros((1, 4, 5, 6, 18), "float32"))[0]
        np.testing.assert_allclose(volume[:, 0, 0, 12:], waves, atol=1e-6)
        np.testing.assert_allclose(volume[0, 0, :4, :6], waves, atol=1e-6)
        return
    rows = called(x.swapaxes(1, 2).reshape(12, 4, 12)).reshape(2, 6, -1, 12).swapaxes(1, 2)
    both = called(rows.reshape(-1, 6, 12)).reshape(2, rows.shape[1], -1, 12)
    np.testing.assert_allclose(called(x), both, atol=1e-5)
    volume = called(np.stack([x, x], 1))
    assert volume.shape[1] == (4 if isinstance(layer, (Upsample, FIRUpsample)) else 1)
    if not isinstance(layer, (FIRUpsample, FIRDownsample)):  # whose zeros before and behind are seen
        np.testing.assert_allclose(volume[:, 0], both, atol=1e-5)


def test_a_convolution_takes_the_rank_of_what_it_is_given():
    layer = blocks.Conv2D(3, 3, strides=2, padding="same")
    assert layer(np.ones((1, 8, 2), "float32")).shape == (1, 4, 3)
    assert layer.kernel.shape == (3, 2, 3)
    again = blocks.Conv2D.from_config(layer.get_config())
    assert again(np.ones((1, 4, 4, 4, 2), "float32")).shape == (1, 2, 2, 2, 3)
    depthwise = blocks.DepthwiseConv2D(3, strides=2, padding="same", depth_multiplier=2)
    for shape, half in (((1, 8, 2), (1, 4, 4)), ((1, 4, 4, 4, 2), (1, 2, 2, 2, 4))):
        again = blocks.DepthwiseConv2D.from_config(depthwise.get_config())
        assert again(np.ones(shape, "float32")).shape == half == tuple(again.compute_output_shape(shape))
    for kind, *arguments in ((blocks.Conv2D, 3), (blocks.DepthwiseConv2D,)):
        with pytest.raises(ValueError, match=rf"{kind.__name__}: .* another number of axes; .* shape: \(1, 8, 2\)"):
            kind(*arguments, (3, 5))(np.ones((1, 8, 2), "float32"))
        with pytest.raises(ValueError, match=f"{kind.__name__}: `data_format` must be"):
            kind(*arguments, 3, data_format="channels_first")


# --- diffusers


def _copy_conv(layer, theirs):
    kernel = theirs.weight.detach().numpy()
    layer.kernel.assign(kernel.transpose(2, 3, 1, 0) if kernel.ndim == 4 else kernel.T)
    layer.bias.assign(theirs.bias.detach().numpy())


def _copy_norm(layer, theirs):
    layer.gamma.assign(theirs.weight.detach().numpy())
    layer.beta.assign(theirs.bias.detach().numpy())


REFERENCES = {
    "default": ({}, {}),
    "scale_shift": ({"time_embedding_norm": "scale_shift"}, {"scale_shift": True}),
    "rescaled": ({"output_scale_factor": math.sqrt(2), "use_in_shortcut": True}, {"rescale": 2**0.5, "project": True}),
    "down": ({"down": True}, {"resample": AVERAGE}),
    "down_projected": ({"down": True, "use_in_shortcut": True}, {"resample": AVERAGE, "project": True}),
    "up": ({"up": True, "time_embedding_norm": "scale_shift"}, {"resample": NEAREST, "scale_shift": True}),
    "down_fir": ({"down": True, "kernel": "fir"}, {"resample": FIRDownsample()}),
    "up_fir": ({"up": True, "kernel": "fir"}, {"resample": FIRUpsample()}),
    "down_sde_vp": ({"down": True, "kernel": "sde_vp"}, {"resample": AVERAGE}),
    "up_sde_vp": ({"up": True, "kernel": "sde_vp"}, {"resample": NEAREST}),
}


@pytest.mark.reference
@pytest.mark.parametrize("width", [8, 16])
@pytest.mark.parametrize("name", REFERENCES)
def test_residual_block_is_that_of_diffusers(name, width):
    torch, resnet = pytest.importorskip("torch"), pytest.importorskip("diffusers.models.resnet")
    options, ours = REFERENCES[name]
    torch.manual_seed(0)
    theirs = resnet.ResnetBlock2D(in_channels=8, out_channels=width, temb_channels=6, groups=4, eps=1e-6, **options)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    block = ResidualBlock(width, **{"scale_shift": False, **ours}, normalization=blocks.GroupNorm(4, 1e-6))
    x, embed = _random(2, 4, 6, 8), _random(2, 6)
    block(x, embed=embed)
    second = block.second_normalization
    projection = block.projection or second.projection
    for layer, other in ((block.first, theirs.conv1), (block.second, theirs.conv2), (projection, theirs.time_emb_proj)):
        _copy_conv(layer, other)
    _copy_norm(block.normalization, theirs.norm1)
    _copy_norm(second.normalization if block.projection is None else second, theirs.norm2)
    assert (block.shortcut is None) == (theirs.conv_shortcut is None)
    if block.shortcut is not None:
        _copy_conv(block.shortcut, theirs.conv_shortcut)
    with torch.no_grad():
        expected = theirs(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(embed)).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(_numpy(block(x, embed=embed)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.reference
@pytest.mark.parametrize("convolution", [False, True])
def test_fir_resampling_is_that_of_diffusers(convolution):
    torch = pytest.importorskip("torch")
    down = pytest.importorskip("diffusers.models.downsampling")
    up = pytest.importorskip("diffusers.models.upsampling")
    x = _random(2, 4, 6, 8)
    image = torch.tensor(x.transpose(0, 3, 1, 2))
    theirs, ours = down.FirDownsample2D(8, 5, use_conv=convolution), FIRDownsample(convolution=convolution)
    if convolution:
        ours = ours.clone(width=5)
        ours(x)
        _copy_conv(ours.last, theirs.Conv2d_0)
    pairs = [(ours, theirs)] + ([] if convolution else [(FIRUpsample(), up.FirUpsample2D(8))])
    for layer, other in pairs:
        with torch.no_grad():
            expected = other(image).numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(_numpy(layer(x)), expected, atol=1e-5)


@pytest.mark.reference
@pytest.mark.parametrize("padding", [0, 1])
def test_strided_convolution_is_that_of_diffusers(padding):
    torch, module = pytest.importorskip("torch"), pytest.importorskip("diffusers.models.downsampling")
    x, theirs = _random(2, 4, 6, 8), module.Downsample2D(8, use_conv=True, padding=padding)
    layer = Downsample(padding=["same", "symmetric"][padding])
    layer(x)
    _copy_conv(layer.convolution, theirs.conv)
    with torch.no_grad():
        expected = theirs(torch.tensor(x.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(_numpy(layer(x)), expected, atol=1e-5)


@pytest.mark.reference
def test_aligned_upsampling_is_that_of_pytorch():
    torch = pytest.importorskip("torch")
    x = _random(2, 4, 6, 8)
    theirs = torch.nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
    expected = theirs(torch.tensor(x.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(_numpy(Upsample("aligned", convolution=False)(x)), expected, atol=1e-5)
