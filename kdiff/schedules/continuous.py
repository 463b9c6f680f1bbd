"""Continuous schedules: log_snr as a formula in t, and its inverse.

Near t = 1 a formula in t loses precision, because float32 is too coarse near 1. There, each formula is therefore
written in terms of 1 - t.
"""

import numpy as np
from keras import ops

from kdiff.base import check_number
from kdiff.schedules.base import NoiseSchedule

__all__ = [
    "Cosine",
    "Laplace",
    "LinearVP",
    "Rectified",
    "SubVP",
    "Trigonometric",
    "VarianceExploding",
    "check_range",
    "within",
]


def _tensor(value):
    return ops.convert_to_tensor(value, "float32")


class Cosine(NoiseSchedule):
    """The continuous cosine schedule (Hoogeboom et al. 2023, section 2), variance preserving:

        alpha = cos(u),  sigma = sin(u),  log_snr = -2 log tan(u),

    with the angle u linear in t, from the value at which log_snr is `max_log_snr` to that at which it is
    `min_log_snr`.

    Args:
        min_log_snr: the log-SNR at t = 1.
        max_log_snr: the log-SNR at t = 0.
    """

    def __init__(self, min_log_snr: float = -15.0, max_log_snr: float = 15.0):
        super().__init__()
        check_range("Cosine", min_log_snr, max_log_snr)
        self.min_log_snr, self.max_log_snr = min_log_snr, max_log_snr
        self.first = float(np.arctan(np.exp(-max_log_snr / 2)))  # u at t = 0
        self.rest = float(np.arctan(np.exp(min_log_snr / 2)))  # pi / 2 - u at t = 1
        self.span = np.pi / 2 - self.first - self.rest

    def log_snr(self, t):
        """-2 log tan(u); near t = 1 in terms of pi / 2 - u, because tan(u) loses precision there."""
        t = _tensor(t)
        early = -2.0 * ops.log(ops.tan(self.first + self.span * ops.minimum(t, 0.5)))
        late = 2.0 * ops.log(ops.tan(self.rest + self.span * ops.minimum(1.0 - t, 0.5)))
        return ops.where(t < 0.5, early, late)

    def time(self, log_snr):
        """(u - u(0)) / (u(1) - u(0)), u = arctan(exp(-log_snr / 2))."""
        half = _tensor(log_snr) / 2
        return (ops.arctan(ops.exp(-half)) - self.first) / self.span

    def slope(self, t):
        """-4 u' / sin(2 u); sin(2 u) = sin(2 (pi / 2 - u))."""
        t = _tensor(t)
        u = ops.where(t < 0.5, self.first + self.span * t, self.rest + self.span * (1.0 - t))
        return -4.0 * self.span / ops.sin(2.0 * u)


class Trigonometric(Cosine):
    """The generalised variance preserving path of SiT (Ma et al. 2024, arXiv:2401.08740, section 2):

        alpha = cos(pi t / 2),  sigma = sin(pi t / 2),

    truncated at both ends, where t is replaced by `epsilon` + (1 - 2 `epsilon`) t so that log_snr stays finite. It is
    `Cosine` with a different range.

    Args:
        epsilon: the part of the range of t that is removed at each end. 1e-5 gives log-SNRs from 22 to -22.
    """

    def __init__(self, epsilon: float = 1e-5):
        check_number("Trigonometric", "epsilon", epsilon, 1e-8, 0.1)
        end = float(-2.0 * np.log(np.tan(np.pi / 2 * epsilon)))
        super().__init__(-end, end)
        self.epsilon = epsilon


class Laplace(NoiseSchedule):
    """The Laplace schedule (Hang et al. 2024, arXiv:2407.03297, table 1), variance preserving:

        log_snr = mu - b sgn(0.5 - u) log(1 - 2 |u - 0.5|),

    so that for uniform t, log_snr has a Laplace distribution, and training concentrates on noise levels near mu. u is
    linear in t and covers the log-SNRs from `max_log_snr` to `min_log_snr`: the distribution is truncated at both ends.

    Args:
        mu: the mode of the distribution of log-SNR.
        b: its scale, the mean distance from mu, above zero.
        min_log_snr: the log-SNR at t = 1.
        max_log_snr: the log-SNR at t = 0.
    """

    def __init__(self, mu: float = 0.0, b: float = 0.5, min_log_snr: float = -15.0, max_log_snr: float = 15.0):
        super().__init__()
        check_range("Laplace", min_log_snr, max_log_snr)
        check_number("Laplace", "mu", mu, min_log_snr, max_log_snr)
        # Below the lower limit the tails, exp(-distance / b), underflow float32.
        check_number("Laplace", "b", b, max(max_log_snr - mu, mu - min_log_snr) / 80.0, 1000.0)
        self.mu, self.b, self.min_log_snr, self.max_log_snr = mu, b, min_log_snr, max_log_snr
        self.first = float(0.5 * np.exp(-(max_log_snr - mu) / b))  # u at t = 0
        self.rest = float(0.5 * np.exp(-(mu - min_log_snr) / b))  # 1 - u at t = 1
        self.span = 1.0 - self.first - self.rest

    def log_snr(self, t):
        """mu - b log(2 u) up to u = 1/2, then mu + b log(2 (1 - u))."""
        u, rest = self._place(t)
        return self.mu + self.b * ops.where(u < 0.5, -ops.log(2.0 * u), ops.log(2.0 * rest))

    def time(self, log_snr):
        """2 u = exp(-(log_snr - mu) / b) up to u = 1/2, then 2 (1 - u) = exp((log_snr - mu) / b)."""
        distance = (_tensor(log_snr) - self.mu) / self.b
        part = 0.5 * ops.exp(-ops.abs(distance))
        return ops.where(distance > 0, part - self.first, self.span + self.rest - part) / self.span

    def slope(self, t):
        """-b u' / min(u, 1 - u)."""
        return -self.b * self.span / ops.minimum(*self._place(t))

    def _place(self, t):
        return _between(t, self.first, self.rest)


class LinearVP(NoiseSchedule):
    """The VP process with linear beta(t) (Song et al. 2021, arXiv:2011.13456, eqs. 29 and 33), variance preserving:

        alpha = exp(-B / 2),   B(t) = integral of beta from 0 to t = t beta_min + t^2 (beta_max - beta_min) / 2,
        log_snr = -log(e^B - 1).

    It is the limit of `LinearBeta(T, beta_min / T, beta_max / T)` for large T. It is truncated at t = 0, where t is
    replaced by `epsilon` + (1 - `epsilon`) t.

    Args:
        beta_min: beta at t = 0, above zero.
        beta_max: beta at t = 1, at most 100.
        epsilon: the smallest time. 1e-5, as in the paper's training, gives log-SNRs from 13.8 to -10.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, epsilon: float = 1e-5):
        super().__init__()
        name = type(self).__name__
        check_number(name, "beta_min", beta_min, 1e-4, 100.0)
        check_number(name, "beta_max", beta_max, beta_min, 100.0)
        check_number(name, "epsilon", epsilon, 1e-8, 0.1)
        self.beta_min, self.beta_max, self.epsilon = beta_min, beta_max, epsilon

    def log_snr(self, t):
        return -ops.log(ops.expm1(self._integral(t)))

    def time(self, log_snr):
        """Solves B = log(1 + e^-log_snr) for t."""
        return self._time(ops.softplus(-_tensor(log_snr)))

    def slope(self, t):
        """-B' / (1 - e^-B)."""
        return self._rate(t) / ops.expm1(-self._integral(t))

    def _integral(self, t):
        u = self.epsilon + (1.0 - self.epsilon) * _tensor(t)
        return u * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * u)

    def _rate(self, t):
        u = self.epsilon + (1.0 - self.epsilon) * _tensor(t)
        return (1.0 - self.epsilon) * (self.beta_min + (self.beta_max - self.beta_min) * u)

    def _time(self, integral):
        """The root of B(u) = integral, written as a quotient that does not cancel for small B."""
        root = ops.sqrt(self.beta_min**2 + 2.0 * (self.beta_max - self.beta_min) * integral)
        return (2.0 * integral / (self.beta_min + root) - self.epsilon) / (1.0 - self.epsilon)


class SubVP(LinearVP):
    """The sub-VP process with linear beta(t) (Song et al. 2021, arXiv:2011.13456, eqs. 28 and 29):

        alpha = exp(-B / 2),   sigma = 1 - exp(-B),   log_snr = -B - 2 log(1 - e^-B),

    with B(t) as in `LinearVP`: the same alpha as the VP process and the square of its sigma, so that
    alpha^2 + sigma = 1. It is truncated at t = 0 as `LinearVP` is.

    Args:
        beta_min: beta at t = 0, above zero.
        beta_max: beta at t = 1, at most 100.
        epsilon: the smallest time. 1e-5 gives log-SNRs from 27.6 to -10.
    """

    def log_snr(self, t):
        """-B - 2 log(1 - e^-B)."""
        integral = self._integral(t)
        return -integral - 2.0 * ops.log(-ops.expm1(-integral))

    def time(self, log_snr):
        """Solves B = -log(1 - sigma) for t; where sigma is near 1, B = -log_snr - 2 log(sigma) instead."""
        log_snr = _tensor(log_snr)
        _, sigma = self.scales(log_snr)
        early = -ops.log1p(-ops.minimum(sigma, 0.5))
        return self._time(ops.where(sigma < 0.5, early, -log_snr - 2.0 * ops.log(sigma)))

    def scales(self, log_snr):
        """(e^(log_snr / 2) sigma, sigma); sigma = 2 / (1 + sqrt(1 + 4 SNR)) solves SNR sigma^2 = 1 - sigma."""
        sigma = 2.0 / (1.0 + ops.sqrt(1.0 + 4.0 * ops.exp(log_snr)))
        return ops.exp(log_snr / 2) * sigma, sigma

    def slope(self, t):
        """-B' (e^B + 1) / (e^B - 1)."""
        return -self._rate(t) / ops.tanh(self._integral(t) / 2)


class VarianceExploding(NoiseSchedule):
    """The variance exploding process, in which log_snr is linear in t (Song et al. 2021, arXiv:2011.13456, eq. 31):

        alpha = 1,   sigma = sigma_min (sigma_max / sigma_min)^t,   log_snr = -2 log(sigma).

    The defaults are those of EDM (Karras et al. 2022, arXiv:2206.00364, table 1), which chooses the training noise
    levels and the sampling grid separately from the schedule.

    Args:
        sigma_min: sigma at t = 0, above zero.
        sigma_max: sigma at t = 1, above `sigma_min`.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0):
        super().__init__()
        check_number("VarianceExploding", "sigma_min", sigma_min, 1e-8, 1e8)
        check_number("VarianceExploding", "sigma_max", sigma_max, sigma_min, 1e8)
        if sigma_min == sigma_max:
            raise ValueError(f"VarianceExploding: `sigma_max` must exceed `sigma_min`; both are {sigma_min}")
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.first, self.span = float(np.log(sigma_min)), float(np.log(sigma_max / sigma_min))

    def log_snr(self, t):
        return -2.0 * (self.first + self.span * _tensor(t))

    def time(self, log_snr):
        """log(sigma / sigma_min) / log(sigma_max / sigma_min)."""
        return (-0.5 * _tensor(log_snr) - self.first) / self.span

    def scales(self, log_snr):
        return ops.ones_like(log_snr), ops.exp(-log_snr / 2)

    def slope(self, t):
        """-2 log(sigma_max / sigma_min)."""
        return ops.full_like(_tensor(t), -2.0 * self.span)


class Rectified(NoiseSchedule):
    """Rectified flow (Liu et al. 2022, arXiv:2209.03003, eq. 1): linear interpolation between data and noise,

        alpha = 1 - t,  sigma = t,  log_snr = 2 log(alpha / sigma),

    truncated at both ends, sigma = `epsilon` + (1 - 2 `epsilon`) t, so that log_snr stays finite.

    Args:
        epsilon: sigma at t = 0, and alpha at t = 1.
    """

    def __init__(self, epsilon: float = 1e-5):
        super().__init__()
        check_number("Rectified", "epsilon", epsilon, 1e-8, 0.1)
        self.epsilon = epsilon

    def log_snr(self, t):
        sigma, alpha = within(t, self.epsilon)
        return 2.0 * ops.log(alpha / sigma)

    def time(self, log_snr):
        sigma = ops.sigmoid(-_tensor(log_snr) / 2)
        return (sigma - self.epsilon) / (1.0 - 2.0 * self.epsilon)

    def scales(self, log_snr):
        """(sigmoid(log_snr / 2), sigmoid(-log_snr / 2)): alpha + sigma = 1."""
        return ops.sigmoid(log_snr / 2), ops.sigmoid(-log_snr / 2)

    def slope(self, t):
        """-2 sigma' / (alpha sigma)."""
        sigma, alpha = within(t, self.epsilon)
        return -2.0 * (1.0 - 2.0 * self.epsilon) / (alpha * sigma)


def _between(t, first: float, rest: float):
    """(u, 1 - u), where u is linear in t, from `first` to 1 - `rest`, both of which may be tiny."""
    t = _tensor(t)
    span = 1.0 - first - rest
    # If span is 1, a compiler may rewrite the second value as (1 + rest) - t, which loses `rest` at t = 1.
    return first + span * t, ops.maximum(rest + span * (1.0 - t), rest)


def within(t, epsilon: float):
    """(u, 1 - u), where u goes from epsilon to 1 - epsilon."""
    return _between(t, epsilon, epsilon)


def check_range(name: str, min_log_snr: float, max_log_snr: float) -> None:
    """Raises a ValueError unless both are in [-40, 40] and the second exceeds the first."""
    check_number(name, "min_log_snr", min_log_snr, -40.0, 40.0)
    check_number(name, "max_log_snr", max_log_snr, min_log_snr, 40.0)
    if min_log_snr == max_log_snr:
        raise ValueError(f"{name}: `max_log_snr` must exceed `min_log_snr`; both are {min_log_snr}")
