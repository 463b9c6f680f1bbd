"""Transformer blocks and patches: what holds for each, and against diffusers' with the same weights."""

import math

import keras
import numpy as np
import pytest
from keras import ops

from kdiff import blocks
from tests.helpers_gradients import perturb, run, value_and_gradients
from tests.test_blocks import CONTEXT, EMBED, MAP, TOKENS, arrays, check_block, model_of
from tests.toys import mostly_once

BOTH = {"embed": EMBED, "context": CONTEXT}
DIT = {
    "normalization": blocks.LayerNorm(1e-6, affine=False),
    "activation": "gelu_tanh",
    "adaptive": True,
    "gated": True,
}
CASES = {
    "glu": (blocks.FeedForward(8 / 3, "silu", glu=True), MAP, MAP, {}),
    "vectors": (blocks.FeedForward(0.5, "gelu_tanh", gated=True, drop_path=0.3), (2, 8), (2, 8), {"embed": EMBED}),
    "dit": (blocks.TransformerBlock(2, **DIT), MAP, MAP, {"embed": EMBED}),
    "dit_context": (blocks.TransformerBlock(2, **DIT, dropout=0.1, drop_path=0.2), MAP, MAP, BOTH),
    "local": (
        blocks.TransformerBlock(
            2, 4, 1.5, pattern=blocks.Window(2, 1), qk_norm="rms_norm", rotary="rotary", rescale=2**0.5, zero=False
        ),
        MAP,
        MAP,
        {},
    ),
    "stable_diffusion": (blocks.TransformerBlock(2, bias=False, glu=True), TOKENS, TOKENS, {"context": CONTEXT}),
    "clip": (blocks.TransformerBlock(2, activation="quick_gelu", pattern="causal"), TOKENS, TOKENS, {}),
    "t5": (
        blocks.TransformerBlock(2, 3, normalization="rms_norm", glu=True, bias=False, output_bias=False),
        TOKENS,
        TOKENS,
        {"context": CONTEXT},
    ),
    "spatial": (blocks.SpatialTransformer(2, 2), MAP, MAP, {"context": CONTEXT}),
    "spatial_local": (
        blocks.SpatialTransformer(
            1, 3, 4, blocks.TransformerBlock(adaptive=True, pattern=blocks.Neighborhood(3)), "layer_norm", False, seed=3
        ),
        MAP,
        MAP,
        {"embed": EMBED},
    ),
    "patchify": (blocks.Patchify(2, 5), MAP, (2, 2, 2, 5), {}),
    "patchify_plain": (blocks.Patchify(2, 5, bias=False), MAP, (2, 2, 2, 5), {}),
    "patchify_tokens": (blocks.Patchify(5, 3), TOKENS, (2, 1, 3), {}),
    "unpatchify": (blocks.Unpatchify(3, 2), MAP, (2, 12, 12, 2), {}),
    "unpatchify_tokens": (blocks.Unpatchify(3, 2, zero=True), TOKENS, (2, 15, 2), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_block(name, tmp_path):
    check_block(*CASES[name], tmp_path)


@pytest.mark.parametrize("name", mostly_once(CASES, 3))
def test_float16_is_finite(name):
    block, shape, _, others = CASES[name]
    model = model_of(block.clone(dtype="mixed_float16"), shape, others)
    perturb(model)
    assert np.isfinite(run(model, arrays(shape, others))).all()


# --- the residual


@pytest.mark.parametrize("name", ["dit", "dit_context", "stable_diffusion", "spatial", "glu"])
def test_starts_as_the_identity(name):
    block, shape, _, others = CASES[name]
    inputs = arrays(shape, others)
    np.testing.assert_allclose(run(model_of(block.clone(), shape, others), inputs), inputs["x"], atol=1e-6)


def test_a_gate_of_zero_learns():
    block, shape, _, others = CASES["dit"]
    _, gradients = value_and_gradients(model_of(block.clone(), shape, others), arrays(shape, others))
    gates = {path: gradient for path, gradient in gradients.items() if "gate" in path}
    assert len(gates) == 4
    assert all(np.abs(gradient).max() > 1e-6 for gradient in gates.values())


def test_gated_residual_is_the_formula():
    block, inputs = blocks.FeedForward(2, gated=True, rescale=3.0), arrays(TOKENS, {"embed": EMBED})
    model = model_of(block, TOKENS, {"embed": EMBED})
    perturb(model)
    x, embed = inputs["x"].astype("float64"), inputs["embed"].astype("float64")
    gate = (embed / (1 + np.exp(-embed))) @ weights(block.gate.kernel) + weights(block.gate.bias)
    branch = ops.convert_to_numpy(block._branch(block.normalization(inputs["x"]), None))
    np.testing.assert_allclose(run(model, inputs), (x + gate[:, None] * branch) / 3, atol=1e-5)


def test_paths_are_dropped_whole_and_rescaled():
    block, x = blocks.FeedForward(1, drop_path=0.25, zero=False, seed=1), np.ones((400, 2, 4), "float32")
    x *= np.arange(4)
    kept = ops.convert_to_numpy(block(x, training=False)) - x
    y = (ops.convert_to_numpy(block(x, training=True)) - x) / kept
    dropped = np.abs(y[:, 0, 0]) < 1e-4
    assert 60 < dropped.sum() < 140
    np.testing.assert_allclose(y, np.broadcast_to(np.where(dropped, 0, 4 / 3)[:, None, None], y.shape), atol=1e-3)


def test_dropouts_of_a_block_differ():
    block = blocks.SelfAttention(drop_path=0.5, dropout=0.5, seed=3)
    block.build((None, 4, 4, 8))
    assert block.drop.seed != block.drop_example.seed


def test_activations_are_the_formulas():
    x = np.linspace(-3, 3, 50)
    tanh = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    exact = 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))
    for name, expected in {"gelu_tanh": tanh, "gelu": exact}.items():
        y = blocks.FeedForward(activation=name)._activate(ops.convert_to_tensor(x, "float32"))
        np.testing.assert_allclose(ops.convert_to_numpy(y), expected, atol=2e-6)


@pytest.mark.once
def test_constructors_name_what_they_pass_on():
    block = blocks.SelfAttention(2, gated=True, rescale=2.0)
    shown = "SelfAttention(heads=2, normalization=GroupNorm(), pattern=Global(), gated=True, rescale=2.0)"
    assert repr(block) == shown
    assert block.clone(drop_path=0.5).get_config()["drop_path"] == 0.5
    with pytest.raises((TypeError, ValueError), match="patterns"):
        blocks.SelfAttention(patterns=2)


# --- patches


@pytest.mark.parametrize("channels", [1, 3])
def test_patchify_is_a_convolution(channels):
    x = arrays((2, 6, 9, channels), {})["x"]
    layer = blocks.Patchify(3, 5)
    y = layer(x)
    convolution = keras.layers.Conv2D(5, 3, strides=3)
    convolution.build(x.shape)
    kernel, bias = layer.get_weights()
    convolution.set_weights([kernel.reshape(3, 3, channels, 5), bias])
    np.testing.assert_allclose(ops.convert_to_numpy(y), ops.convert_to_numpy(convolution(x)), atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (2, 8, 3)])
def test_unpatchify_inverts_patchify(shape):
    x = arrays(shape, {})["x"]
    size = 2 ** (len(shape) - 2) * 3
    apart, together = blocks.Patchify(2, size), blocks.Unpatchify(2, 3)
    together.build(apart(x).shape)
    for layer in (apart, together):
        layer.set_weights([np.eye(size), np.zeros(size)])
    np.testing.assert_allclose(ops.convert_to_numpy(together(apart(x))), x, atol=1e-6)


def test_sizes_known_only_when_called():
    x = keras.Input((None, None, 3))
    y = blocks.Unpatchify(4, 2)(blocks.SpatialTransformer(1, 2)(blocks.Patchify(2, 8)(x)))
    model = keras.Model(x, y)
    assert model.output_shape == (None, None, None, 2)
    for height in (4, 6):
        assert run(model, np.ones((2, height, 4, 3), "float32")).shape == (2, 2 * height, 8, 2)


@pytest.mark.once
def test_errors():
    x = np.ones((1, 4, 6, 8), "float32")
    cases = [
        (lambda: blocks.Patchify(4, 2)(x), r"`size`, 4, must divide the size of `x`, \(4, 6\)"),
        (lambda: blocks.Patchify(0, 2), "`size`.*received: 0"),
        (lambda: blocks.Patchify(2, 2)(x[0, 0]), "map.*or tokens"),
        (lambda: blocks.Unpatchify(2, 0), "`channels`.*received: 0"),
        (lambda: blocks.Unpatchify(2, 2)(x[0, 0]), "map.*or tokens"),
        (lambda: blocks.FeedForward(0), "`ratio`.*received: 0"),
        (lambda: blocks.TransformerBlock(ratio="4"), "`ratio`.*received: '4'"),
        (lambda: blocks.TransformerBlock(gated=True)(x), "`embed` is required"),
        (lambda: blocks.SpatialTransformer(0), "`depth`.*received: 0"),
        (lambda: blocks.SpatialTransformer(1, 3)(x), "`heads` must divide the 8 channels"),
        (lambda: blocks.SpatialTransformer()(x[0, 0]), "map.*or tokens"),
    ]
    for function, message in cases:
        with pytest.raises(ValueError, match=message):
            function()


# --- diffusers


def weights(variable):
    return ops.convert_to_numpy(variable).astype("float64")


def randomise(module):
    import torch

    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def copy_dense(theirs, ours, rows=slice(None)):
    """A Linear or 1x1 convolution, or some of its outputs, into a Dense layer."""
    kernel = theirs.weight.detach().numpy().reshape(theirs.weight.shape[0], -1)[rows].T
    ours.set_weights([kernel, *([] if theirs.bias is None else [theirs.bias.detach().numpy()[rows]])])


def copy_attention(theirs, ours):
    copy_dense(theirs.to_q, ours.query)
    copy_dense(theirs.to_k, ours.key)
    copy_dense(theirs.to_v, ours.value)
    copy_dense(theirs.to_out[0], ours.output_layer)


def copy_norm(theirs, ours):
    ours.set_weights([theirs.weight.detach().numpy(), theirs.bias.detach().numpy()])


def copy_feed_forward(theirs, ours):
    copy_dense(theirs.net[0].proj, ours.hidden)
    copy_dense(theirs.net[2], ours.output_layer)


def assert_close(y, expected):
    np.testing.assert_allclose(ops.convert_to_numpy(y), expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.reference
def test_spatial_transformer_is_that_of_diffusers():
    import torch
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    theirs = randomise(Transformer2DModel(2, 16, 32, num_layers=2, norm_num_groups=8, cross_attention_dim=7))
    ours = blocks.SpatialTransformer(2, 2, 16, normalization=blocks.GroupNorm(8, 1e-6))
    inputs = arrays((2, 4, 6, 32), {"context": CONTEXT})
    model = model_of(ours, (2, 4, 6, 32), {"context": CONTEXT})
    copy_norm(theirs.norm, ours.normalization)
    copy_dense(theirs.proj_in, ours.projection_in)
    copy_dense(theirs.proj_out, ours.projection_out)
    for block, copy in zip(theirs.transformer_blocks, ours.blocks, strict=True):
        copy_norm(block.norm1, copy.self_attention.normalization)
        copy_norm(block.norm2, copy.cross_attention.normalization)
        copy_norm(block.norm3, copy.feed_forward.normalization)
        copy_attention(block.attn1, copy.self_attention.attention)
        copy_attention(block.attn2, copy.cross_attention.attention)
        copy_feed_forward(block.ff, copy.feed_forward)
    assert sum(p.numel() for p in theirs.parameters()) == model.count_params()
    with torch.no_grad():
        x, context = torch.tensor(inputs["x"]).permute(0, 3, 1, 2), torch.tensor(inputs["context"])
        expected = theirs(x, context, return_dict=False)[0].permute(0, 2, 3, 1).numpy()
    assert_close(run(model, inputs), expected)


@pytest.mark.reference
def test_transformer_block_is_that_of_dit_in_diffusers():
    import torch
    from diffusers.models.attention import BasicTransformerBlock

    options = {"activation_fn": "gelu-approximate", "num_embeds_ada_norm": 3, "attention_bias": True}
    options |= {"norm_type": "ada_norm_zero", "norm_elementwise_affine": False, "norm_eps": 1e-6}
    theirs = randomise(BasicTransformerBlock(32, 2, 16, **options))
    ours, x = blocks.TransformerBlock(2, **DIT), arrays((2, 4, 6, 32), {})["x"]
    with torch.no_grad():
        time, label = torch.tensor([3, 700]), torch.tensor([0, 2])
        embed = theirs.norm1.emb(time, label, hidden_dtype=torch.float32).numpy()
        expected = theirs(torch.tensor(x.reshape(2, 24, 32)), timestep=time, class_labels=label).numpy()
    ours(x, embed=embed)
    attention, feed_forward = ours.self_attention, ours.feed_forward
    copy_attention(theirs.attn1, attention.attention)
    copy_feed_forward(theirs.ff, feed_forward)
    shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = np.arange(6 * 32).reshape(6, 32)
    linear = theirs.norm1.linear
    copy_dense(linear, attention.normalization.projection, np.concatenate([scale_a, shift_a]))
    copy_dense(linear, attention.gate, gate_a)
    copy_dense(linear, feed_forward.normalization.projection, np.concatenate([scale_f, shift_f]))
    copy_dense(linear, feed_forward.gate, gate_f)
    assert_close(ours(x, embed=embed), expected.reshape(x.shape))


@pytest.mark.reference
def test_patches_are_those_of_dit_in_diffusers():
    import torch
    from diffusers.models.embeddings import PatchEmbed

    theirs = randomise(PatchEmbed(8, 8, 2, 4, 12))
    patchify, x = blocks.Patchify(2, 12), arrays((2, 8, 8, 4), {})["x"]
    patchify.build(x.shape)
    kernel = theirs.proj.weight.detach().numpy().transpose(2, 3, 1, 0).reshape(-1, 12)
    patchify.set_weights([kernel, theirs.proj.bias.detach().numpy()])
    y = blocks.SinCos2D()(patchify(x))
    with torch.no_grad():
        expected = theirs(torch.tensor(x).permute(0, 3, 1, 2)).numpy()
    assert_close(y, expected.reshape(2, 4, 4, 12))
