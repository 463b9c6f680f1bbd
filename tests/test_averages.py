"""Averaged weights: the formula, and when they move."""

import keras
import numpy as np
import pytest

from kdiff.averages import Averages
from tests.toys import numpy

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
