"""The block of image and text, against its equation in NumPy; what is hidden; and the table of positions."""

import keras
import numpy as np
import pytest
from keras import ops

from kdiff import blocks
from kdiff.blocks import JointBlock, PositionTable, SinCos2D, Tokens, TransformerBlock, adaptive_block
from tests.helpers_gradients import perturb

pytestmark = pytest.mark.eager

MAP, TOKENS, EMBED = (2, 2, 3, 8), (2, 5, 8), (2, 6)
X, CONTEXT, VECTOR = (
    np.random.default_rng(i).standard_normal(shape).astype("float32") for i, shape in enumerate((MAP, TOKENS, EMBED))
)


def built(**options):
    block = JointBlock(adaptive_block(2, qk_norm="rms_norm"), **options)
    block.build(MAP, EMBED, TOKENS)
    perturb(block)
    return block


def called(block, context=CONTEXT):
    y, tokens = block(X, embed=VECTOR, context=context)
    return ops.convert_to_numpy(y), tokens


@pytest.mark.parametrize("options", [{}, {"dual": True}, {"last": True}], ids=str)
def test_the_equation(options):
    """Step by step with the layers of the block, and attention over both by NumPy."""
    block = built(**options)
    y, tokens = called(block)
    image = block.image.self_attention
    x = X.reshape(2, 6, 8)
    text = block.text_attention if block.last else block.text.self_attention.attention
    norm = block.text_norm if block.last else block.text.self_attention.normalization
    parts = []
    for layer, normed in (
        (image.attention, image.normalization(x, embed=VECTOR)),
        (text, norm(CONTEXT, embed=VECTOR)),
    ):
        parts.append(tuple(ops.convert_to_numpy(one) for one in layer.projected(normed, normed)))
    q, k, v = (np.concatenate([one, other], axis=1) for one, other in zip(*parts, strict=True))
    logits = np.einsum("bqhd,bkhd->bhqk", q, k) / 2.0  # sqrt(head_width)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    found = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(axis=-1, keepdims=True), v).reshape(2, 11, 8)

    def gated(branch, given, attended):
        gate = ops.convert_to_numpy(branch.gate(ops.silu(VECTOR)))
        return given + gate[:, None] * ops.convert_to_numpy(branch.attention.output_layer(attended))

    wanted = gated(image, x, found[:, :6])
    if block.dual:
        alone = block.dual_attention
        wanted = wanted + ops.convert_to_numpy(alone(x, embed=VECTOR)) - x
    wanted = ops.convert_to_numpy(block.image.feed_forward(wanted, embed=VECTOR))
    np.testing.assert_allclose(y.reshape(2, 6, 8), wanted, atol=2e-5)
    if block.last:
        assert tokens is None
        return
    wanted = gated(block.text.self_attention, CONTEXT, found[:, 6:])
    wanted = ops.convert_to_numpy(block.text.feed_forward(wanted, embed=VECTOR))
    np.testing.assert_allclose(ops.convert_to_numpy(tokens), wanted, atol=2e-5)


def test_what_is_hidden_changes_nothing():
    """And the mask goes on with the tokens; a mask that hides nothing is none."""
    block = built()
    short, others = called(block, CONTEXT[:, :3])
    mask = np.arange(5)[None] < np.array([[3], [3]])
    y, tokens = called(block, Tokens(CONTEXT, mask))
    np.testing.assert_allclose(y, short, atol=1e-5)
    np.testing.assert_allclose(ops.convert_to_numpy(tokens.values)[:, :3], ops.convert_to_numpy(others), atol=1e-5)
    assert np.array_equal(tokens.mask, mask)
    whole, _ = called(block, Tokens(CONTEXT, np.ones((2, 5), bool)))
    np.testing.assert_allclose(whole, called(block)[0], atol=1e-5)
    assert np.abs(whole - short).max() > 1e-3


@pytest.mark.once
def test_it_begins_as_the_identity():
    block = JointBlock(adaptive_block(2), dual=True)
    y, tokens = block(X, embed=VECTOR, context=CONTEXT)
    np.testing.assert_array_equal(ops.convert_to_numpy(y), X)
    np.testing.assert_array_equal(ops.convert_to_numpy(tokens), CONTEXT)


@pytest.mark.once
def test_multiply_adds():
    """11 queries by 11 keys, 8 channels of all heads, twice, in 2 examples."""
    assert built().multiply_adds(MAP, EMBED, TOKENS) == 2 * 2 * 11 * 11 * 8


@pytest.mark.once
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JointBlock(keras.layers.Dense(3)), "must be a TransformerBlock"),
        (lambda: JointBlock(TransformerBlock(2, pattern=blocks.Window(2))), "joint attention is global"),
        (lambda: JointBlock(TransformerBlock(2, rotary="rotary")), "without rotary positions"),
        (lambda: JointBlock(TransformerBlock(2)).build(MAP), "`context` is required"),
        (lambda: JointBlock(TransformerBlock(2)).build(MAP, None, (2, 5, 7)), "must have 8 channels, as `x` has"),
        (lambda: PositionTable(4)(np.zeros((1, 5, 4, 8), "float32")), "must be at most 4 x 4"),
        (lambda: PositionTable(4)(np.zeros((1, 4, 8), "float32")), "must be a map"),
        (lambda: PositionTable(4)(np.zeros((1, 4, 4, 6), "float32")), "a multiple of 4"),
        (lambda: PositionTable(0), "`size`.*received: 0"),
        (lambda: PositionTable(4, base_size=0), "`base_size`.*received: 0"),
    ],
)
def test_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize("base", [None, 3])
def test_positions_are_the_middle_of_those_of_the_whole_table(base):
    """As those of `SinCos2D` on a map as large as the table; of a map of another parity, one more before than after."""
    whole = ops.convert_to_numpy(SinCos2D(base_size=base)(np.zeros((1, 6, 6, 8), "float32")))
    layer = PositionTable(6, base)
    for height, width, top, left in ((6, 6, 0, 0), (2, 4, 2, 1), (3, 1, 1, 2)):
        x = np.random.default_rng(0).standard_normal((2, height, width, 8)).astype("float32")
        found = ops.convert_to_numpy(layer(x))
        np.testing.assert_allclose(found, x + whole[:, top : top + height, left : left + width], atol=1e-6)
    assert not layer.trainable_variables
