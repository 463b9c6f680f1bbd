"""Logarithms of Gaussian probabilities, against SciPy in float64, and against laws, far into both tails."""

import numpy as np
import pytest
from keras import ops
from scipy import special, stats

from kdiff.gaussian import kl_divergence, log_bin, log_cdf, log_erfc
from tests.toys import numpy


def float32(function, *arguments):
    """The function of float32 arguments, in float64 afterwards; and the arguments as they were rounded."""
    rounded = [np.asarray(argument, "float32") for argument in arguments]
    return numpy(function(*map(ops.convert_to_tensor, rounded))).astype("float64"), *(
        value.astype("float64") for value in rounded
    )


def test_log_erfc():
    """log erfc(z) = -z^2 + log erfcx(z). The series leaves out 105 u^4 < 2e-5, u = 1 / (2 z^2)."""
    value, z = float32(log_erfc, np.concatenate([np.linspace(0, 12, 600), np.geomspace(12, 1e4, 50)]))
    expected = -(z**2) + np.log(special.erfcx(z))
    left_out = np.where(z > 5, 105 * (0.5 / np.maximum(z, 5) ** 2) ** 4, 0.0)
    np.testing.assert_array_less(np.abs(value - expected), 1.2 * left_out + 3e-7 * np.abs(expected) + 1e-6)


@pytest.mark.parametrize("begin", [5.0001, 5.5, 6.5])
def test_the_series_has_its_terms(begin):
    """erfc(z) = exp(-z^2) / (z sqrt(pi)) (1 - u + 3 u^2 - 15 u^3 ...) (DLMF 7.12.1).

    Rounded to float32, -27 is off by 1e-6, and the mean of 4,000 such much less; one more u^3 is 2e-6 at 6.5.
    """
    value, z = float32(log_erfc, np.linspace(begin, begin + 0.2, 4000))
    u = 0.5 / z**2
    series = -(z**2) - np.log(z * np.sqrt(np.pi)) + np.log(1 - u + 3 * u**2 - 15 * u**3)
    assert np.mean(value - series) == pytest.approx(0.0, abs=5e-7)


def test_log_cdf():
    """To 3e-6 in the lower tail; in the upper, where it is -4e-16 in the end, to as many digits, with none to spare."""
    value, z = float32(log_cdf, np.concatenate([np.linspace(-60, 8, 700), [-5.0 * 2**0.5, 0.0]]))
    np.testing.assert_allclose(value, stats.norm.logcdf(z), rtol=1e-5)
    below = z < 0
    np.testing.assert_allclose(value[below], stats.norm.logcdf(z[below]), rtol=3e-6)


def log_mass(x, mean, std):
    """log of the mass of [x - 1/255, x + 1/255], all that lies beyond -1 and 1 included at the ends."""
    sign = np.where(x > mean, -1.0, 1.0)  # on the lower side of the mean
    near, far = ((sign * (x - mean) + half) / std for half in (1 / 255, -1 / 255))
    high, low = stats.norm.logcdf(near), stats.norm.logcdf(far)
    inside = high + np.log(-np.expm1(low - high))
    first, last = stats.norm.logcdf((x - mean + 1 / 255) / std), stats.norm.logsf((x - mean - 1 / 255) / std)
    return np.where(x == -1, first, np.where(x == 1, last, inside))


LEVELS = np.array([0, 1, 2, 3, 60, 127, 128, 200, 253, 254, 255]) / 127.5 - 1


@pytest.mark.parametrize("std", [0.003, 0.02, 0.3, 2.0])
def test_log_bin(std):
    """Every bin, from means inside and outside of the range, also where the mass is less than float64 knows.

    What is compared is a difference of 1/255 of float32 numbers as large as 1: (1/255 + distance) / std is rounded.
    """
    x, mean = (grid.ravel() for grid in np.meshgrid(LEVELS, [-1.3, -1.0, -0.4, 0.0, 0.11, 0.9961, 1.5]))
    value, x, mean, _ = float32(log_bin, x, mean, np.full(x.shape, std))
    expected = log_mass(np.where(np.abs(x) > 0.999, np.sign(x), x), mean, float(np.float32(std)))
    distance = (np.abs(x - mean) + 1 / 255) / std
    rounding = 2e-7 * (distance + 1) * (distance + 255 * std) + 1e-6
    np.testing.assert_array_less(np.abs(value - expected), 3 * rounding)


@pytest.mark.parametrize("std", [0.001, 0.01, 0.1, 1.0, 10.0])
def test_the_bins_hold_everything(std):
    """The sum of all 256 is 1, wherever the mean is."""
    for mean in (-1.2, -0.5, 0.0012, 0.83, 1.0):
        value, *_ = float32(log_bin, np.arange(256) / 127.5 - 1, np.full(256, mean), np.full(256, std))
        assert np.exp(value).sum() == pytest.approx(1.0, abs=2e-4)


def test_bins_that_are_nothing_are_finite():
    value, *_ = float32(log_bin, [0.5, 0.5], [0.5, -300.0], [1e7, 1e-3])
    assert np.isfinite(value).all()
    assert value[1] < -1e10


@pytest.mark.parametrize("error", [0.0, 0.7, -2.0])
@pytest.mark.parametrize(("log_true", "log_model"), [(0.3, -1.0), (-1.0, 0.3), (0.2, 0.2), (-6.0, -5.9)])
def test_kl_divergence(error, log_true, log_model):
    """By quadrature of p (log p - log q)."""
    p, q = stats.norm(error, np.exp(log_true / 2)), stats.norm(0.0, np.exp(log_model / 2))
    x = error + np.exp(log_true / 2) * np.linspace(-12, 12, 20001)
    expected = np.trapezoid(p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), x)
    value, *_ = float32(kl_divergence, error, log_true, log_model)
    assert value == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_kl_divergence_of_what_is_nearly_the_same():
    """d^2 / 4 for a difference d of the logarithms: no digits cancel but those of d^2."""
    value, _, _, d = float32(kl_divergence, 0.0, 0.0, [1e-2, 3e-3, -3e-3])
    np.testing.assert_allclose(value, 0.5 * (d + np.expm1(-d)), rtol=2e-3)
