"""Gaussian distributions: the divergence between two of them, and the probabilities of intervals."""

import numpy as np
from keras import ops

__all__ = ["kl_divergence", "log_bin", "log_cdf", "log_erfc"]


def kl_divergence(error, log_true, log_model):
    """KL(N(mean + error, true) || N(mean, model)) = (log(model / true) + true / model - 1 + error^2 / model) / 2."""
    difference = log_model - log_true
    return 0.5 * (difference + ops.expm1(-difference) + error**2 * ops.exp(-log_model))


def log_bin(x, mean, std):
    """The log of the probability, under N(mean, std^2), of the bin within 1/255 of x.

    The first and last of the 256 bins are open (Ho et al. 2020, eq. 13). The probability is computed below the mean,
    where it is a difference of small numbers.
    """
    half, distance = 1.0 / 255.0, ops.abs(x - mean)
    high, low = log_cdf((half - distance) / std), log_cdf(-(half + distance) / std)
    inside = high + ops.log(-ops.expm1(ops.minimum(low - high, -1e-7)))
    first, last = log_cdf((x - mean + half) / std), log_cdf((mean - x + half) / std)
    return ops.where(x < -0.999, first, ops.where(x > 0.999, last, inside))


def log_cdf(z):
    """The log of the standard normal distribution function, accurate in both tails."""
    below = log_erfc(ops.maximum(-z, 0.0) / np.sqrt(2.0)) - np.log(2.0)
    above = ops.log1p(-0.5 * ops.erfc(ops.maximum(z, 0.0) / np.sqrt(2.0)))
    return ops.where(z < 0, below, above)


def log_erfc(z):
    """log(erfc(z)) for z >= 0; above 5 by the asymptotic series, because erfc underflows at 9."""
    near = ops.log(ops.erfc(ops.minimum(z, 5.0)))
    z = ops.maximum(z, 5.0)
    u = 0.5 / z**2
    far = -(z**2) - ops.log(z * np.sqrt(np.pi)) + ops.log1p(-u + 3.0 * u**2 - 15.0 * u**3)
    return ops.where(z > 5.0, far, near)
