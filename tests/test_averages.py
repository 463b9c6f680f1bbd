"""Averaged weights: the formula, and when they move."""

import keras
import numpy as np
import pytest

import kdiff
from kdiff.averages import Averages
from kdiff.model.sampling import COMPILED_STEPS
from tests.toys import numpy, tiny_network

FIRST, SECOND = np.float32([[1.0, -2.0]]), np.float32([[3.0, 4.0]])


@pytest.fixture
def network():
    layer = keras.layers.Dense(2, use_bias=False)
    layer.build((None, 1))
    layer.kernel.assign(FIRST)
    return layer


def test_averages_move_when_the_optimizer_has_made_an_update_and_not_else(network):
    """decay_0 = 1 / 10 and decay_1 = 2 / 11; between them the optimizer only accumulates gradients."""
    averages = Averages(0.9)
    averages.follow(network)
    network.kernel.assign(SECOND)
    averages.update(network, 0)  # no update yet
    np.testing.assert_array_equal(numpy(averages.values[0]), FIRST)
    averages.update(network, 1)
    first = 0.1 * FIRST + 0.9 * SECOND
    np.testing.assert_allclose(numpy(averages.values[0]), first, rtol=1e-6)
    for _ in range(3):
        averages.update(network, 1)
    np.testing.assert_allclose(numpy(averages.values[0]), first, rtol=1e-6)
    averages.update(network, 2)
    np.testing.assert_allclose(numpy(averages.values[0]), (2 * first + 9 * SECOND) / 11, rtol=1e-6)
    assert int(numpy(averages.updates)) == 2


def test_the_decay_is_reached(network):
    averages = Averages(0.3)
    averages.follow(network)
    averages.updates.assign(5)  # 6 / 15 is more
    network.kernel.assign(SECOND)
    averages.update(network, 1)
    np.testing.assert_allclose(numpy(averages.values[0]), 0.3 * FIRST + 0.7 * SECOND, rtol=1e-6)
    averages.reset(network)
    np.testing.assert_array_equal(numpy(averages.values[0]), SECOND)


def test_a_scope_computes_with_the_averages(network):
    averages = Averages(0.9)
    averages.follow(network)
    network.kernel.assign(SECOND)
    with averages.scope(network):
        np.testing.assert_array_equal(numpy(network(np.ones((1, 1), "float32"))), FIRST)
    np.testing.assert_array_equal(numpy(network(np.ones((1, 1), "float32"))), SECOND)


def test_averages_that_were_never_moved_are_not_used():
    """In a training loop of one's own, until it calls `update_averages`; evaluation is traced with either."""
    x = np.zeros((2, 4, 4, 1), "float32")
    model = kdiff.DiffusionModel(tiny_network((4, 4, 1)))
    model.build(x.shape)
    model.compile("adam")
    for weight in model.network.weights:
        weight.assign(2.0 * weight)
    plain, loss = model.sample(1, steps=2, averages=False), model.evaluate(x, verbose=0)
    np.testing.assert_allclose(model.sample(1, steps=2), plain, atol=1e-6)
    model.update_averages()  # decay_0 = 1 / 10
    np.testing.assert_allclose(numpy(model.averages.values[0]), numpy(model.network.weights[0]) * 0.95, rtol=1e-5)
    averaged = model.sample(1, steps=2)
    assert np.abs(averaged - plain).max() > 1e-4
    assert model.evaluate(x, verbose=0) != pytest.approx(loss, rel=1e-4)
    with model.averages.scope(model.network):
        weights = [numpy(weight.value) for weight in model.network.weights]
    model.network.set_weights(weights)
    np.testing.assert_allclose(model.sample(1, steps=2, averages=False), averaged, atol=1e-5)


def test_a_network_that_changes():
    """New weights are an error that says what to call, before anything is trained."""
    network = tiny_network((4, 4, 1))
    model = kdiff.DiffusionModel(network)
    model.compile("adam")
    x = np.zeros((2, 4, 4, 1), "float32")
    model.build(x.shape)
    model.update_averages()
    next(layer for layer in network.layers if isinstance(layer, keras.layers.Dense)).enable_lora(2)
    model.compile("adam")
    with pytest.raises(ValueError, match="reset_averages"):
        model.sample(1, steps=2)
    with pytest.raises(ValueError, match="reset_averages"):
        model.fit(x, verbose=0)
    assert int(numpy(model.step)) == 0
    model.reset_averages()
    model.fit(x, verbose=0)
    assert len(model.averages.values) == len(network.weights)
    assert int(numpy(model.averages.updates)) == 1


def test_compiled_steps_are_forgotten():
    model = kdiff.DiffusionModel(tiny_network((4, 4, 1)))
    model.build((None, 4, 4, 1))
    step = lambda solver: model._step(kdiff.Sampler(solver), model.schedule, True, None)  # noqa: E731
    first, last = step("ddim"), step("euler")
    for order in range(COMPILED_STEPS - 1):
        step(kdiff.solvers.DDIM(eta=(1 + order) / COMPILED_STEPS))
        assert step("euler") is last  # used again and again
    assert len(model._compiled_steps) == COMPILED_STEPS
    assert step("ddim") is not first
