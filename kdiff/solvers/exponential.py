"""The integral that all exponential integrators share: of a polynomial through estimates, against an exponential.

From l_now to l_then, l = log(alpha / sigma), h = l_then - l_now, let u = (l - l_now) / h be the fraction of the way.
With the polynomial through the estimate v_0, made at u = 0, and others v_k, made at u_k, in place of the integrand, the
two integrals of `solvers.base` are, without approximation,

    x_then  =  (sigma_then / sigma_now) x_now  +  alpha_then (M_0 v_0 + sum_k w_k (v_k - v_0)),    z = h     (data)
    x_then  =  (alpha_then / alpha_now) x_now  +  sigma_then (M_0 v_0 + sum_k w_k (v_k - v_0)),    z = -h    (noise)

    M_n(z)  =  z integral of e^(-z (1 - u)) u^n du from 0 to 1,        w_k  =  sum_n c_kn M_n,

where sum_n c_kn u^n is the polynomial L_k that is 1 at u_k, and 0 at 0 and at the other u_j. Of one term both are DDIM.
Past estimates have u_k < 0, estimates within the step 0 < u_k < 1, and that of a corrector u_k = 1.
"""

from math import factorial

import numpy as np
from keras import ops

__all__ = ["SERIES", "SMALL", "TERMS", "half", "integrals", "moments", "weights"]

# Where |z| is below this the moments are summed from a series, whose terms these are.
SMALL = 1.5
TERMS = np.arange(13, dtype="float32")
SERIES = [np.float32([factorial(n) / factorial(n + k + 1) for k in range(13)]) for n in range(4)]


def moments(z, highest: int) -> list:
    """M_0 ... M_highest, `highest` at most 3, to float32's precision at any z; scalars.

    By parts M_n = 1 - n / z M_(n-1). Near z = 0 that loses all digits; there the series of the exponential is used,

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
    """The sum over n of c_kn M_n for each u_k, scalars: the integrals of Lagrange's polynomials L_k.

    Args:
        places: the u_k, neither 0 nor equal to each other.
        moments: M_0, M_1, ... of any weight, one more than places.
        count: how many of the places there are, a scalar; the others may be anything, and their integrals are 0.
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
        z: the step, h or -h, above or below zero.
        places: the u_k, at most three, neither 0 nor equal to each other.
        count: how many of them have an estimate, a scalar; None for all.
        single: takes the place of M_1 where `count` is 1; None for M_1 itself.
        curvature: multiplies the coefficient of u^2.
    """
    count = len(places) if count is None else count
    found = moments(z, len(places))
    if places and single is not None:
        found[1] = ops.where(ops.equal(count, 1), single, found[1])
    if len(places) > 1:
        found[2] = curvature * found[2]
    return integrals(places, found, count)


def half(z):
    """M_0 / 2, which as M_1 keeps the order 2, and with which an estimate in the middle of the step stands alone."""
    return -ops.expm1(-z) / 2.0
