"""Schedules of diffusers that differ from kdiff's own; not obtainable by name through `get`."""

import numpy as np
from keras import ops

from kdiff.base import check_integer, check_number
from kdiff.schedules import AlphaBarTable, BetaTable, NoiseSchedule

__all__ = ["ExponentialBeta", "LaplaceBeta", "NearlyZeroSNR", "WuerstchenCosine"]


class NearlyZeroSNR(AlphaBarTable):
    """`ZeroTerminalSNR` of a table as in the schedulers of diffusers that divide by alpha: alpha^2 = 2^-24 at T.

    Earlier steps with a lower value are raised slightly above it; in diffusers they are unchanged.

    Args:
        schedule: a discrete schedule with a table, or its name.
    """

    named = False

    def __init__(self, schedule):
        schedule = NoiseSchedule.get(schedule)
        alpha = np.exp(-0.5 * np.logaddexp(0.0, -schedule.log_snrs[1:]))  # sqrt(sigmoid(log-SNR))
        with np.errstate(invalid="ignore"):  # a single step has no range
            alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        super().__init__(np.maximum(alpha**2, 2.0**-24 * (1.0 + 1e-4 * np.arange(len(alpha))[::-1])))
        self.schedule = schedule


class _Sampled(BetaTable):
    """A table from f, which decreases in u: beta_i = 1 - f((i + 1) / T) / f(i / T), at most 0.999.

    Thus alpha_bar is proportional to f, except where the bound applies.

    Args:
        num_steps: the number of steps T.
    """

    named = False

    def __init__(self, num_steps: int = 1000):
        check_integer(type(self).__name__, "num_steps", num_steps)
        log_f = self._log_f(np.arange(num_steps + 1) / num_steps)
        super().__init__(np.minimum(-np.expm1(np.diff(log_f)), 0.999))


class LaplaceBeta(_Sampled):
    """The "laplace" schedule of diffusers (after Hang et al. 2024, arXiv:2407.03297), with f = sqrt(r / (1 + r)),

        log(r) = -sgn(0.5 - u) / 2 log(1 - 2 |0.5 - u| + 1e-6).

    The square root is not in the paper, where alpha_bar = r / (1 + r), as in `schedules.Laplace(b=0.5)`.
    """

    named = False

    def _log_f(self, u):
        log_r = -0.5 * np.copysign(1.0, 0.5 - u) * np.log(1.0 - 2.0 * np.abs(0.5 - u) + 1e-6)
        return -0.5 * np.logaddexp(0.0, -log_r)


class ExponentialBeta(_Sampled):
    """The "exp" schedule of diffusers, with f = e^(-12 u): all betas are equal."""

    named = False

    def _log_f(self, u):
        return -12.0 * u


class WuerstchenCosine(NoiseSchedule):
    """The cosine schedule of Wuerstchen and Stable Cascade (Pernias et al. 2023, arXiv:2306.00637), continuous:

        alpha^2 = cos^2((u + s) / (1 + s) pi / 2) / cos^2(s / (1 + s) pi / 2), from 1e-4 to 0.9999,
        u = 1 - (1 - t)^scaler  if `scaler` > 1, else t^scaler.

    Args:
        scaler: the power.
        s: the offset.
    """

    named = False

    def __init__(self, scaler: float = 1.0, s: float = 0.008):
        super().__init__()
        check_number("WuerstchenCosine", "scaler", scaler, 0.01, 100.0)
        check_number("WuerstchenCosine", "s", s, 0.0, 1.0)
        self.scaler, self.s = scaler, s
        self.first = float(s / (1.0 + s) * np.pi / 2)

    def log_snr(self, t):
        """log(alpha^2 / sigma^2), with sigma^2 = sin(w - w_0) sin(w + w_0) / cos^2(w_0), which avoids cancellation."""
        t = ops.convert_to_tensor(t, "float32")
        u = 1.0 - (1.0 - t) ** self.scaler if self.scaler > 1 else t**self.scaler
        way = u * (np.pi / 2 - self.first)
        square = ops.sin(way) * ops.sin(way + 2.0 * self.first) / np.cos(self.first) ** 2
        alpha = ops.clip(1.0 - square, 1e-4, 0.9999)
        return ops.log(alpha) - ops.log(ops.clip(square, 1e-4, 0.9999))

    def time(self, log_snr):
        """The inverse, where alpha^2 is within its bounds."""
        alpha = ops.sqrt(ops.sigmoid(ops.convert_to_tensor(log_snr, "float32"))) * np.cos(self.first)
        u = ops.clip((ops.arccos(alpha) - self.first) / (np.pi / 2 - self.first), 0.0, 1.0)
        return 1.0 - (1.0 - u) ** (1.0 / self.scaler) if self.scaler > 1 else u ** (1.0 / self.scaler)
