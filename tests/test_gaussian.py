"""Gaussians, against SciPy in float64."""

import numpy as np
import pytest
from keras import ops
from scipy import special, stats

from kdiff import gaussian
from tests.toys import numpy


def compared(values, exact, truncation=0.0):
    """To 8 roundings of the result, and what a series leaves out."""
    bound = 8 * np.finfo("float32").eps * np.maximum(np.abs(exact), 1) + truncation
    assert np.all(np.abs(numpy(values) - exact) <= bound)


def test_log_erfc():
    """Over its range. Above 5 the series alternates, so the term left out, 105 u^4, bounds the error (DLMF 7.12.1)."""
    z = np.concatenate([np.linspace(0, 5, 200), np.linspace(5.01, 8, 200), np.geomspace(8, 1e3, 50)])
    z = ops.convert_to_tensor(z, "float32")
    known = numpy(z).astype("float32")
    exact = np.log(special.erfcx(known)) - known**2
    u = 0.5 / np.maximum(known, 1.0) ** 2
    compared(gaussian.log_erfc(z), exact, np.where(known > 5, 1.05 * 105 * u**4, 0.0))


def test_log_cdf():
    z = ops.convert_to_tensor(np.concatenate([np.linspace(-60, 8, 400), [-5.0 * 2**0.5, 0.0]]), "float32")
    compared(gaussian.log_cdf(z), stats.norm.logcdf(numpy(z).astype("float32")), 2e-5)  # of the series, at 5


def test_log_bin():
    """Of the 256 bins of [-1, 1], the open ones at the ends too, the mass is 1, and each is what SciPy says."""
    x = np.linspace(-1, 1, 256)
    for mean, std in ((0.1, 0.3), (-0.97, 0.02), (0.5, 0.01)):
        masses = numpy(gaussian.log_bin(ops.convert_to_tensor(x, "float32"), mean, std)).astype("float32")
        assert np.exp(masses).sum() == pytest.approx(1.0, abs=1e-4)
        edges = np.concatenate([[-np.inf], (x[1:] + x[:-1]) / 2, [np.inf]])
        below, above = stats.norm.cdf(edges, mean, std), stats.norm.sf(edges, mean, std)
        exact = np.where(x < mean, below[1:] - below[:-1], above[:-1] - above[1:])  # the side that does not cancel
        likely = exact > 1e-30
        np.testing.assert_allclose(masses[likely], np.log(exact[likely]), rtol=1e-4, atol=1e-4)


def test_kl_divergence():
    """Of N(0.3, 0.5^2) from N(0, 0.8^2), by the integral of p log(p / q); and 0 of a Gaussian from itself."""
    x = np.linspace(-6, 6, 100001)
    p, q = stats.norm(0.3, 0.5), stats.norm(0.0, 0.8)
    integral = np.trapezoid(p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), x)
    variances = (ops.convert_to_tensor(2 * np.log(std), "float32") for std in (0.5, 0.8))
    assert float(numpy(gaussian.kl_divergence(0.3, *variances))) == pytest.approx(integral, rel=1e-5)
    assert float(numpy(gaussian.kl_divergence(0.0, ops.zeros(()), ops.zeros(())))) == 0
