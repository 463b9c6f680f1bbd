"""Dense layers in 8 bits: less memory, nearly the same output, before and after saving."""

import os
import signal

import keras
import numpy as np
import pytest

import kdiff
from kdiff import lora
from kdiff.blocks import Dense, LabelEmbedding, OptionalCondition
from kdiff.networks import MLP, DiT, MMDiT, UNet, adaptive_block
from kdiff.networks.quantization import Quantizable
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


SERIES = {"dit": NETWORKS["dit"], "unet": lambda: UNet.residual(16, levels=2, depth=1), "mlp": lambda: MLP(16, 2)}


@pytest.mark.once
@pytest.mark.parametrize("name", SERIES)
def test_networks_on_series_and_points(name, tmp_path):
    """All dense layers are quantized, and the convolutions of series stay as they are."""
    given = inputs("dit") if name == "dit" else {**inputs("dit"), "label": None}
    given = {key: value for key, value in given.items() if value is not None}
    given["image"] = given["image"][:, 0, 0] if name == "mlp" else given["image"][:, 0]
    network = SERIES[name]()
    network.build({key: (None, *value.shape[1:]) for key, value in given.items()})
    before = numpy(draw_weights(network, scale=0.1)(given))
    network.quantize("int8")
    after = numpy(network(given))
    assert 0 < np.abs(after - before).max() < 0.05 * np.abs(before).max()
    modes = {(type(one).__name__, one.quantization_mode) for one in network._flatten_layers() if hasattr(one, "kernel")}
    assert modes == {("Dense", "int8"), *([("Conv2D", None)] if name == "unet" else [])}
    network.save(tmp_path / "network.keras")
    np.testing.assert_allclose(numpy(keras.saving.load_model(tmp_path / "network.keras")(given)), after, atol=1e-6)


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


IMAGES = np.random.default_rng(0).uniform(-1, 1, (8, 8, 8, 4)).astype("float32")
LABELS = np.arange(8, dtype="int32") % 3


def small(ema=None, seed=0, **options):
    network = DiT(16, 1, 2, adaptive_block(2), conditions={"label": LabelEmbedding(3)}, **options)
    model = kdiff.DiffusionModel(network, ema=ema)
    model.build({"image": IMAGES.shape, "label": (8,)})
    draw_weights(model.network, seed, scale=0.1)
    return model


def change_of(model):
    """A and B of all layers."""
    pairs = [(layer.lora_kernel_a, layer.lora_kernel_b) for layer in lora.enabled(model)]
    return np.concatenate([numpy(weight).ravel() for pair in pairs for weight in pair])


def fit(model):
    model.fit(IMAGES, LABELS, batch_size=4, epochs=2, shuffle=False, verbose=0)


@pytest.mark.parametrize("first", ["quantize", "enable"])
def test_low_rank_changes_are_saved_beside_the_quantized_kernels(first, tmp_path):
    """To the last bit, and the next steps are the same."""
    model = small(ema=0.5)
    steps = {"quantize": lambda: model.quantize("int8"), "enable": lambda: lora.enable(model, 2, alpha=3.0)}
    for name in sorted(steps, key=lambda name: name != first):
        steps[name]()
    model.compile(keras.optimizers.Adam(1e-3))
    fit(model)
    assert np.abs(change_of(model)).min() > 0
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(change_of(loaded), change_of(model))
    np.testing.assert_array_equal(*(numpy(one.network(inputs("dit"))) for one in (loaded, model)))
    for one in (loaded, model):
        fit(one)
    np.testing.assert_allclose(change_of(loaded), change_of(model), atol=1e-6)


@pytest.mark.once
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_network_with_low_rank_changes_saved_alone(mode, tmp_path):
    """They are not merged, as into kernels in floating point: the sum would be rounded anew."""
    model = small()
    model.quantize(mode)
    lora.enable(model, 2, "")  # convolutions too
    draw_changes(model)
    wanted = numpy(model.network(inputs("dit")))
    model.network.save(tmp_path / "network.keras")
    model.network.save_weights(tmp_path / "network.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "network.keras")
    np.testing.assert_array_equal(numpy(loaded(inputs("dit"))), wanted)
    other = small(seed=1)
    other.quantize(mode)
    with pytest.raises(ValueError, match="objects could not be loaded"):
        other.network.load_weights(tmp_path / "network.weights.h5")
    lora.enable(other, 2, "")
    other.network.load_weights(tmp_path / "network.weights.h5")
    np.testing.assert_array_equal(numpy(other.network(inputs("dit"))), wanted)
    again = lora.enabled(loaded)
    assert [layer.lora_alpha for layer in again] == [layer.lora_alpha for layer in lora.enabled(model)]
    lora.freeze(loaded)
    assert len(loaded.trainable_weights) == 2 * len(again)
    with pytest.raises(ValueError, match=r"quantized.*rounded anew"):
        lora.merge(model)
    lora.remove(model)
    assert not lora.enabled(model)


def draw_changes(model):
    generator = np.random.default_rng(2)
    for layer in lora.enabled(model):
        for weight in (layer.lora_kernel_a, layer.lora_kernel_b):
            weight.assign(0.1 * generator.standard_normal(weight.shape))


def heavy(network, chosen, degrees=2):
    """With kernels of Student's t distribution in these layers."""
    generator = np.random.default_rng(0)
    for layer in network._dense_layers():
        if chosen(layer):
            layer._kernel.assign(0.1 * generator.standard_t(degrees, layer._kernel.shape))
    return network


def test_kernels_that_lose_too_much_in_8_bits_stay_or_are_refused(tmp_path):
    """The output then changes by less than 5 %."""
    network = heavy(made("dit"), lambda layer: layer.name == "key")
    before = numpy(network(inputs("dit")))
    with pytest.warns(UserWarning, match=r"of 1 of 25 dense layers by more than 1.5%.*stay in floating point"):
        network.quantize("int8")
    floating = {layer.name for layer in network._dense_layers() if layer.quantization_mode is None}
    assert floating == {"key"}
    after = numpy(network(inputs("dit")))
    assert np.linalg.norm(after - before) < 0.05 * np.linalg.norm(before)
    network.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras")
    assert {layer.name for layer in loaded._dense_layers() if layer.quantization_mode is None} == floating
    np.testing.assert_array_equal(numpy(loaded(inputs("dit"))), after)


@pytest.mark.once
@pytest.mark.parametrize("name", NETWORKS)
def test_heavy_tailed_networks_are_refused_and_left_alone(name):
    network = heavy(made(name), lambda layer: True)
    before = numpy(network(inputs(name)))
    with pytest.raises(
        ValueError, match=r"8 bits change the kernels of \d+ of \d+ .* would be quantized, less than 90%"
    ):
        network.quantize("int8")
    np.testing.assert_array_equal(numpy(network(inputs(name))), before)
    network.quantize("int4")  # has no limit


@pytest.mark.once
def test_float16_is_refused_with_advice(monkeypatch):
    half, mixed = small(dtype="mixed_float16"), small()
    mixed.network._dense_layers()[0].dtype_policy = "mixed_float16"
    for model, count in ((half, r"\d+"), (mixed, "1")):
        with pytest.raises(ValueError, match=f"cannot have .* 8 bits, {count} of .*'mixed_bfloat16' or 'float32'"):
            model.quantize("int8")
        assert {layer.quantization_mode for layer in model.network._dense_layers()} == {None}
    with monkeypatch.context() as changed:  # a Keras that calls it by another name
        changed.delattr(Quantizable, "_check_quantize_args")
        with pytest.raises(ValueError, match="float16"):
            half.quantize("int8")
    half.quantize("int8", filters=lambda layer: layer.compute_dtype == "float32")  # as that of the time


@pytest.mark.once
def test_an_interrupt_waits_until_all_layers_are_quantized(monkeypatch):
    """The averages would be left in the network, half of it quantized."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    quantize, caught = Dense.quantize, []

    def interrupted(self, *arguments, **options):
        if not caught:  # a second would not wait
            os.kill(os.getpid(), signal.SIGINT)
        caught.append(self)
        quantize(self, *arguments, **options)

    monkeypatch.setattr(Dense, "quantize", interrupted)
    try:
        for whole in (small(ema=0.5), small().network):
            caught.clear()
            with pytest.raises(KeyboardInterrupt):
                whole.quantize("int8")
            network = getattr(whole, "network", whole)
            assert {layer.quantization_mode for layer in network._dense_layers()} == {"int8"}
            assert getattr(whole, "ema", None) is None
    finally:
        signal.signal(signal.SIGINT, before)


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
