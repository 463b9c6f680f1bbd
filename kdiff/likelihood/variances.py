"""The variance of a step of the model, p(x_then | x_now) = N(mean, variance), in which bounds differ.

Its mean is that of q(x_then | x_now, x) with x_hat for x; its variance lies, if the data has between none and unit
variance, between the two of Ho et al. 2020, arXiv:2006.11239, section 3.2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops

from kdiff.base import Value
from kdiff.schedules import Marginal, bridge

__all__ = ["Known", "Large", "Learned", "Place", "Small", "Variance"]


class Place(NamedTuple):
    """A step of the run: from `now` to `then`, and where its posterior variance is read.

    The posterior of the last step, to t = 0, has the variance 0. Small variances have there that of the step before it
    (Nichol and Dhariwal 2021, arXiv:2102.09672, section 3.1).
    """

    now: Marginal
    then: Marginal
    read_now: Marginal
    read_then: Marginal
    last: Any

    @property
    def log_small(self):
        """log of sigma_then^2 (1 - r), r = SNR_now / SNR_then."""
        return 2.0 * ops.log(self.read_then.sigma) + ops.log(bridge(self.read_now, self.read_then)[1])

    @property
    def log_large(self):
        """log of sigma_now^2 (1 - r)."""
        return 2.0 * ops.log(self.now.sigma) + ops.log(bridge(self.now, self.then)[1])


class Variance(Value):
    """The base of the variances of steps. A new one defines `log`."""

    def log(self, place: Place, estimate: Any):
        """log of the variance of the step.

        Args:
            place: the step.
            estimate: the denoiser's answer at its beginning.

        Returns:
            What broadcasts against x.
        """
        raise NotImplementedError


class Small(Variance):
    """sigma_then^2 (1 - r), that of the posterior: right if the data were one point."""

    def log(self, place: Place, estimate: Any):
        return place.log_small


class Large(Variance):
    """sigma_now^2 (1 - r), that of the forward process, right if the data were standard normal; in the last step that
    of `Small`, as in the code of Ho et al. (2020).
    """

    def log(self, place: Place, estimate: Any):
        return ops.where(place.last, place.log_small, place.log_large)


class Learned(Variance):
    """Between the two, in the logarithm, where the network says (`predictions.LearnedVariance`)."""

    def log(self, place: Place, estimate: Any):
        if estimate.share is None:
            raise ValueError("Learned: this denoiser says no variance; its prediction must be a LearnedVariance")
        return place.log_small + estimate.share * (place.log_large - place.log_small)


class Known(Variance):
    """The best there is where Var[x | x_t] is known (Bao et al. 2022, "Analytic-DPM", arXiv:2201.06503, theorem 1):

        sigma_then^2 (1 - r) + (alpha_then (1 - r))^2 Var[x | x_now].

    Args:
        variance: `variance(m)`, Var[x | x_t] at the marginal m, of a coordinate or on average over them: for data
            N(mean, s^2 I) it is s^2 sigma^2 / (alpha^2 s^2 + sigma^2), and the reverse process is then exact.
    """

    def __init__(self, variance: Callable[[Marginal], Any]):
        self.variance = variance

    def log(self, place: Place, estimate: Any):
        fresh = bridge(place.now, place.then)[1]
        return ops.log(place.then.sigma**2 * fresh + (place.then.alpha * fresh) ** 2 * self.variance(place.now))
