"""LoRA: what learns, what is averaged, saved, merged and removed."""

import keras
import numpy as np
import pytest
from keras import ops

import kdiff
from kdiff import lora
from kdiff.blocks import Conv2D, Dense
from kdiff.networks import UNet
from tests.toys import draw_weights, numpy

pytestmark = pytest.mark.eager

X = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 2)).astype("float32")
INPUTS = {"image": X, "time": np.linspace(0.0, 900.0, 4).astype("float32")}


def model_of(ema=0.9, make=UNet.residual):
    network = make(width=4, levels=1, depth=1)
    model = kdiff.DiffusionModel(network, ema=ema)
    model.build(X.shape)
    draw_weights(network)
    model.reset_ema()
    return model


def weights_of(network):
    return [numpy(weight).copy() for weight in network.weights]


def adapted(model, where="", rank=2, alpha=3.0, seed=1):
    """With A and B that are not zero."""
    paths = lora.enable(model, rank, where, alpha)
    generator = np.random.default_rng(seed)
    for layer in lora.enabled(model):
        for weight in (layer.lora_kernel_a, layer.lora_kernel_b):
            weight.assign(0.3 * generator.standard_normal(weight.shape))
    model.reset_ema()
    return paths


LAYERS = {
    "dense": (lambda **o: Dense(3, "silu", **o), (5, 4)),
    "no bias": (lambda **o: Dense(3, use_bias=False, **o), (5, 4)),
    "convolution": (lambda **o: Conv2D(3, 3, strides=2, padding="same", activation="silu", **o), (5, 6, 6, 4)),
    "dilated": (lambda **o: Conv2D(3, 3, dilation_rate=2, **o), (5, 6, 6, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_with_the_kernel_plus_scale_a_b(name):
    """And at first, with B = 0, as it did."""
    make, shape = LAYERS[name]
    x = np.random.default_rng(0).standard_normal(shape).astype("float32")
    layer = make()
    plain = numpy(layer(x))
    layer.enable_lora(2, lora_alpha=3)
    np.testing.assert_allclose(numpy(layer(x)), plain, atol=1e-6)
    draw_weights(layer)
    changed = make()
    changed.build(shape)
    a, b = numpy(layer.lora_kernel_a), numpy(layer.lora_kernel_b)
    changed._kernel.assign(numpy(layer._kernel) + 1.5 * (a @ b))
    if layer.bias is not None:
        changed.bias.assign(numpy(layer.bias))
    np.testing.assert_allclose(numpy(layer(x)), numpy(changed(x)), atol=1e-5)
    layer.disable_lora()
    assert len(layer.weights) == len(changed.weights)


def test_a_small_change_is_not_lost_in_low_precision():
    """Added to a bfloat16 kernel of 1, 2^-10 would be rounded away."""
    layer = Dense(1, use_bias=False, kernel_initializer="ones", dtype="mixed_bfloat16")
    layer.build((1, 2))
    layer.enable_lora(1)
    layer.lora_kernel_a.assign([[1.0], [0.0]])
    layer.lora_kernel_b.assign([[2.0**-10]])
    assert float(numpy(ops.cast(layer(np.float32([[1.0, -1.0]])), "float32"))[0, 0]) == 2.0**-10


def test_only_a_and_b_learn_and_are_averaged():
    model = model_of()
    before = {weight.path: numpy(weight).copy() for weight in model.network.weights}
    paths = lora.enable(model, 2, r"conv2d(_\d+)?$")
    assert paths
    assert all("conv2d" in path for path in paths)
    assert len(model.network.trainable_weights) == len(model.ema_weights.values) == 2 * len(paths)
    model.compile(keras.optimizers.Adam(1e-2))
    model.fit(X, epochs=3, batch_size=4, verbose=0)
    for weight in model.network.weights:
        if weight.path in before:
            np.testing.assert_array_equal(numpy(weight), before[weight.path], err_msg=weight.path)
    assert all(np.abs(numpy(layer.lora_kernel_b)).max() > 0 for layer in lora.enabled(model))
    learned = [layer.lora_kernel_b for layer in lora.enabled(model)]
    averages = {id(weight): average for weight, average in model.ema_weights.pairs(model.network)}
    assert all(np.abs(numpy(averages[id(weight)]) - numpy(weight)).max() > 0 for weight in learned)


@pytest.mark.parametrize("averages", [False, True])
def test_merged_the_network_computes_as_before(averages):
    model = model_of()
    count = len(model.network.weights)
    adapted(model)
    for average in model.ema_weights.values:
        average.assign(0.5 * numpy(average))
    model.ema_weights.updates.assign(1)
    with model.ema_weights.scope(model.network) if averages else keras.StatelessScope():
        wanted = numpy(model.network(INPUTS))
    lora.merge(model, averages)
    np.testing.assert_allclose(numpy(model.network(INPUTS)), wanted, atol=1e-5 * np.abs(wanted).max())
    assert len(model.network.weights) == count == len(model.ema_weights.values)
    assert not lora.enabled(model)


@pytest.mark.once
def test_removed_the_network_is_as_it_was():
    model = model_of()
    before, trainable = weights_of(model.network), [weight.trainable for weight in model.network.weights]
    plain = numpy(model.network(INPUTS))
    adapted(model, "conv2d")
    assert np.abs(numpy(model.network(INPUTS)) - plain).max() > 1e-3
    lora.remove(model)
    for one, other in zip(weights_of(model.network), before, strict=True):
        np.testing.assert_array_equal(one, other)
    assert [weight.trainable for weight in model.network.weights] == trainable
    model.compile("adam")
    model.fit(X, batch_size=4, verbose=0)
    assert any(np.any(one != other) for one, other in zip(weights_of(model.network), before, strict=True))


@pytest.mark.once
def test_saved_and_loaded_it_goes_on(tmp_path):
    """With A, B, their averages and the optimizer: the next step is the same."""
    model = model_of(make=UNet.attention)
    adapted(model, "conv2d|query")
    model.compile(keras.optimizers.Adam(1e-2))
    model.fit(X, epochs=2, batch_size=4, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert [layer.lora_alpha for layer in lora.enabled(again)] == [3.0] * len(lora.enabled(model))
    assert [weight.trainable for weight in again.network.weights] == [w.trainable for w in model.network.weights]
    for one in (model, again):
        one.fit(X, batch_size=4, verbose=0, shuffle=False)
    for pair in zip(weights_of(model), weights_of(again), strict=True):
        np.testing.assert_allclose(*pair, atol=1e-5)
    np.testing.assert_allclose(model.sample(1, steps=2), again.sample(1, steps=2), atol=1e-4)


@pytest.mark.once
def test_the_network_saved_alone_has_the_change_in_its_kernels(tmp_path):
    model = model_of()
    adapted(model)
    model.network.save(tmp_path / "network.keras")
    again = keras.saving.load_model(tmp_path / "network.keras")
    assert not lora.enabled(again)
    wanted = numpy(model.network(INPUTS))
    np.testing.assert_allclose(numpy(again(INPUTS)), wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.once
def test_weights_without_a_and_b_begin_it_anew(tmp_path):
    """Keras sets A to zeros too, so that neither would ever have a gradient."""
    plain = model_of(ema=None)
    plain.network.save_weights(tmp_path / "plain.weights.h5")
    model = model_of(ema=None)
    adapted(model)
    model.network.load_weights(tmp_path / "plain.weights.h5")
    np.testing.assert_allclose(numpy(model.network(INPUTS)), numpy(plain.network(INPUTS)), atol=1e-6)
    assert all(np.abs(numpy(layer.lora_kernel_a)).max() > 0 for layer in lora.enabled(model))


@pytest.mark.once
def test_errors():
    model = model_of(ema=None)
    with pytest.raises(ValueError, match=r"`where` must match the path of a layer, \[.*u_net.*more.*'nowhere'"):
        lora.enable(model, where="nowhere")
    with pytest.raises(ValueError, match="`rank` must be"):
        lora.enable(model, 0)
    with pytest.raises(ValueError, match="`alpha` must be"):
        lora.enable(model, 2, "", -1.0)
    lora.enable(model, 2, "")
    with pytest.raises(ValueError, match="already on"):
        lora.enable(model, 2, "")


@pytest.mark.once
def test_averages_become_the_weights_before_others_are_averaged():
    """What `sample` drew with them is drawn on."""
    model = model_of()
    for average in model.ema_weights.values:
        average.assign(0.5 * numpy(average))
    model.ema_weights.updates.assign(1)
    wanted = model.sample(2, steps=2)
    lora.enable(model, 2, "")
    np.testing.assert_allclose(model.sample(2, steps=2), wanted, atol=1e-5)
    lora.remove(model)
    np.testing.assert_allclose(model.sample(2, steps=2), wanted, atol=1e-5)
