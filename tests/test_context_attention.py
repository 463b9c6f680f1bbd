"""Attention to oneself and to a context at once, pooling by attention, and what stands beside the embedding of time."""

import keras
import numpy as np
import pytest
from keras import ops

from kdiff import DiffusionModel, blocks
from kdiff.blocks import Tokens
from kdiff.networks import Level, UNet
from tests.helpers_gradients import perturb, run
from tests.test_blocks import CONTEXT, EMBED, MAP, TOKENS, check_block
from tests.toys import images, mostly_once

CASES = {
    "joined": (
        blocks.ContextAttention(2, context_normalization="layer_norm", zero=False),
        MAP,
        MAP,
        {"context": CONTEXT},
    ),
    "only": (blocks.ContextAttention(None, 4, "rms_norm", only_context=True), TOKENS, TOKENS, {"context": CONTEXT}),
    "gated": (blocks.ContextAttention(2, bias=False, gated=True), TOKENS, TOKENS, {"context": CONTEXT, "embed": EMBED}),
    "pool": (blocks.AttentionPool(2), TOKENS, (2, 8), {}),
    "only_context": (blocks.TransformerBlock(2, only_context=True, zero=False), MAP, MAP, {"context": CONTEXT}),
    "embed_activation": (blocks.ResidualBlock(6, embed_activation="linear"), MAP, (2, 4, 4, 6), {"embed": EMBED}),
    "embed_activation_added": (
        blocks.ResidualBlock(6, False, embed_activation="relu"),
        MAP,
        (2, 4, 4, 6),
        {"embed": EMBED},
    ),
}


@pytest.mark.parametrize("name", mostly_once(CASES))
def test_block(name, tmp_path):
    check_block(*CASES[name], tmp_path)


@pytest.mark.parametrize("only", [False, True])
def test_what_is_hidden_changes_nothing(only):
    """And a mask that hides nothing is none."""
    layer = blocks.ContextAttention(2, only_context=only, zero=False)
    rng = np.random.default_rng(0)
    x, context = rng.normal(size=MAP).astype("float32"), rng.normal(size=(2, 5, 7)).astype("float32")
    layer.build(MAP, context_shape=(2, 5, 7))
    short = ops.convert_to_numpy(layer(x, context=context[:, :3]))
    mask = np.arange(5)[None] < np.array([[3], [3]])
    np.testing.assert_allclose(ops.convert_to_numpy(layer(x, context=Tokens(context, mask))), short, atol=1e-6)
    whole = ops.convert_to_numpy(layer(x, context=Tokens(context, np.ones((2, 5), bool))))
    np.testing.assert_allclose(whole, ops.convert_to_numpy(layer(x, context=context)), atol=1e-6)
    assert np.abs(whole - short).max() > 1e-3


def level(width, mixer, **options):
    return Level(width, 1, blocks.ResidualBlock(), mixer, **options)


def steered():
    """A U-Net with one input of two uses, and a vector beside the time."""
    mixer = blocks.ContextAttention(2, zero=False)
    embedding = blocks.GuidanceEmbedding(blocks.SinusoidalEmbedding(8), "scale", 3)
    tokens = blocks.Chain([keras.layers.Dense(8), keras.layers.Reshape((2, 4))])
    conditions = {"picture": blocks.VectorAndTokens(keras.layers.Dense(32), tokens)}
    levels = [level(8, None, up_mixer=[None, mixer]), level(8, mixer, up_mixer=None)]
    return UNet(levels, Level(8, 0), embedding, conditions)


def inputs_of():
    rng = np.random.default_rng(1)
    shapes = {"image": (2, 4, 4, 1), "picture": (2, 5), "scale": (2, 3)}
    made = {name: rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}
    return {**made, "time": np.array([1.0, 990.0], "float32")}


def test_a_vector_and_tokens_and_what_steers_the_time(tmp_path):
    """Each has an effect; what may be missing adds nothing; saved and loaded."""
    network, inputs = steered(), inputs_of()
    network.build({name: value.shape for name, value in inputs.items()})
    perturb(network)
    y, zero = run(network, inputs), {name: 0 * value for name, value in inputs.items()}
    unsteered = run(network, {**inputs, "scale": zero["scale"]})
    assert np.abs(unsteered - y).max() > 1e-4
    assert np.abs(run(network, {**inputs, "picture": zero["picture"]}) - y).max() > 1e-4
    without = {name: value for name, value in inputs.items() if name != "scale"}
    np.testing.assert_allclose(run(network, without), unsteered, atol=1e-6)
    network.save(tmp_path / "network.keras")
    np.testing.assert_allclose(run(keras.models.load_model(tmp_path / "network.keras"), inputs), y, atol=1e-5)


@pytest.mark.once
def test_training_and_sampling_with_and_without():
    model, batch = DiffusionModel(steered(), ema=None), {**inputs_of(), "image": images(2, (4, 4, 1))}
    del batch["time"]
    model.compile("adam")
    model.fit(batch, batch_size=2, epochs=1, verbose=0)
    conditions = {name: batch[name] for name in ("picture", "scale")}
    assert model.sample(2, steps=2, **conditions).shape == (2, 4, 4, 1)
    assert model.sample(2, steps=2, picture=batch["picture"]).shape == (2, 4, 4, 1)


@pytest.mark.once
def test_levels():
    attention = blocks.SelfAttention(2)
    one = level(8, [attention], up_mixer=[None, attention])
    assert [len(unit) for unit in one.units_down()] == [2]
    assert [len(unit) for unit in one.units_up()] == [1, 2]
    assert [len(unit) for unit in level(8, attention, up_mixers=1).units_up()] == [1, 2]
    with pytest.raises(ValueError, match="must have 1 entries, one per block; received: 2"):
        level(8, [attention, None])
    with pytest.raises(ValueError, match="a list of mixers for the encoder needs an `up_mixer`"):
        UNet([level(8, [attention])])
    with pytest.raises(ValueError, match="a `depth` of at least 1"):
        UNet([Level(8, 0)])
    with pytest.raises(ValueError, match="`context` is required"):
        blocks.ContextAttention()(np.ones((1, 2, 8), "float32"))
