"""Patterns and positions against their definitions, and what holds for each block of attention."""

import keras
import numpy as np
import pytest
from keras import ops

from kdiff import backend, blocks
from tests.helpers_gradients import perturb, run
from tests.test_blocks import CONTEXT, EMBED, MAP, TOKENS, arrays, check_block, model_of
from tests.toys import mostly_once

SPACE = (2, 4, 6, 8)
CASES = {
    "map": (blocks.MultiHeadAttention(2), SPACE, SPACE, {}),
    "map_context": (blocks.MultiHeadAttention(2, 6, bias=False, qk_norm="rms_norm"), MAP, MAP, {"context": CONTEXT}),
    "window": (blocks.MultiHeadAttention(2, pattern=blocks.Window(2, 1), rotary="rotary"), SPACE, SPACE, {}),
    "neighborhood": (
        blocks.SelfAttention(2, pattern=blocks.Neighborhood(3), qk_norm=blocks.RMSNorm(1e-3), zero=False),
        SPACE,
        SPACE,
        {},
    ),
    "linear": (blocks.SelfAttention(2, pattern="linear", bias=False, rescale=2**0.5), TOKENS, TOKENS, {}),
    "causal": (blocks.SelfAttention(2, pattern="causal", output_bias=False), TOKENS, TOKENS, {}),
    "rotary": (
        blocks.SelfAttention(2, rotary=blocks.Rotary(frequencies=[1.0]), gated=True, drop_path=0.5, seed=4),
        TOKENS,
        TOKENS,
        {"embed": EMBED},
    ),
    "cross": (
        blocks.CrossAttention(2, bias=False, qk_norm="rms_norm", gated=True, drop_path=0.5, rescale=1.5),
        MAP,
        MAP,
        {"context": CONTEXT, "embed": EMBED},
    ),
    "sin_cos": (blocks.SinCos2D(), SPACE, SPACE, {}),
    "sin_cos_base": (blocks.SinCos2D(100.0, base_size=16, interpolation_scale=2.0), SPACE, SPACE, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_block(name, tmp_path):
    check_block(*CASES[name], tmp_path)


@pytest.mark.parametrize("name", mostly_once(CASES, ("map_context", "neighborhood", "linear")))
def test_float16_is_finite(name):
    block, shape, _, others = CASES[name]
    model = model_of(block.clone(dtype="mixed_float16"), shape, others)
    perturb(model)
    assert np.isfinite(run(model, arrays(shape, others))).all()


# --- patterns


def heads(*shape, seed=0):
    """q, k and v of this shape."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype("float32") for _ in range(3)]


def naive(q, k, v, sees):
    """Attention in float64 where position i sees position j if `sees(i, j)`, for positions (row, column)."""
    batch, height, width, _, channels = q.shape
    at = [(i, j) for i in range(height) for j in range(width)]
    seen = np.array([[sees(i, j) for j in at] for i in at])
    q, k, v = (x.reshape(batch, height * width, *x.shape[-2:]).astype("float64") for x in (q, k, v))
    weights = np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(channels)) * seen
    y = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
    return y.reshape(batch, height, width, *y.shape[2:])


def applied(pattern, arrays):
    return ops.convert_to_numpy(pattern(*map(ops.convert_to_tensor, arrays)))


def test_global_is_full_attention():
    qkv = heads(2, 3, 4, 2, 5)
    np.testing.assert_allclose(applied(blocks.Global(), qkv), naive(*qkv, lambda i, j: True), atol=1e-5)
    flat = [x.reshape(2, 12, 2, 5) for x in qkv]
    np.testing.assert_allclose(applied(blocks.Global(), flat), applied(blocks.Global(), qkv).reshape(2, 12, 2, 5))


@pytest.mark.parametrize(("size", "shift"), [(4, 0), (4, 1), (4, 2), (4, 3), (2, 1), (1, 0)])
def test_window_is_masked_full_attention(size, shift):
    qkv = heads(2, 4, 8, 2, 5)

    def sees(i, j):
        return all((a - shift) // size == (b - shift) // size for a, b in zip(i, j, strict=True))

    np.testing.assert_allclose(applied(blocks.Window(size, shift), qkv), naive(*qkv, sees), atol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 5, 7])
@pytest.mark.parametrize("shape", [(7, 8), (12, 17)])
def test_neighborhood_is_masked_full_attention(size, shape):
    qkv = heads(2, *shape, 2, 3)

    def sees(i, j):
        firsts = [min(max(a - size // 2, 0), length - size) for a, length in zip(i, shape, strict=True)]
        return all(first <= b < first + size for first, b in zip(firsts, j, strict=True))

    np.testing.assert_allclose(applied(blocks.Neighborhood(size), qkv), naive(*qkv, sees), atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 4, 2, 5), (2, 12, 2, 5)])
def test_linear_is_the_table_of_weights(shape):
    q, k, v = heads(*shape)
    flat = [x.reshape(2, 12, 2, 5).astype("float64") for x in (q, k, v)]
    a = np.exp(flat[0]) / np.exp(flat[0]).sum(-1, keepdims=True)
    b = np.exp(flat[1]) / np.exp(flat[1]).sum(1, keepdims=True)
    weights = np.einsum("bqhd,bkhd->bhqk", a, b)
    np.testing.assert_allclose(weights.sum(-1), 1)
    expected = np.einsum("bhqk,bkhd->bqhd", weights, flat[2]).reshape(shape)
    np.testing.assert_allclose(applied(blocks.Linear(), (q, k, v)), expected, atol=1e-5)


def test_attention_takes_a_mask():
    q, k, v = heads(2, 5, 3, 4)
    mask = np.random.default_rng(1).random((2, 5, 5)) < 0.5
    mask |= np.eye(5, dtype=bool)
    weights = np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(4)) * mask[:, None]
    expected = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
    y = backend.attention(*map(ops.convert_to_tensor, (q, k, v, mask)))
    np.testing.assert_allclose(ops.convert_to_numpy(y), expected, atol=1e-5)


def test_causal_sees_what_came_before():
    qkv = heads(2, 3, 4, 2, 5)
    np.testing.assert_allclose(applied(blocks.Causal(), qkv), naive(*qkv, lambda i, j: j <= i), atol=1e-5)


@pytest.mark.parametrize("pattern", ["global", "causal"])
@pytest.mark.parametrize("rows", mostly_once([1, 2]))
def test_a_bias_is_added_to_the_logits(pattern, rows):
    """Without a mask, and with one that leaves the first example nothing at all."""
    q, k, v = heads(2, 5, 3, 4)
    bias = np.random.default_rng(1).standard_normal((rows, 3, 5, 5)).astype("float32")
    mask = np.array([[0, 0, 0, 0, 0], [0, 1, 1, 0, 1]], bool)
    for hides in (True, False):
        allowed = np.tri(5, dtype=bool)[None] | (pattern == "global")
        allowed = mask[:, None] & allowed if hides else np.repeat(allowed, 2, 0)
        weights = np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) / 2 + bias) * allowed[:, None]
        expected = np.einsum("bhqk,bkhd->bqhd", weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30), v)
        options = {"mask": ops.convert_to_tensor(mask)} if hides else {}
        y = blocks.Pattern.get(pattern)(
            *map(ops.convert_to_tensor, (q, k, v)), bias=ops.convert_to_tensor(bias), **options
        )
        np.testing.assert_allclose(ops.convert_to_numpy(y), expected, atol=1e-5)


@pytest.mark.once
def test_patterns_are_values_found_by_name():
    assert blocks.Pattern.get("window") == blocks.Window(8)
    assert blocks.Window(4, 2) != blocks.Window(4)
    assert repr(blocks.Neighborhood(5)) == "Neighborhood(size=5)"
    assert sorted(blocks.Pattern.names()) == ["causal", "global", "linear", "neighborhood", "window"]
    assert blocks.RelativePositions.get("rotary") == blocks.Rotary()
    layer = blocks.MultiHeadAttention(
        2, pattern={"class_name": "kdiff.blocks>Window", "config": {"size": 2, "shift": 1}}
    )
    assert layer.pattern == blocks.Window(2, 1)


@pytest.mark.once
def test_costs_are_counted():
    shape = (1, 8, 8, 6)
    for pattern, keys in {"global": 64, "linear": 3, "window": 64, blocks.Neighborhood(3): 9}.items():
        assert blocks.MultiHeadAttention(2, pattern=pattern).multiply_adds(shape) == 2 * 64 * keys * 6
    assert blocks.MultiHeadAttention(2).multiply_adds(shape, context_shape=(1, 5, 7)) == 2 * 64 * 5 * 6


@pytest.mark.parametrize("pattern", ["global", "linear", blocks.Window(2, 1), blocks.Neighborhood(3)])
def test_sizes_known_only_when_called(pattern):
    x = keras.Input((None, None, 8))
    y = blocks.SelfAttention(2, pattern=pattern, rotary="rotary", zero=False)(blocks.SinCos2D()(x))
    model = keras.Model(x, y)
    assert model.output_shape == (None, None, None, 8)
    for height in (4, 6):
        assert run(model, np.ones((2, height, 4, 8), "float32")).shape == (2, height, 4, 8)


# --- positions


def turned(x, frequencies, at):
    """Pairs of channels (i, n + i) as complex numbers, turned."""
    n = len(frequencies)
    z = (x[..., :n] + 1j * x[..., n:]) * np.exp(1j * at[..., None, None] * np.asarray(frequencies))
    return np.concatenate([z.real, z.imag], -1)


@pytest.mark.parametrize(("options", "waves"), [({}, [1, 10**-1]), ({"max_period": 16.0}, [1, 0.25])])
def test_rotary_on_maps_is_the_formula(options, waves):
    x = heads(2, 5, 7, 3, 8)[0]
    row, column = np.meshgrid(np.arange(5), np.arange(7), indexing="ij")
    expected = np.concatenate([turned(x[..., :4], waves, row), turned(x[..., 4:], waves, column)], -1)
    y = ops.convert_to_numpy(blocks.Rotary(**options)(ops.convert_to_tensor(x)))
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_rotary_on_tokens_turns_as_many_as_asked():
    x = heads(2, 9, 3, 7)[0]
    expected = np.concatenate([turned(x[..., :4], [1.0, 0.3], np.arange(9)), x[..., 4:]], -1)
    y = ops.convert_to_numpy(blocks.Rotary(frequencies=[1.0, 0.3])(ops.convert_to_tensor(x)))
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_rotary_attention_sees_differences():
    """Moved by two rows and one column, the same queries and keys have the same products."""
    q, k, _ = heads(1, 1, 1, 1, 8)
    q, k = (blocks.Rotary()(ops.convert_to_tensor(np.broadcast_to(x, (1, 6, 6, 1, 8)).copy())) for x in (q, k))
    products = ops.convert_to_numpy(ops.einsum("bijhd,bklhd->ijkl", q, k))
    np.testing.assert_allclose(products[:4, :5, :4, :5], products[2:, 1:, 2:, 1:], atol=1e-5)
    assert np.abs(products[0, 0, 0, 1] - products[0, 0, 1, 0]) > 1e-3


@pytest.mark.parametrize(("base", "scale"), [(None, 1.0), (16, 2.0)])
def test_sin_cos_is_the_formula(base, scale):
    height, width, channels = 3, 5, 8
    y = blocks.SinCos2D(base_size=base, interpolation_scale=scale)(np.zeros((1, height, width, channels), "float32"))
    waves = 10000.0 ** (-np.arange(2) / 2)
    for i in range(height):
        for j in range(width):
            u, v = (j, i) if base is None else (j * base / width, i * base / height)
            parts = [np.sin(waves * u / scale), np.cos(waves * u / scale), np.sin(waves * v / scale)]
            expected = np.concatenate([*parts, np.cos(waves * v / scale)])
            np.testing.assert_allclose(ops.convert_to_numpy(y)[0, i, j], expected, atol=1e-5)


@pytest.mark.reference
@pytest.mark.parametrize(("shape", "base", "scale"), [((16, 16), 16, 1.0), ((8, 12), 16, 2.0), ((64, 64), 32, 1.0)])
def test_sin_cos_is_that_of_diffusers(shape, base, scale):
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    theirs = get_2d_sincos_pos_embed(64, shape, base_size=base, interpolation_scale=scale, output_type="pt").numpy()
    ours = blocks.SinCos2D(base_size=base, interpolation_scale=scale)(np.zeros((1, *shape, 64), "float32"))
    np.testing.assert_allclose(ops.convert_to_numpy(ours)[0].reshape(-1, 64), theirs, atol=1e-5)


# --- errors


@pytest.mark.once
def test_errors():
    x, tokens = np.ones((1, 4, 6, 8), "float32"), np.ones((1, 5, 8), "float32")
    cases = [
        (lambda: blocks.Window(0), "Window: `size`.*received: 0"),
        (lambda: blocks.Window(4, 4), "`shift` must be less than the size, 4; received: 4"),
        (lambda: blocks.Neighborhood(4), "`size` must be odd; received: 4"),
        (lambda: blocks.SelfAttention(pattern=blocks.Window(4))(x), r"`size`, 4, must divide.*\(4, 6\)"),
        (lambda: blocks.SelfAttention(pattern=blocks.Neighborhood(5))(x), r"`size`, 5, must be at most.*\(4, 6\)"),
        (lambda: blocks.SelfAttention(pattern="window")(tokens), r"Window: `size`, 8.*\(5,\)"),
        (lambda: blocks.SelfAttention(pattern="neighborhood")(tokens), r"Neighborhood: `size`, 7.*\(5,\)"),
        (lambda: blocks.Window(4)(*heads(1, 6, 8, 1, 2)), r"must divide height and width; received: \(6, 8\)"),
        (lambda: blocks.SelfAttention(pattern="windows"), "Did you mean 'window'"),
        (lambda: blocks.Rotary(0.5), "`max_period`.*received: 0.5"),
        (lambda: blocks.SelfAttention(4, rotary="rotary")(x), "a multiple of 4; received: 2"),
        (lambda: blocks.SelfAttention(8, rotary="rotary")(tokens), "a multiple of 2; received: 1"),
        (lambda: blocks.SelfAttention(2, rotary=blocks.Rotary(frequencies=[1, 2]))(x), "need 8 channels.*heads of 4"),
        (lambda: blocks.SinCos2D()(np.ones((1, 2, 2, 6), "float32")), "a multiple of 4; received: 6"),
        (lambda: blocks.SinCos2D()(tokens[0]), "batch, height, width, channels"),
        (lambda: blocks.SinCos2D(base_size=0), "`base_size`.*received: 0"),
        (lambda: blocks.SelfAttention(gated=True)(x), "`embed` is required.*gate"),
        (lambda: blocks.SelfAttention(drop_path=2), r"`drop_path`.*\[0, 1\]; received: 2"),
        (lambda: blocks.SelfAttention(rescale=0), "`rescale`.*received: 0"),
        (lambda: blocks.MultiHeadAttention()(np.ones((1, 8), "float32")), "map.*or tokens"),
    ]
    for function, message in cases:
        with pytest.raises(ValueError, match=message):
            function()


@pytest.mark.once
def test_an_embedding_forgotten_later():
    block = blocks.SelfAttention(gated=True)
    block(np.ones((1, 2, 2, 8), "float32"), embed=np.ones((1, 3), "float32"))
    with pytest.raises(ValueError, match="`embed` is required"):
        block(np.ones((1, 2, 2, 8), "float32"))


# --- masks: what is padded changes nothing


@pytest.mark.parametrize("pattern", ["global", "linear", blocks.Window(2, 1), blocks.Window(4), blocks.Neighborhood(3)])
def test_a_pattern_sees_what_the_mask_shows(pattern):
    """Hidden keys and values may be anything; where nothing is left to see there is 0."""
    pattern = blocks.Pattern.get(pattern)
    q, k, v = heads(2, 4, 8, 2, 5)
    mask = np.random.default_rng(1).random((2, 4, 8)) < 0.7
    mask[1, :, 4:] = False
    other = [np.where(mask[..., None, None], x, 9 * x + 1).astype("float32") for x in (k, v)]
    y = applied(pattern, (q, k, v, mask))
    np.testing.assert_allclose(applied(pattern, (q, *other, mask)), y, atol=1e-6)
    assert np.abs(applied(pattern, (q, k, v)) - y).max() > 0.01
    assert np.all(applied(pattern, (q, k, v, np.zeros_like(mask))) == 0)
    np.testing.assert_allclose(applied(pattern, (q, k, v, np.ones_like(mask))), applied(pattern, (q, k, v)), atol=1e-6)


@pytest.mark.parametrize("pattern", ["global", "linear"])
def test_hidden_keys_might_as_well_not_be_there(pattern):
    q, k, v = heads(2, 7, 2, 5)
    mask = np.arange(7) < np.array([[4], [4]])
    expected = applied(blocks.Pattern.get(pattern), (q[:, :4], k[:, :4], v[:, :4]))
    np.testing.assert_allclose(applied(blocks.Pattern.get(pattern), (q, k, v, mask))[:, :4], expected, atol=1e-6)


@pytest.mark.parametrize("tokens", [5, 1200])
def test_long_and_short_rows_are_masked_alike(tokens):
    """1200 keys are more than JAX computes in one block."""
    q, k, v = heads(1, tokens, 2, 4)
    mask = (np.arange(tokens) < 3 * tokens // 4)[None, None]
    weights = np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) / 2) * mask[:, None]
    expected = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
    y = backend.attention(*map(ops.convert_to_tensor, (q, k, v, mask)))
    np.testing.assert_allclose(ops.convert_to_numpy(y), expected, atol=1e-5)
