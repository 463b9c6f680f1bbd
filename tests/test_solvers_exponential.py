"""The integral that exponential integrators share, against quadrature in float64."""

import numpy as np
import pytest
from keras import ops

from kdiff.solvers.exponential import half, moments, weights

NODES, RULE = np.polynomial.legendre.leggauss(100)
U, RULE = (NODES + 1) / 2, RULE / 2
STEPS = [sign * h for sign in (1, -1) for h in (*np.geomspace(1e-6, 40.0, 12), 1.499, 1.501, 60.0)]


def integral(z, values):
    """z integral of e^(-z (1 - u)) f(u) du, from the values of f at the nodes."""
    z = np.float64(np.float32(z))
    return np.sum(RULE * z * np.exp(-z * (1 - U)) * values)


@pytest.mark.once
def test_moments():
    """To float32's rounding, for steps from 1e-6 to 60 of data and of noise; the form changes at 1.5."""
    for z in STEPS:
        exact = [integral(z, U**n) for n in range(4)]
        np.testing.assert_allclose([float(m) for m in moments(np.float32(z), 3)], exact, rtol=2e-6, err_msg=str(z))
        np.testing.assert_allclose(float(half(ops.convert_to_tensor(z, "float32"))), exact[0] / 2, rtol=1e-6)


@pytest.mark.parametrize("places", [[-0.4], [1.0], [-0.4, -1.1], [1.0, -0.7], [1.0, -0.7, -2.0]], ids=repr)
def test_weights(places):
    """Of every number of known places: the integrals of Lagrange's polynomials, to the rounding of their terms."""
    for z in (-25.0, -1e-4, 1e-4, 0.5, 3.0, 25.0):
        for count in range(len(places) + 1):
            # A place that is not known may be anything.
            given = [place if k < count else -np.inf for k, place in enumerate(places)]
            found = weights(ops.convert_to_tensor(z, "float32"), given, ops.convert_to_tensor(count))
            assert [float(w) for w in found[count:]] == [0.0] * (len(places) - count)
            for k in range(count):
                others = [0.0, *places[:k], *places[k + 1 : count]]
                factors = [(U - other) / (places[k] - other) for other in others]
                size = integral(abs(z), np.prod(np.abs(factors), axis=0)) * max(1.0, np.exp(-z))
                np.testing.assert_allclose(
                    float(found[k]), integral(z, np.prod(factors, axis=0)), rtol=1e-5, atol=2e-6 * size
                )


@pytest.mark.once
def test_what_may_be_changed_in_the_weights():
    """M_1, where it stands alone, and the coefficient of u^2."""
    z = ops.convert_to_tensor(2.0, "float32")
    m1, m2 = integral(2.0, U), integral(2.0, U**2)
    for count, expected in (
        (1, [0.3 / -0.5, 0.0]),
        (2, [(m2 + 2.0 * m1) / (-0.5 * 1.5), (m2 + 0.5 * m1) / (-2.0 * -1.5)]),
    ):
        found = weights(z, [-0.5, -2.0], ops.convert_to_tensor(count), single=0.3)
        np.testing.assert_allclose([float(w) for w in found], expected, rtol=1e-5)
    found = weights(z, [-0.5, -2.0], curvature=0.5)
    expected = [(0.5 * m2 + 2.0 * m1) / (-0.5 * 1.5), (0.5 * m2 + 0.5 * m1) / (-2.0 * -1.5)]
    np.testing.assert_allclose([float(w) for w in found], expected, rtol=1e-5)
