"""Embeddings as conditions: an image's as a vector and tokens, lost by itself, or noised; tokens with a mask."""

import keras
import numpy as np
import pytest

from kdiff import DiffusionModel, random, schedules
from kdiff.blocks import (
    ImageEmbedding,
    MaskedTokens,
    MLPEmbedding,
    NoisedEmbedding,
    SinusoidalEmbedding,
    TextEncoder,
    TransformerBlock,
)
from kdiff.blocks.conditions import DROPPING
from kdiff.blocks.noising import AUGMENTING, LEVELS
from kdiff.networks import DiT
from kdiff.text import Bytes
from tests.helpers_gradients import run
from tests.toys import draw_weights, mostly_once, numpy

X = np.random.default_rng(0).standard_normal((3, 5)).astype("float32")


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_a_vector_and_tokens(policy):
    """By hand; a row of NaN is what is learned for none."""
    layer = ImageEmbedding(4, 3, dtype=policy)
    layer.build((None, 5), (None, 6))
    draw_weights(layer)
    x = X.copy()
    x[1] = np.nan
    made = layer(x, np.zeros((3, 6), "float32"))
    x[1] = numpy(layer.learned)
    dense = [(numpy(one.kernel), numpy(one.bias)) for one in (layer.to_vector, layer.to_tokens)]
    vector, tokens = (x @ kernel + bias for kernel, bias in dense)
    tolerance = {"atol": 1e-5 if policy == "float32" else 0.05}
    np.testing.assert_allclose(numpy(made.vector).astype("float32"), vector, **tolerance)
    np.testing.assert_allclose(numpy(made.tokens).astype("float32"), tokens.reshape(3, 3, 4), **tolerance)
    assert keras.backend.standardize_dtype(made.vector.dtype) == layer.compute_dtype
    spec = layer.compute_output_spec(keras.KerasTensor((None, 5)), keras.KerasTensor((None, 6)))
    assert (spec.vector.shape, spec.tokens.shape) == ((None, 6), (None, 3, 4))


@pytest.mark.once
def test_image_and_text_are_lost_each_by_itself():
    """In the paper's shares: 10 % of the images, 50 % of the texts, 5 % of both."""
    image = ImageEmbedding(4, 0, dropout=0.1, seed=1)
    text = TextEncoder(Bytes(3), 4, 0, dropout=0.5, seed=2)
    lost = []
    for layer, x in ((image, np.ones((4000, 5), "float32")), (text, np.ones((4000, 3), "int32"))):
        layer.build((None, *x.shape[1:]), (None, 4))
        dropped = numpy(layer._dropped(x, layer._next())).reshape(4000, -1)
        lost.append(np.isnan(dropped[:, 0]) if layer is image else dropped[:, 0] == 0)
    np.testing.assert_allclose(
        [lost[0].mean(), lost[1].mean(), (lost[0] & lost[1]).mean()], [0.1, 0.5, 0.05], atol=0.02
    )


def test_in_a_network(tmp_path):
    """Vector and tokens are both seen, and come back from a file; a masked token is not seen."""
    conditions = {"embedding": ImageEmbedding(4, 2), "context": MaskedTokens()}
    network = DiT(8, 1, 2, TransformerBlock(2, adaptive=True), conditions=conditions)
    rng = np.random.default_rng(1)
    inputs = {"image": rng.standard_normal((3, 4, 4, 1)), "embedding": X, "context": rng.standard_normal((3, 2, 4))}
    inputs = {name: value.astype("float32") for name, value in inputs.items()} | {"time": np.zeros(3, "float32")}
    inputs["context_mask"] = np.array([[1, 0]] * 3, "int32")
    network.build({name: (None, *value.shape[1:]) for name, value in inputs.items()})
    draw_weights(network)
    y = run(network, inputs)
    condition = network.conditions["embedding"]
    for part in (condition.to_vector, condition.to_tokens):
        kernel = numpy(part.kernel)
        part.kernel.assign(0 * kernel)
        assert np.abs(run(network, inputs) - y).max() > 1e-4
        part.kernel.assign(kernel)
    changed = inputs["context"] * np.array([1, 7], "float32")[:, None]
    np.testing.assert_allclose(run(network, {**inputs, "context": changed}), y, atol=1e-6)
    assert np.abs(run(network, {**inputs, "context": 7 * inputs["context"]}) - y).max() > 1e-4
    network.save(tmp_path / "network.keras")
    np.testing.assert_allclose(run(keras.saving.load_model(tmp_path / "network.keras"), inputs), y, atol=1e-6)


MEAN, STD = np.arange(5, dtype="float32"), np.arange(1, 6, dtype="float32")


def noised(**options):
    waves = SinusoidalEmbedding(4, scale=1000.0, offset=-1.0)
    return NoisedEmbedding(schedules.CosineBeta(1000), MEAN, STD, waves, seed=3, **options)


def test_a_noised_embedding_is_a_formula():
    """In training of a level an example, by the counters alone; otherwise of the level and the noise that are given."""
    layer = noised(layer=keras.layers.Identity(), max_level=0.5, dropout=0.4)
    x = np.random.default_rng(0).standard_normal((40, 5)).astype("float32")
    layer.build({"embedding": (None, 5)}, (None, 9))

    def expected(z, level, noise):
        marginal = layer.noise.at(level)
        alpha, sigma = (numpy(one)[:, None] for one in (marginal.alpha, marginal.sigma))
        z = MEAN + STD * (alpha * (z - MEAN) / STD + sigma * noise)
        angles = (1000.0 * level - 1.0)[:, None] * np.array([1.0, 0.01])
        return np.concatenate([z, np.cos(angles), np.sin(angles)], axis=1)

    for call in range(2):
        key = np.array([3, call], "int32")
        level = 0.5 * numpy(random.uniform(random.fold_in(key, 0, LEVELS), (40,)))
        noise = numpy(random.normal(random.fold_in(key, 0, AUGMENTING), (40, 5)))
        dropped = numpy(random.uniform(random.fold_in(key, 0, DROPPING), (40,))) < 0.4
        wanted = np.where(dropped[:, None], 0.0, expected(x, level, noise))
        assert 5 < dropped.sum() < 35
        np.testing.assert_allclose(numpy(layer({"embedding": x}, training=True).vector), wanted, atol=1e-3)
    level, noise = np.linspace(0.1, 0.9, 40).astype("float32"), x[::-1].copy()
    found = layer({"embedding": x, "level": level, "noise": noise}).vector
    np.testing.assert_allclose(numpy(found), expected(x, level, noise), atol=1e-3)
    first, again = (numpy(layer({"embedding": x}).vector) for _ in range(2))
    np.testing.assert_array_equal(again, first)
    np.testing.assert_array_equal(numpy(layer({"embedding": 0 * x}).vector), np.zeros((40, 9)))


@pytest.mark.parametrize("policy", mostly_once(["mixed_bfloat16", "float32"]))
def test_a_noised_embedding_in_a_model(policy, tmp_path):
    """It learns, is given a level, can be left out, and comes back from a file."""
    layer = noised(dropout=0.5, layer=MLPEmbedding(keras.layers.Identity(), 8, dtype=policy), dtype=policy)
    network = DiT(8, 1, 2, TransformerBlock(2, adaptive=True), conditions={"embedding": layer}, dtype=policy)
    model = DiffusionModel(network, ema=None)
    model.compile("adam")
    data = {"image": np.random.default_rng(1).uniform(-1, 1, (3, 4, 4, 1)).astype("float32"), "embedding": X}
    assert np.isfinite(model.fit(data, verbose=0).history["loss"]).all()
    draw_weights(network)
    options = {"steps": 2, "embedding": X}
    y = model.sample(3, **options)
    for other in ({"embedding": X[::-1]}, {"embedding_level": 0.9}, {"embedding_noise": X}, {"guidance": 3.0}):
        assert np.abs(model.sample(3, **{**options, **other}) - y).max() > 1e-3
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(again.sample(3, **options), y, atol=1e-5)
    with pytest.raises(ValueError, match="NoisedEmbedding: a level must be a number in"):
        model.sample(3, **options, embedding_level=2.0)


@pytest.mark.once
def test_what_it_refuses():
    with pytest.raises(ValueError, match="`noise` must be given, `mean` finite and `std` positive"):
        NoisedEmbedding(schedules.Cosine(), std=0.0)
    with pytest.raises(ValueError, match="and `mean` and `std` of that size; received: "):
        noised().build({"embedding": (None, 4)})
    with pytest.raises(ValueError, match="one vector per example"):
        ImageEmbedding(4).build((None, 2, 5))
    with pytest.raises(ValueError, match="`tokens` must be a whole number of at least 0"):
        ImageEmbedding(4, -1)
