"""Derivatives along curves: both ways agree with formulas, and with one another through kdiff's networks."""

import keras
import numpy as np
import pytest
from keras import ops

from kdiff import backend, networks
from kdiff.blocks import adaptive_block
from kdiff.tangents import FiniteDifference, ForwardMode, Tangent
from tests.helpers_gradients import perturb
from tests.toys import mostly_once, numpy

ZERO = np.zeros(3, "float32")
SPEED, START = np.float32([0.3, -1.0, 2.0]), np.float32([[1.0, 2.0]])


def cubic(e):
    """x + speed e + e^3."""
    return ops.convert_to_tensor(START) + ops.convert_to_tensor(SPEED)[:, None] * e[:, None] + e[:, None] ** 3


@pytest.mark.parametrize(("tangent", "error"), [(ForwardMode(), 0.0), (FiniteDifference(0.1), 0.01)], ids=repr)
def test_the_derivative_of_a_polynomial(tangent, error):
    """The difference is wrong by h^2, and between unequal sides by (above^3 + below^3) / (above + below)."""
    value = numpy(tangent(cubic, ops.convert_to_tensor(ZERO)))
    np.testing.assert_allclose(value, np.repeat(SPEED[:, None], 2, axis=1) + error, rtol=1e-5)
    below, above = np.float32([0.1, 0.05, 0.0]), np.float32([0.02, 5.0, 0.1])
    value = numpy(tangent(cubic, *map(ops.convert_to_tensor, (ZERO, below, above))))
    below, above = np.minimum(below, 0.1), np.minimum(above, 0.1)
    wrong = (above**3 + below**3) / (above + below) if error else 0.0
    np.testing.assert_allclose(value[:, 0], SPEED + wrong, rtol=1e-5)


NETWORKS = {
    "UNet.attention": (lambda: networks.UNet.attention(8, 2, 1, at=(1,)), (4, 4, 1)),
    "DiT": (lambda: networks.DiT(16, 1, 2, adaptive_block(2)), (4, 4, 1)),
    "MLP": (lambda: networks.MLP(16, 1), (2,)),
    "UViT": (lambda: networks.UViT(16, 1, 2), (4, 4, 1)),
}


@pytest.mark.eager
@pytest.mark.parametrize("name", mostly_once(list(NETWORKS), 2))
def test_both_agree_through_networks(name):
    """The image and the time move together; every operation that has a fast form of its own is in one of these."""
    keras.utils.set_random_seed(0)  # some weights make a curve that is too bent for differences
    make, shape = NETWORKS[name]
    network, generator = make(), np.random.default_rng(0)
    network.build({"image": (None, *shape), "time": (None,)})
    perturb(network)
    image, direction = (ops.convert_to_tensor(generator.standard_normal((3, *shape)), "float32") for _ in range(2))

    def curve(e):
        rows = ops.reshape(e, (-1, *[1] * len(shape)))
        return network({"image": image + rows * direction, "time": 300.0 + 5.0 * e}, training=False)

    def compiled(tangent):
        return numpy(backend.fused(lambda zero: tangent(curve, zero))(ops.convert_to_tensor(ZERO)))

    exact, difference = compiled(ForwardMode()), compiled(FiniteDifference(0.005))
    assert np.abs(exact).max() > 0.1
    np.testing.assert_allclose(difference, exact, atol=5e-3 * np.abs(exact).max())


@pytest.mark.once
def test_no_gradient_flows():
    x = keras.Variable(np.float32([1.0, 2.0, 3.0]))
    for tangent in (ForwardMode(), FiniteDifference()):
        made = tangent(lambda e: (x.value * e)[:, None], ops.convert_to_tensor(ZERO))
        np.testing.assert_allclose(numpy(made)[:, 0], [1.0, 2.0, 3.0], rtol=1e-4)
        assert not getattr(made, "requires_grad", False)  # on PyTorch, which alone records


@pytest.mark.once
def test_arguments():
    assert Tangent.get("finite_difference") == FiniteDifference(0.001)
    assert Tangent.get("forward_mode") == ForwardMode()
    with pytest.raises(ValueError, match="FiniteDifference: `h`"):
        FiniteDifference(0.0)
