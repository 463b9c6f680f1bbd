"""The variance of a step of the model, p(x_then | x_now) = N(mean, variance), a choice in which bounds differ.

The mean is that of q(x_then | x_now, x) with x replaced by x_hat. If the variance of the data is between 0 and 1, the
optimal variance lies between the two of Ho et al. 2020, arXiv:2006.11239, section 3.2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops

from kdiff.base import Value
from kdiff.schedules import Marginal, bridge

__all__ = ["Known", "Large", "Learned", "Place", "Small", "Variance"]


class Place(NamedTuple):
    """A step of the run, from `now` to `then`, and the marginals from which its posterior variance is computed.

    The posterior variance of the last step, to t = 0, is 0. Small variances use that of the step before it instead
    (Nichol and Dhariwal 2021, arXiv:2102.09672, section 3.1).
    """

    now: Marginal
    then: Marginal
    read_now: Marginal
    read_then: Marginal
    last: Any

    @property
    def log_small(self):
        """log(sigma_then^2 (1 - r)), r = SNR_now / SNR_then."""
        return 2.0 * ops.log(self.read_then.sigma) + ops.log(bridge(self.read_now, self.read_then)[1])

    @property
    def log_large(self):
        """log(sigma_now^2 (1 - r))."""
        return 2.0 * ops.log(self.now.sigma) + ops.log(bridge(self.now, self.then)[1])


class Variance(Value):
    """The base class of the variances of steps. A subclass defines `log`."""

    def log(self, place: Place, estimate: Any):
        """The log of the variance of the step.

        Args:
            place: the step.
            estimate: the denoiser's estimate at its beginning.

        Returns:
            A tensor that broadcasts against x.
        """
        raise NotImplementedError


class Small(Variance):
    """sigma_then^2 (1 - r), the variance of the posterior, which is exact for data that is a single point."""

    def log(self, place: Place, estimate: Any):
        return place.log_small


class Large(Variance):
    """sigma_now^2 (1 - r), the variance of the forward process, which is exact for standard normal data.

    In the last step it is that of `Small`, as in the code of Ho et al. (2020).
    """

    def log(self, place: Place, estimate: Any):
        return ops.where(place.last, place.log_small, place.log_large)


class Learned(Variance):
    """Between the two, interpolated in the logarithm by the network (`predictions.LearnedVariance`)."""

    def log(self, place: Place, estimate: Any):
        if estimate.share is None:
            raise ValueError("Learned: this denoiser says no variance; its prediction must be a LearnedVariance")
        return place.log_small + estimate.share * (place.log_large - place.log_small)


class Known(Variance):
    """The optimal variance if Var[x | x_t] is known (Bao et al. 2022, "Analytic-DPM", arXiv:2201.06503, theorem 1):

        sigma_then^2 (1 - r) + (alpha_then (1 - r))^2 Var[x | x_now].

    Args:
        variance: `variance(m)`, Var[x | x_t] at the marginal m, per coordinate or averaged over them. For data N(mean,
            s^2 I) it is s^2 sigma^2 / (alpha^2 s^2 + sigma^2), and the reverse process is then exact.
    """

    def __init__(self, variance: Callable[[Marginal], Any]):
        self.variance = variance

    def log(self, place: Place, estimate: Any):
        fresh = bridge(place.now, place.then)[1]
        return ops.log(place.then.sigma**2 * fresh + (place.then.alpha * fresh) ** 2 * self.variance(place.now))
