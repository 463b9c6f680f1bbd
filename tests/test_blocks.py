import keras
import numpy as np
import pytest
from keras import ops

from kdiff import backend, blocks
from kdiff.blocks.base import apply_layer, build_layer
from tests.helpers_gradients import perturb, run, value_and_gradients

MAP, TOKENS, EMBED, CONTEXT = (2, 4, 4, 8), (2, 5, 8), (2, 6), (2, 3, 7)
NORM = blocks.GroupNorm(2)

# name: (block, shape of x, shape of the output, shapes of other inputs)
CASES = {
    "group_norm": (blocks.GroupNorm(4), MAP, MAP, {}),
    "group_norm_plain": (blocks.GroupNorm(2, epsilon=1e-3, affine=False), TOKENS, TOKENS, {}),
    "layer_norm": (blocks.LayerNorm(), MAP, MAP, {}),
    "layer_norm_plain": (blocks.LayerNorm(epsilon=1e-3, affine=False), TOKENS, TOKENS, {}),
    "rms_norm": (blocks.RMSNorm(), TOKENS, TOKENS, {}),
    "rms_norm_plain": (blocks.RMSNorm(epsilon=1e-3, affine=False), MAP, MAP, {}),
    "adaptive_norm": (blocks.AdaptiveNorm(NORM), MAP, MAP, {"embed": EMBED}),
    "adaptive_norm_tokens": (
        blocks.AdaptiveNorm(blocks.LayerNorm(affine=False), activation=None, zero=False),
        TOKENS,
        TOKENS,
        {"embed": EMBED},
    ),
    "spatial_norm": (blocks.SpatialNorm(NORM), MAP, MAP, {"embed": (2, 2, 2, 3)}),
    "conv": (blocks.ConvBlock(normalization=NORM), MAP, MAP, {}),
    "conv_embed": (
        blocks.ConvBlock(6, kernel_size=1, normalization="rms_norm", activation="relu"),
        MAP,
        (2, 4, 4, 6),
        {"embed": EMBED},
    ),
    "residual": (blocks.ResidualBlock(normalization=NORM), MAP, MAP, {"embed": EMBED}),
    "residual_added": (
        blocks.ResidualBlock(12, scale_shift=False, dropout=0.5, kernel_size=1, activation="relu", seed=3),
        MAP,
        (2, 4, 4, 12),
        {"embed": EMBED},
    ),
    "residual_alone": (blocks.ResidualBlock(6, normalization=NORM), MAP, (2, 4, 4, 6), {}),
    "attention": (blocks.MultiHeadAttention(), TOKENS, TOKENS, {}),
    "attention_context": (
        blocks.MultiHeadAttention(2, head_width=3, bias=False, zero=True),
        TOKENS,
        TOKENS,
        {"context": CONTEXT},
    ),
    "self_attention": (blocks.SelfAttention(heads=2), MAP, MAP, {}),
    "self_attention_tokens": (
        blocks.SelfAttention(None, 4, blocks.AdaptiveNorm("rms_norm"), dropout=0.2, zero=False, seed=2),
        TOKENS,
        TOKENS,
        {"embed": EMBED},
    ),
    "cross_attention": (blocks.CrossAttention(2), MAP, MAP, {"context": CONTEXT}),
    "cross_attention_tokens": (
        blocks.CrossAttention(None, 4, "rms_norm", dropout=0.2, zero=False, seed=2),
        TOKENS,
        TOKENS,
        {"context": CONTEXT},
    ),
    "feed_forward": (blocks.FeedForward(2, "relu", "rms_norm", dropout=0.2, zero=False, seed=1), MAP, MAP, {}),
    "transformer": (blocks.TransformerBlock(2), MAP, MAP, {}),
    "transformer_all": (
        blocks.TransformerBlock(None, 4, 2, "relu", "rms_norm", adaptive=True, dropout=0.2, zero=False, seed=1),
        TOKENS,
        TOKENS,
        {"embed": EMBED, "context": CONTEXT},
    ),
    "downsample": (blocks.Downsample(), MAP, (2, 2, 2, 8), {}),
    "downsample_average": (blocks.Downsample("average", width=6), MAP, (2, 2, 2, 6), {}),
    "downsample_max": (blocks.Downsample("max"), MAP, (2, 2, 2, 8), {}),
    "upsample": (blocks.Upsample(), MAP, (2, 8, 8, 8), {}),
    "upsample_bilinear": (blocks.Upsample("bilinear", convolution=False), MAP, (2, 8, 8, 8), {}),
    "upsample_nearest": (blocks.Upsample("nearest", 6, convolution=False), MAP, (2, 8, 8, 6), {}),
    "upsample_transposed": (blocks.Upsample("transposed", width=6), MAP, (2, 8, 8, 6), {}),
    "positions": (blocks.LearnedEmbedding(stddev=0.1), MAP, MAP, {}),
    "mlp": (blocks.MLPEmbedding(blocks.SinusoidalEmbedding(8), width=6, activation="relu"), (2,), (2, 6), {}),
    "fourier": (blocks.MLPEmbedding(blocks.FourierEmbedding(8, scale=0.1)), (2,), (2, 32), {}),
    "chain": (
        blocks.Chain([blocks.ConvBlock(6), keras.layers.Dropout(0.5, seed=1), blocks.TransformerBlock()]),
        MAP,
        (2, 4, 4, 6),
        {"embed": EMBED, "context": CONTEXT},
    ),
}


def model_of(block, shape, others, **kwargs):
    """A functional model of one block."""
    inputs = {name: keras.Input(s[1:], name=name) for name, s in {"x": shape, **others}.items()}
    return keras.Model(inputs, block(inputs["x"], **{name: inputs[name] for name in others}))


def arrays(shape, others):
    rng = np.random.default_rng(2)
    return {name: rng.standard_normal(s).astype("float32") for name, s in {"x": shape, **others}.items()}


@pytest.mark.parametrize("name", CASES)
def test_block(name, tmp_path):
    check_block(*CASES[name], tmp_path)


@pytest.mark.parametrize(("shape", "size"), [((2, 4, 6, 8), (2, 3)), ((2, 5, 3, 4), (2, 3)), ((2, 6, 4), (4,))])
def test_spatial_norm_takes_the_nearest(shape, size):
    """Scale and shift of each position are those of the map's position floor(i * size / sizes of x)."""
    layer = blocks.SpatialNorm(NORM)
    z, x = (np.random.default_rng(i).standard_normal(s).astype("float32") for i, s in enumerate(((2, *size, 3), shape)))
    build_layer(layer, shape, z.shape)
    perturb(layer)
    for axis, (own, wanted) in enumerate(zip(size, shape[1:-1], strict=True), 1):
        z = z.take([i * own // wanted for i in range(wanted)], axis)
    scale, shift = (
        z @ ops.convert_to_numpy(one.kernel) + ops.convert_to_numpy(one.bias) for one in (layer.scale, layer.shift)
    )
    expected = ops.convert_to_numpy(layer.normalization(x)) * scale + shift
    given = np.random.default_rng(0).standard_normal((2, *size, 3)).astype("float32")
    np.testing.assert_allclose(ops.convert_to_numpy(layer(x, given)), expected, atol=1e-5)


def check_block(block, shape, out_shape, others, tmp_path):
    """What holds for every block."""
    model, inputs = model_of(block.clone(), shape, others), arrays(shape, others)
    assert tuple(model.output_shape[1:]) == out_shape[1:]
    perturb(model)
    expected, found = value_and_gradients(model, inputs)
    assert expected.shape == out_shape
    for path, gradient in found.items():
        if not path.endswith("key/bias"):  # the softmax does not see it: its gradient is zero but for rounding
            assert np.abs(gradient).max() > 1e-6, path
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(run(loaded, inputs), expected, rtol=1e-5, atol=1e-5)
    lower = model_of(_lower(block), shape, others)
    assert keras.backend.standardize_dtype(lower.output.dtype) == "bfloat16"
    lower.set_weights(model.get_weights())
    np.testing.assert_allclose(run(lower, inputs), expected, atol=0.05 * max(1, np.abs(expected).max()))


def _lower(block):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        config = _without_dtype(block.get_config())
        return type(block).from_config(config)
    finally:
        keras.config.set_dtype_policy(before)


def _without_dtype(config):
    if isinstance(config, dict):
        return {k: _without_dtype(v) for k, v in config.items() if k not in ("dtype", "name", "build_config")}
    return [_without_dtype(v) for v in config] if isinstance(config, list) else config


@pytest.mark.parametrize("name", ["residual_added", "transformer_all", "chain"])
def test_dropout_is_for_training(name):
    block, shape, _, others = CASES[name]
    model, inputs = model_of(block.clone(), shape, others), arrays(shape, others)
    perturb(model)
    assert np.abs(run(model, inputs, training=True) - run(model, inputs)).max() > 1e-3


# --- embeddings


@pytest.mark.parametrize(
    ("options", "shift", "sine_first", "max_period", "scale"),
    [
        ({}, 0, False, 10000, 1),
        ({"sine_first": True, "shift": 1}, 1, True, 10000, 1),
        ({"max_period": 100.0, "scale": 1000.0}, 0, False, 100, 1000),
        ({"scale": 1000.0, "offset": -1.0}, 0, False, 10000, 1000),
    ],
)
@pytest.mark.parametrize("width", [8, 9])
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_sinusoidal_embedding_is_the_formula(width, options, shift, sine_first, max_period, scale, dtype):
    time = np.array([0, 0.37, 1, 998, 999]) / scale
    half = width // 2
    angles = (scale * time[:, None] + options.get("offset", 0)) * np.exp(
        -np.log(max_period) * np.arange(half) / (half - shift)
    )
    waves = [np.sin(angles), np.cos(angles)] if sine_first else [np.cos(angles), np.sin(angles)]
    expected = np.concatenate([*waves, np.zeros((5, width % 2))], -1)
    y = blocks.SinusoidalEmbedding(width, dtype=dtype, **options)(time.astype("float32"))
    assert y.shape == (5, width)
    tolerance = 2e-4 if dtype == "float32" else 5e-3
    np.testing.assert_allclose(ops.convert_to_numpy(ops.cast(y, "float32")), expected, atol=tolerance)


@pytest.mark.parametrize("sine_first", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_fourier_embedding_is_the_formula(sine_first, dtype):
    layer = blocks.FourierEmbedding(64, scale=2.0, sine_first=sine_first, seed=5, dtype=dtype)
    time = np.array([-1.5, 0, 0.25, 999])
    y = ops.convert_to_numpy(ops.cast(layer(time.astype("float32")), "float32"))
    frequencies = layer.get_weights()[0].astype("float64")
    assert layer.trainable_weights == []
    assert frequencies.dtype == np.float64
    assert 1 < frequencies.std() < 3
    angles = 2 * np.pi * time[:, None] * frequencies
    waves = [np.sin(angles), np.cos(angles)] if sine_first else [np.cos(angles), np.sin(angles)]
    np.testing.assert_allclose(y, np.concatenate(waves, -1), atol=5e-3)


def test_whole_numbers_are_times_too():
    layer = blocks.SinusoidalEmbedding(8)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(layer(np.array([3, 999]))), ops.convert_to_numpy(layer(np.array([3.0, 999.0], "float32")))
    )


def test_tables_look_up_rows():
    table = blocks.LearnedEmbedding(5, width=3)
    y = ops.convert_to_numpy(table(np.array([[0, 4], [2, 2]])))
    np.testing.assert_array_equal(y, table.get_weights()[0][[[0, 4], [2, 2]]])
    labels = blocks.LabelEmbedding(1000, width=3, dtype="mixed_bfloat16")
    y = ops.convert_to_numpy(ops.cast(labels(np.array([999, 0])), "float32"))
    np.testing.assert_allclose(y, labels.get_weights()[0][[999, 0]], rtol=1e-2)


def test_labels_are_dropped_in_training_only():
    layer = blocks.LabelEmbedding(3, dropout=0.25, seed=1)
    y = layer(np.zeros(400, "int32"), embed=np.zeros((400, 4), "float32"), training=True)
    table = layer.get_weights()[0]
    assert table.shape == (4, 4)
    y = ops.convert_to_numpy(y)
    null = (y == table[3]).all(-1)
    assert 60 < null.sum() < 140
    np.testing.assert_array_equal(y[~null], np.repeat(table[:1], (~null).sum(), 0))
    y = layer(np.zeros(4, "int32"), embed=np.zeros((4, 4), "float32"), training=False)
    np.testing.assert_array_equal(ops.convert_to_numpy(y), np.repeat(table[:1], 4, 0))
    np.testing.assert_array_equal(ops.convert_to_numpy(layer(np.array([3]))), table[3:])


@pytest.mark.parametrize("labels", [[3], [-1], [0.5]])
def test_labels_out_of_range(labels):
    with pytest.raises(ValueError, match=r"0 \.\.\. 2"):
        blocks.LabelEmbedding(3, width=2)(np.array(labels))


def test_labels_out_of_range_in_compiled_code_are_nan():
    if keras.backend.backend() == "torch":
        pytest.skip("PyTorch runs what it is given: the labels are always known")
    label = keras.Input((), dtype="int32")
    model = keras.Model(label, blocks.LabelEmbedding(3, width=2)(label))
    model.compile()
    y = model.predict(np.array([0, 3, -1], "int32"), verbose=0)
    np.testing.assert_array_equal(np.isnan(y).any(-1), [False, True, True])


# --- the fast forms


def _random(*shape):
    return np.random.default_rng(3).standard_normal(shape).astype("float32")


@pytest.mark.parametrize("shape", [(2, 3, 5, 12), (2, 7, 12), (3, 12)])
@pytest.mark.parametrize("affine", [False, True])
def test_group_norm_is_the_formula(shape, affine):
    x, gamma, beta = 3 * _random(*shape) + 20, _random(12), _random(12) + 1
    groups = x.astype("float64").reshape(shape[0], -1, 4, 3)
    y = (groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-3)
    expected = y.reshape(shape) * gamma + beta if affine else y.reshape(shape)
    weights = map(ops.convert_to_tensor, (gamma, beta)) if affine else (None, None)
    y = ops.convert_to_numpy(backend.group_norm(ops.convert_to_tensor(x), 4, *weights, 1e-3))
    np.testing.assert_allclose(y, expected, atol=2e-5)


def test_layer_and_rms_norm_are_the_formulas():
    x = 3 * _random(2, 5, 12) + 20
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(ops.convert_to_numpy(blocks.LayerNorm()(x)), y, atol=2e-5)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(ops.convert_to_numpy(blocks.RMSNorm()(x)), y, atol=2e-5)


# On JAX: in one piece; two heads at a time; half the queries of a head at a time.
@pytest.mark.parametrize(("tokens", "keys"), [(5, 6), (512, 512), (1024, 1024)])
def test_attention_and_its_gradient_are_the_formula(tokens, keys):
    q, k, v = _random(2, tokens, 3, 4), _random(2, keys, 3, 4) + 0.3, _random(2, keys, 3, 4) - 0.5
    weights = np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(4))
    weights /= weights.sum(-1, keepdims=True)
    direction = _random(2, tokens, 3, 4)
    by_weight = np.einsum("bqhd,bkhd->bhqk", direction, v)
    by_logit = weights * (by_weight - (weights * by_weight).sum(-1, keepdims=True)) / np.sqrt(4)
    expected = (
        np.einsum("bhqk,bkhd->bqhd", by_logit, k),
        np.einsum("bhqk,bqhd->bkhd", by_logit, q),
        np.einsum("bhqk,bqhd->bkhd", weights, direction),
    )
    given, direction = [ops.convert_to_tensor(x.astype("float32")) for x in (q, k, v)], direction.astype("float32")
    for i in range(3):

        def attention(x, i=i):
            return backend.attention(*given[:i], x, *given[i + 1 :]), None

        y, pull, _ = backend.vjp(attention, given[i])
        gradient = ops.convert_to_numpy(pull(ops.convert_to_tensor(direction)))
        np.testing.assert_allclose(gradient, expected[i], atol=1e-5 + 1e-5 * np.abs(expected[i]).max())
    np.testing.assert_allclose(ops.convert_to_numpy(y), np.einsum("bhqk,bkhd->bqhd", weights, v), atol=1e-5)


def test_resampling_is_the_formula():
    x = _random(2, 4, 6, 3)
    squares, t = x.reshape(2, 2, 2, 3, 2, 3), ops.convert_to_tensor(x)
    np.testing.assert_allclose(ops.convert_to_numpy(backend.average_pool(t)), squares.mean((2, 4)), atol=1e-6)
    np.testing.assert_array_equal(ops.convert_to_numpy(backend.max_pool(t)), squares.max((2, 4)))
    np.testing.assert_array_equal(ops.convert_to_numpy(backend.upsample_nearest(t)), x.repeat(2, 1).repeat(2, 2))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")
    rows = np.stack([0.25 * padded[:, :-2] + 0.75 * padded[:, 1:-1], 0.75 * padded[:, 1:-1] + 0.25 * padded[:, 2:]], 2)
    rows = rows.reshape(2, 8, 8, 3)
    y = np.stack([0.25 * rows[:, :, :-2] + 0.75 * rows[:, :, 1:-1], 0.75 * rows[:, :, 1:-1] + 0.25 * rows[:, :, 2:]], 3)
    np.testing.assert_allclose(ops.convert_to_numpy(backend.upsample_bilinear(t)), y.reshape(2, 8, 12, 3), atol=1e-5)


# --- behaviour


@pytest.mark.parametrize("name", ["residual", "self_attention", "cross_attention", "transformer"])
def test_residuals_start_as_the_identity(name):
    block, shape, _, others = CASES[name]
    inputs = arrays(shape, others)
    np.testing.assert_allclose(run(model_of(block.clone(), shape, others), inputs), inputs["x"], atol=1e-6)


def test_unused_arguments_are_ignored():
    inputs = arrays(MAP, {"embed": EMBED, "context": CONTEXT})
    for block in (blocks.GroupNorm(4), blocks.SelfAttention(), blocks.Downsample(), blocks.TransformerBlock()):
        assert block(**inputs) is not None


@pytest.mark.once
def test_blocks_are_found_by_name_copied_and_shown():
    block = blocks.Block.get("residual_block")
    assert isinstance(block, blocks.ResidualBlock)
    copy = block.clone(width=4)
    assert (copy.width, copy.name != block.name) == (4, True)
    assert block != copy
    assert block == block
    assert len({block, copy}) == 2
    assert repr(copy) == "ResidualBlock(width=4, normalization=GroupNorm())"


def test_template_layers_do_not_share_weights():
    first, second = (blocks.ConvBlock(normalization=NORM) for _ in range(2))
    assert first.normalization is not second.normalization
    assert first.normalization.groups == 2


def test_a_plain_layer_is_called_with_what_it_takes():
    layer = keras.layers.Dense(3)
    assert tuple(build_layer(layer, (None, 4), (None, 2), (None, 5, 2))) == (None, 3)
    assert apply_layer(layer, np.ones((2, 4), "float32"), embed=np.ones((2, 2)), training=True).shape == (2, 3)


@pytest.mark.parametrize(
    ("channels", "groups", "used"),
    [(128, None, 32), (64, None, 16), (48, None, 12), (10, None, 2), (7, None, 1), (6, 6, 6)],
)
def test_groups_divide_the_channels(channels, groups, used):
    layer = blocks.GroupNorm(groups)
    layer.build((None, channels))
    assert layer.groups_used == used


@pytest.mark.once
def test_cost_of_a_bad_argument_is_a_clear_error():
    cases = [
        (lambda: blocks.SinusoidalEmbedding(1), "`width`.*at least 2; received: 1"),
        (lambda: blocks.SinusoidalEmbedding(2, shift=1), "`shift`.*less than half the width, 1; received: 1"),
        (lambda: blocks.FourierEmbedding(3), "`width` must be even; received: 3"),
        (lambda: blocks.ResidualBlock(width=0), "ResidualBlock: `width`.*received: 0"),
        (lambda: blocks.ResidualBlock(dropout=2), r"`dropout`.*\[0, 1\]; received: 2"),
        (lambda: blocks.GroupNorm(0), "`groups`.*received: 0"),
        (lambda: blocks.GroupNorm(4)(np.ones((1, 2, 6), "float32")), r"the 6 channels.*\[1, 2, 3, 6\].*received: 4"),
        (lambda: blocks.LearnedEmbedding(width=4), "`width` can only be given"),
        (lambda: blocks.LearnedEmbedding(3)(np.ones(2, "int32")), "`width` is required"),
        (lambda: blocks.LabelEmbedding(3, 4)(np.ones((2, 3), "int32")), r"received: \(2, 3\).*argmax"),
        (lambda: blocks.Downsample("mean"), "'average', 'max'.*received: 'mean'"),
        (lambda: blocks.Upsample("cubic"), "'nearest', 'bilinear', 'transposed'.*received: 'cubic'"),
        (lambda: blocks.Downsample()(np.ones((1, 3, 4, 2), "float32")), "must be even"),
        (lambda: blocks.ConvBlock()(np.ones((1, 3), "float32")), "batch, height, width, channels"),
        (lambda: blocks.SelfAttention()(np.ones((1, 3), "float32")), "map.*or tokens"),
        (lambda: blocks.MultiHeadAttention(3)(np.ones((1, 2, 8), "float32")), "`heads` must divide the 8 channels"),
        (lambda: blocks.MultiHeadAttention()(np.ones((1, 8), "float32")), "batch, tokens, channels"),
        (lambda: blocks.CrossAttention()(np.ones((1, 2, 8), "float32")), "`context` is required"),
        (lambda: blocks.AdaptiveNorm()(np.ones((1, 2, 8), "float32")), "`embed` is required"),
        (lambda: blocks.SpatialNorm().build((1, 2, 2, 8), (1, 8)), "SpatialNorm: `embed` must be a map"),
        (lambda: blocks.Block.get("residul_block"), "Did you mean 'residual_block'"),
    ]
    for function, message in cases:
        with pytest.raises(ValueError, match=message):
            function()


@pytest.mark.once
def test_an_embedding_forgotten_or_too_late():
    x, embed = np.ones((1, 2, 2, 4), "float32"), np.ones((1, 3), "float32")
    block = blocks.ResidualBlock()
    block(x, embed=embed)
    with pytest.raises(ValueError, match="built with an `embed`, but received none"):
        block(x)
    block = blocks.ConvBlock()
    block(x)
    with pytest.raises(ValueError, match="built without an `embed`, but received one"):
        block(x, embed=embed)
    positions = blocks.LearnedEmbedding()
    positions(x)
    with pytest.raises(ValueError, match=r"\(2, 2, 4\); received: \(3, 2, 4\)"):
        positions(np.ones((1, 3, 2, 4), "float32"))
