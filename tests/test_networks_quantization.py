"""Dense layers in 8 bits: less memory, nearly the same output, before and after saving."""

import keras
import numpy as np
import pytest

import kdiff
from kdiff.blocks import Dense, LabelEmbedding, OptionalCondition
from kdiff.networks import DiT, MMDiT, UNet, adaptive_block
from tests.toys import draw_weights, numpy

LABEL = {"label": LabelEmbedding(3)}
TEXT = {"text": OptionalCondition()}
NETWORKS = {
    "dit": lambda: DiT(64, 2, 2, adaptive_block(2), conditions=LABEL),
    "mmdit": lambda: MMDiT(64, 2, conditions=TEXT),
    "unet": lambda: UNet.transformer(16, levels=2, depth=1, conditions=TEXT),
}


def inputs(name, batch=3):
    generator = np.random.default_rng(1)
    given = {"image": generator.standard_normal((batch, 8, 8, 4)).astype("float32")}
    given["time"] = np.linspace(1, 999, batch, dtype="float32")
    if name == "dit":
        return {**given, "label": np.arange(batch, dtype="int32") % 3}
    return {**given, "text": generator.standard_normal((batch, 5, 8)).astype("float32")}


def made(name):
    network = NETWORKS[name]()
    network.build({key: (None, *value.shape[1:]) for key, value in inputs(name).items()})
    return draw_weights(network, scale=0.1)  # about that of new ones


def size(network):
    """The bytes in the kernels of dense layers."""
    layers = [one for one in network._flatten_layers() if isinstance(one, Dense)]
    return sum(numpy(one._kernel).nbytes for one in layers)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_quarter_of_the_bytes_and_nearly_the_same_output(name, tmp_path):
    network = made(name)
    bytes_before, before = size(network), numpy(network(inputs(name)))
    network.quantize("int8")
    assert size(network) < 0.26 * bytes_before  # all of them: a tenth in float32 would make it 0.32
    after = numpy(network(inputs(name)))
    assert 0 < np.abs(after - before).max() < 0.05 * np.abs(before).max()
    network.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras")
    assert size(loaded) == size(network)
    np.testing.assert_allclose(numpy(loaded(inputs(name))), after, atol=1e-6)


@pytest.mark.parametrize("options", [{"mode": "int8", "activations": True}, {"mode": "int4"}])
def test_activations_and_four_bits(options, tmp_path):
    network = made("dit")
    before = numpy(network(inputs("dit")))
    network.quantize(**options)
    after = numpy(network(inputs("dit")))
    assert 0 < np.abs(after - before).max() < 0.3 * np.abs(before).max()
    network.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras")
    np.testing.assert_allclose(numpy(loaded(inputs("dit"))), after, atol=1e-6)


def test_some_layers(tmp_path):
    """By their names, which another process numbers in another way."""
    network = made("dit")
    network.quantize("int8", filters="query|key")
    modes = {(one.name, one.quantization_mode) for one in network._flatten_layers() if isinstance(one, Dense)}
    assert {name for name, mode in modes if mode} == {"query", "key"}
    assert ("value", None) in modes
    network.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras")
    np.testing.assert_allclose(numpy(loaded(inputs("dit"))), numpy(network(inputs("dit"))), atol=1e-6)


def test_a_model_is_quantized_by_its_averages_and_samples(tmp_path):
    model = kdiff.DiffusionModel(NETWORKS["dit"](), ema=0.5)
    model.compile(keras.optimizers.Adam(1e-2))
    images = np.random.default_rng(0).uniform(-1, 1, (8, 8, 8, 4)).astype("float32")
    model.build({"image": images.shape, "label": (8,)})
    draw_weights(model.network, scale=0.1)
    model.reset_ema()
    model.fit(images, np.arange(8, dtype="int32") % 3, batch_size=4, epochs=4, verbose=0)
    averaged = model.sample(3, steps=3, label=1)
    plain = model.sample(3, steps=3, label=1, ema=False)
    with pytest.raises(ValueError, match="mode"):
        model.quantize("float8")
    np.testing.assert_array_equal(model.sample(3, steps=3, label=1), averaged)
    model.quantize("int8")
    small = model.sample(3, steps=3, label=1)
    assert np.abs(small - averaged).max() < 0.5 * np.abs(plain - averaged).max()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.sample(3, steps=3, label=1), small, atol=1e-6)


def test_what_cannot_be_quantized():
    with pytest.raises(ValueError, match="built"):
        NETWORKS["dit"]().quantize("int8")
    network = made("dit")
    with pytest.raises(ValueError, match="choose none"):
        network.quantize("int8", filters="nowhere")
    with pytest.raises(ValueError, match="mode"):
        network.quantize("float8")
    network.quantize("int8")
    with pytest.raises(ValueError, match="already"):
        network.quantize("int8")
