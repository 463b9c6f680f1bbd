"""The report of a likelihood: nats per example, their mean and its standard error."""

import math
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from kdiff.base import check_number, needs
from kdiff.writing import replacing

__all__ = ["Curve", "Report"]


class Curve(NamedTuple):
    """The diffusion term by noise level, as arrays of equal length. For `bound`, the last step is the reconstruction.

    Attributes:
        t: the times, decreasing.
        log_snr: the log-SNR there.
        nats: the mean over the examples of the term at this time, in nats; for continuous time, per unit of log-SNR.
        error: its standard error.
    """

    t: np.ndarray
    log_snr: np.ndarray
    nats: np.ndarray
    error: np.ndarray


class Report(NamedTuple):
    """Negative log-likelihoods, or upper bounds on them, in float64.

    Attributes:
        terms: their terms by name, in nats: arrays with one value per example.
        dimensions: the number of elements of an example.
        curve: the diffusion term by noise level, or None.
        start: the time assigned to data.
    """

    terms: dict[str, np.ndarray]
    dimensions: int
    curve: Curve | None = None
    start: float = 0.0

    @property
    def nats(self) -> np.ndarray:
        """-log p(x), or its bound, per example, in nats."""
        return sum(self.terms.values())

    @property
    def mean(self) -> float:
        """The mean of `nats`."""
        return float(np.mean(self.nats))

    @property
    def standard_error(self) -> float:
        """The standard error of `mean`, std / sqrt(n), due to both the choice of the examples and the noise."""
        nats = self.nats
        return float(np.std(nats, ddof=1) / math.sqrt(len(nats))) if len(nats) > 1 else math.nan

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The confidence interval of the mean at this level, in nats, by the normal approximation."""
        check_number("interval", "level", level, 0.0, 1.0 - 1e-9)
        half = NormalDist().inv_cdf(0.5 + level / 2.0) * self.standard_error
        return self.mean - half, self.mean + half

    @property
    def bits_per_dim(self) -> float:
        """mean / (d ln 2), where d is the number of dimensions."""
        return self.mean / (self.dimensions * math.log(2.0))

    @property
    def bits_per_dim_error(self) -> float:
        """The standard error of `bits_per_dim`."""
        return self.standard_error / (self.dimensions * math.log(2.0))

    def __str__(self) -> str:
        """The bits per dimension with their standard error, and those of each term."""
        scale = self.dimensions * math.log(2.0)
        terms = ", ".join(f"{name} {np.mean(term) / scale:.4g}" for name, term in self.terms.items())
        error = f"{self.bits_per_dim_error:.2g}"
        return f"{self.bits_per_dim:.4f} +- {error} bits per dimension (n = {len(self.nats)}): {terms}"

    def plot(self, path: str | None = None) -> Any:
        """Plots the curve against log-SNR, and the terms; with `path`, saves the figure there.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: if matplotlib is not installed (the extra `plot`).
            ValueError: if there is no curve.
        """
        if self.curve is None:
            raise ValueError("Report: there is no curve, for the likelihood of a flow has no terms by noise level")
        with needs("plot", "Plots need matplotlib"):
            from matplotlib.figure import Figure

        scale = self.dimensions * math.log(2.0)
        figure = Figure(figsize=(8, 3), layout="constrained")
        curve, bars = figure.subplots(1, 2, width_ratios=(3, 1))
        nats, error = self.curve.nats / scale, self.curve.error / scale
        curve.plot(self.curve.log_snr, nats)
        curve.fill_between(self.curve.log_snr, nats - 2 * error, nats + 2 * error, alpha=0.3)
        curve.invert_xaxis()
        curve.set_xlabel("log-SNR")
        curve.set_ylabel("bits per dimension")
        bars.bar(list(self.terms), [np.mean(term) / scale for term in self.terms.values()])
        bars.tick_params(axis="x", labelrotation=30)
        figure.suptitle(f"{self.bits_per_dim:.3f} +- {self.bits_per_dim_error:.2g} bits per dimension")
        if path is not None:
            with replacing(path) as new:
                figure.savefig(new)
        return figure
