"""The integral of exponential integrators: a polynomial through estimates times an exponential.

From l_now to l_then, l = log(alpha / sigma), h = l_then - l_now, let u = (l - l_now) / h be the fraction of the step.
If the integrand is replaced by the polynomial through the estimate v_0 at u = 0 and others v_k at u_k, the two
integrals of `solvers.base` are exactly

    x_then  =  (sigma_then / sigma_now) x_now  +  alpha_then (M_0 v_0 + sum_k w_k (v_k - v_0)),    z = h     (data)
    x_then  =  (alpha_then / alpha_now) x_now  +  sigma_then (M_0 v_0 + sum_k w_k (v_k - v_0)),    z = -h    (noise)

    M_n(z)  =  z integral of e^(-z (1 - u)) u^n du from 0 to 1,        w_k  =  sum_n c_kn M_n,

where sum_n c_kn u^n is the Lagrange polynomial L_k, which is 1 at u_k, and 0 at 0 and at the other u_j. With one term
both are DDIM. Past estimates have u_k < 0, estimates inside the step 0 < u_k < 1, and that of a corrector u_k = 1.
"""

from math import factorial

import numpy as np
from keras import ops

__all__ = ["SERIES", "SMALL", "TERMS", "half", "integrals", "moments", "weights"]

# For |z| below SMALL the moments are computed by a series with these coefficients.
SMALL = 1.5
TERMS = np.arange(13, dtype="float32")
SERIES = [np.float32([factorial(n) / factorial(n + k + 1) for k in range(13)]) for n in range(4)]


def moments(z, highest: int) -> list:
    """M_0 ... M_highest, `highest` at most 3, accurate in float32 for any z; scalars.

    Integration by parts gives M_n = 1 - n / z M_(n-1). Near z = 0 this cancels, and the exponential series is used,

        M_n = z sum_k n! / (n + k + 1)! (-z)^k.
    """
    found = [-ops.expm1(-z)]
    if not highest:
        return found
    small = ops.abs(z) < SMALL
    safe = ops.where(small, SMALL, z)
    powers = ops.power(ops.where(small, -z, SMALL), TERMS)
    for n in range(1, highest + 1):
        series = z * ops.sum(ops.convert_to_tensor(SERIES[n]) * powers)
        found.append(ops.where(small, series, 1.0 - n / safe * found[-1]))
    return found


def integrals(places: list, moments: list, count) -> list:
    """The sum over n of c_kn M_n for each u_k, scalars: the integrals of the Lagrange polynomials L_k.

    Args:
        places: the u_k, distinct and not 0.
        moments: M_0, M_1, ... for any weight function, one more than `places`.
        count: the number of places in use, a scalar; the others are ignored, and their integrals are 0.
    """
    found = []
    for k, place in enumerate(places):
        coefficients = [1.0 / place]  # of u, u^2, ...
        for j, other in enumerate(places):
            if j != k:
                # (u - u_j) / (u_k - u_j), or 1.
                slope = ops.where(count > j, 1.0 / (place - other), 0.0)
                constant = 1.0 - slope * place
                pairs = zip([*coefficients, 0.0], [0.0, *coefficients], strict=True)
                coefficients = [constant * a + slope * b for a, b in pairs]
        total = sum(c * moment for c, moment in zip(coefficients, moments[1:], strict=True))
        found.append(ops.where(count > k, total, 0.0))
    return found


def weights(z, places: list, count=None, single=None, curvature: float = 1.0) -> list:
    """w_1, w_2, ..., scalars.

    Args:
        z: the step, h or -h.
        places: the u_k, at most three, distinct and not 0.
        count: the number of them with an estimate, a scalar; None: all.
        single: replaces M_1 if `count` is 1; None: M_1 itself.
        curvature: a factor on the coefficient of u^2.
    """
    count = len(places) if count is None else count
    if len(places) == 1 and single is not None:
        return integrals(places, [0.0, single], count)  # which does not use M_0
    found = moments(z, len(places))
    if places and single is not None:
        found[1] = ops.where(ops.equal(count, 1), single, found[1])
    if len(places) > 1:
        found[2] = curvature * found[2]
    return integrals(places, found, count)


def half(z):
    """M_0 / 2, a replacement for M_1 that keeps order 2, and with which only an estimate at the midpoint is used."""
    return -ops.expm1(-z) / 2.0
