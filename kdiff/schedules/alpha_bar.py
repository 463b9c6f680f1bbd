"""The schedules of Chen 2023 (arXiv:2301.10972), in which alpha_bar = alpha^2 is a formula in t."""

import numpy as np
from keras import ops

from kdiff.base import check_number
from kdiff.schedules.base import NoiseSchedule
from kdiff.schedules.continuous import within

__all__ = ["CosineAlphaBar", "SigmoidAlphaBar"]


class SigmoidAlphaBar(NoiseSchedule):
    """The sigmoid schedule of Chen 2023 (arXiv:2301.10972, algorithm 1), variance preserving:

        alpha_bar = alpha^2 = (s(1) - s(t)) / (s(1) - s(0)),    s(t) = sigmoid((start + (end - start) t) / tau).

    A difference of two sigmoids is a quotient, s(q) - s(p) = sinh((q - p) / 2) / (2 cosh(q / 2) cosh(p / 2)), so

        log_snr = log(sinh(h (1 - t)) / sinh(h t)) + log(cosh(start / 2 tau) / cosh(end / 2 tau)),
        h = (end - start) / 2 tau,

    which has no cancellation. It is truncated at both ends, where t is replaced by `epsilon` + (1 - 2 `epsilon`) t.

    Args:
        start: the argument of the sigmoid at t = 0, times tau.
        end: the argument of the sigmoid at t = 1, times tau.
        tau: the temperature, above zero; `start` / tau and `end` / tau must lie in [-40, 40].
        epsilon: the part of the range of t that is removed at each end. 1e-6, with the other defaults, gives log-SNRs
            from 15 to -15.
    """

    def __init__(self, start: float = -3.0, end: float = 3.0, tau: float = 1.0, epsilon: float = 1e-6):
        super().__init__()
        check_number("SigmoidAlphaBar", "tau", tau, 1e-3)
        check_number("SigmoidAlphaBar", "start", start, -40.0 * tau, 40.0 * tau)
        check_number("SigmoidAlphaBar", "end", end, start + 1e-3 * tau, 40.0 * tau)
        check_number("SigmoidAlphaBar", "epsilon", epsilon, 1e-8, 0.1)
        self.start, self.end, self.tau, self.epsilon = start, end, tau, epsilon
        self.half = (end - start) / (2.0 * tau)
        self.centre = float(_log_cosh(start / (2.0 * tau)) - _log_cosh(end / (2.0 * tau)))

    def log_snr(self, t):
        """log(sinh(h (1 - t)) / sinh(h t)) + ..., where 2 sinh(x) = e^x (1 - e^-2x)."""
        u, rest = (self.half * v for v in within(t, self.epsilon))
        return rest - u + ops.log(ops.expm1(-2.0 * rest) / ops.expm1(-2.0 * u)) + self.centre

    def time(self, log_snr):
        """t = log(1 + 2 sinh(h) / (r + e^-h)) / 2h,   r = sinh(h (1 - t)) / sinh(h t)."""
        r = ops.exp(ops.convert_to_tensor(log_snr, "float32") - self.centre)
        u = ops.log1p(2.0 * np.sinh(self.half) / (r + np.exp(-self.half))) / (2.0 * self.half)
        return (u - self.epsilon) / (1.0 - 2.0 * self.epsilon)

    def slope(self, t):
        """-h (coth(h (1 - t)) + coth(h t))."""
        u, rest = (self.half * v for v in within(t, self.epsilon))
        return -self.half * (1.0 - 2.0 * self.epsilon) * (1.0 / ops.tanh(rest) + 1.0 / ops.tanh(u))


class CosineAlphaBar(NoiseSchedule):
    """The cosine schedule of Chen 2023 (arXiv:2301.10972, algorithm 1), variance preserving:

        alpha_bar = alpha^2 = (v(1) - v(t)) / (v(1) - v(0)),
        v(t) = cos(w)^(2 tau),   w = (start + (end - start) t) pi / 2.

    It is truncated at both ends, where t is replaced by `epsilon` + (1 - 2 `epsilon`) t. With the defaults it equals
    `Trigonometric()`.

    Args:
        start: the angle w at t = 0 in units of pi / 2, in [0, 1).
        end: the angle w at t = 1 in units of pi / 2, in (`start`, 1].
        tau: the temperature, in [0.1, 3].
        epsilon: the part of the range of t that is removed at each end, in [1e-6, 0.1].
    """

    def __init__(self, start: float = 0.0, end: float = 1.0, tau: float = 1.0, epsilon: float = 1e-5):
        super().__init__()
        check_number("CosineAlphaBar", "start", start, 0.0, 0.999)
        check_number("CosineAlphaBar", "end", end, start + 1e-3, 1.0)
        check_number("CosineAlphaBar", "tau", tau, 0.1, 3.0)
        check_number("CosineAlphaBar", "epsilon", epsilon, 1e-6, 0.1)
        self.start, self.end, self.tau, self.epsilon = start, end, tau, epsilon
        self.first, self.last = start * np.pi / 2, end * np.pi / 2  # w at the ends, and its cosine
        self.first_cosine, self.last_cosine = float(np.cos(self.first)), float(np.cos(self.last))

    def log_snr(self, t):
        """log((v(t) - v(1)) / (v(0) - v(t))), with x = log(v(0) / v(t)) and y = log(v(t) / v(1))."""
        x, y, _ = self._logarithms(t)
        return ops.log(ops.expm1(-y) / ops.expm1(-x)) - x

    def time(self, log_snr):
        """Solves v(t) / v(0) = 1 - (1 - alpha_bar) (1 - v(1) / v(0)) for t."""
        log_snr = ops.convert_to_tensor(log_snr, "float32")
        signal, noise = ops.sigmoid(log_snr), ops.sigmoid(-log_snr)
        last = (self.last_cosine / self.first_cosine) ** (2.0 * self.tau)
        early = ops.log1p(-ops.minimum(noise, 0.5) * (1.0 - last))
        x = ops.where(noise < 0.5, early, ops.log(signal + noise * last)) / (2.0 * self.tau)
        u = (self._angle(x) - self.first) / (self.last - self.first)
        return (u - self.epsilon) / (1.0 - 2.0 * self.epsilon)

    def slope(self, t):
        """-2 tau w' tan(w) (1 / (1 - e^-y) + 1 / (e^x - 1)), x and y as in `log_snr`."""
        x, y, tangent = self._logarithms(t)
        rate = (1.0 - 2.0 * self.epsilon) * (self.last - self.first)
        return 2.0 * self.tau * rate * tangent * (1.0 / ops.expm1(-y) - 1.0 / ops.expm1(x))

    def _logarithms(self, t):
        """(x, y, tan(w)), from cos(p) - cos(q) = 2 sin((p + q) / 2) sin((q - p) / 2), which does not cancel."""
        gone, left = (v * (self.last - self.first) for v in within(t, self.epsilon))
        fallen = 2.0 * ops.sin(self.first + gone / 2) * ops.sin(gone / 2)  # cos(w(0)) - cos(w)
        to_fall = 2.0 * ops.sin(self.last - left / 2) * ops.sin(left / 2)  # cos(w) - cos(w(1))
        cosine = self.last_cosine + to_fall
        early = -ops.log1p(-ops.minimum(fallen / self.first_cosine, 0.5))
        x = ops.where(fallen < 0.5 * self.first_cosine, early, ops.log(self.first_cosine / cosine))
        y = ops.log1p(to_fall / self.last_cosine)
        return 2.0 * self.tau * x, 2.0 * self.tau * y, ops.sin(self.first + gone) / cosine

    def _angle(self, log_ratio):
        """w from log(cos(w) / cos(w(0))), by 1 - cos(w) = 2 sin(w / 2)^2, which is accurate for small w."""
        fallen = 1.0 - self.first_cosine - self.first_cosine * ops.expm1(log_ratio)  # 1 - cos(w)
        return 2.0 * ops.arcsin(ops.sqrt(ops.clip(fallen / 2, 0.0, 0.5)))


def _log_cosh(x: float) -> float:
    return np.logaddexp(x, -x) - np.log(2.0)
