"""Sampling grids of noise levels: s = sigma / alpha takes given values, at t = schedule.time(-2 log s)."""

import math
from collections.abc import Sequence

import numpy as np
from keras import ops

from kdiff.base import check_number
from kdiff.schedules import NoiseSchedule
from kdiff.times.grids import TimeGrid, evenly_spaced

__all__ = ["Exponential", "Karras", "Polyexponential", "Sigmas", "UniformLogSNR"]

_LEAST = 1e-7  # a time above 0 with practically the noise level of 0


class _Sigmas(TimeGrid):
    """Times at which s = sigma / alpha takes given values from `sigma_max` to `sigma_min`. A new one defines `sigmas`.

    An end that is None is that of the schedule: t = 1, and the first step of a discrete schedule. The clean end of a
    continuous schedule is t = 0, so in that case the `steps` + 1 values from end to end are the whole grid. If
    `sigma_min` is given, the last step goes from there to t = 0, as in EDM. If it equals that of the schedule, as 0.002
    does for `VarianceExploding()`, it is placed at t = 1e-7, because t = 0 is the data itself.
    """

    def __init__(self, sigma_min: float | None = None, sigma_max: float | None = None):
        name = type(self).__name__
        for argument, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max)):
            if value is not None:
                check_number(name, argument, value, 1e-12)
        if None not in (sigma_min, sigma_max) and sigma_min >= sigma_max:
            raise ValueError(f"{name}: `sigma_max` must exceed `sigma_min`; received: {sigma_max} and {sigma_min}")
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def above_zero(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        low, high = self._ends(schedule)
        sigmas = self.sigmas(low, high, self.spaces(steps, self.sigma_min is not None or schedule.first_time > 0))
        times = _times_at(schedule, sigmas)
        # `time` may miss the ends by rounding errors.
        times[0] = 1.0 if self.sigma_max is None else times[0]
        if self.sigma_min is None and steps > 1:
            times[-1] = max(times[-1], schedule.first_time)
        return times

    def sigmas(self, low: float, high: float, u: np.ndarray) -> np.ndarray:
        """s at u, increasing from `low` at u = 0 to `high` at u = 1."""
        raise NotImplementedError

    def spaces(self, steps: int, closed: bool) -> np.ndarray:
        """u, decreasing from 1; down to 0 if `closed`."""
        return evenly_spaced(steps, closed)

    def _ends(self, schedule: NoiseSchedule) -> tuple[float, float]:
        """(sigma_min, sigma_max), checked to be within the range of the schedule."""
        lowest, highest = _ends_of(schedule)
        low = lowest if self.sigma_min is None else self.sigma_min
        high = highest if self.sigma_max is None else self.sigma_max
        _check_within(type(self).__name__, schedule, low, high)
        return low, high


def _ends_of(schedule: NoiseSchedule) -> list[float]:
    """The smallest and the largest sigma / alpha."""
    return [math.exp(-0.5 * float(ops.convert_to_numpy(end))) for end in schedule.log_snr_ends()]


def _check_within(name: str, schedule: NoiseSchedule, low: float, high: float) -> None:
    lowest, highest = _ends_of(schedule)
    if not lowest * 0.9999 <= low <= high <= highest * 1.0001:  # the ends are known in float32
        raise ValueError(
            f"{name}: `sigma_min` < `sigma_max` must lie in [{lowest:.6g}, {highest:.6g}], the sigma / alpha of "
            f"{schedule!r}; received: {low:.6g} and {high:.6g}"
        )


def _times_at(schedule: NoiseSchedule, sigmas: np.ndarray) -> np.ndarray:
    """Times above 0 at which sigma / alpha has these values."""
    log_snr = ops.convert_to_tensor(-2.0 * np.log(sigmas), "float32")
    return np.clip(ops.convert_to_numpy(schedule.time(log_snr)).astype("float64"), _LEAST, 1.0)


class Sigmas(TimeGrid):
    """Explicitly given noise levels s = sigma / alpha, as in EDM and k-diffusion, on any schedule.

    Args:
        sigmas: one value per step, strictly decreasing and above zero; a final 0 may follow.

    Raises:
        ValueError: if they are not; and, when called, if the run has another number of steps, or a value is outside the
            range of the schedule.
    """

    def __init__(self, sigmas: Sequence[float]):
        s = np.asarray(sigmas, "float64").ravel()
        above = s[:-1] if len(s) and s[-1] == 0 else s
        if not (len(above) and np.all(np.isfinite(above)) and above[-1] > 0 and np.all(np.diff(above) < 0)):
            raise ValueError(
                f"Sigmas: `sigmas` must be positive and strictly decreasing, with an optional final 0; received: "
                f"{sigmas!r}"
            )
        self.sigmas = tuple(float(one) for one in s)
        self._above = above

    def default_steps(self, schedule: NoiseSchedule) -> int:
        return len(self._above)

    def above_zero(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        if steps != len(self._above):
            raise ValueError(f"Sigmas: `steps` must be {len(self._above)}, to use every value; received: {steps}")
        _check_within("Sigmas", schedule, self._above[-1], self._above[0])
        return _times_at(schedule, self._above)


class Karras(_Sigmas):
    """Evenly spaced s^(1 / rho) (Karras et al. 2022, "EDM", arXiv:2206.00364, eq. 5):

        s = (sigma_min^(1 / rho) + u (sigma_max^(1 / rho) - sigma_min^(1 / rho)))^rho

    Args:
        rho: above 0; larger values place more of the steps near the data.
        sigma_min: the last sigma / alpha above zero, 0.002 in EDM. None: that of the schedule.
        sigma_max: the first sigma / alpha, 80 in EDM. None: that of the schedule.
    """

    def __init__(self, rho: float = 7.0, sigma_min: float | None = None, sigma_max: float | None = None):
        super().__init__(sigma_min, sigma_max)
        check_number("Karras", "rho", rho, 1e-3)
        self.rho = rho

    def sigmas(self, low: float, high: float, u: np.ndarray) -> np.ndarray:
        low, high = low ** (1.0 / self.rho), high ** (1.0 / self.rho)
        return (low + u * (high - low)) ** self.rho


class Exponential(_Sigmas):
    """Evenly spaced log s, and so log-SNR (Lu et al. 2022, "DPM-Solver", arXiv:2206.00927, section 3.4).

    Args:
        sigma_min: the last sigma / alpha above zero. None: that of the schedule.
        sigma_max: the first sigma / alpha. None: that of the schedule.
    """

    def sigmas(self, low: float, high: float, u: np.ndarray) -> np.ndarray:
        return np.exp(math.log(low) + u * (math.log(high) - math.log(low)))


class Polyexponential(_Sigmas):
    """The polyexponential grid of k-diffusion, for evenly spaced u:

        s = exp(log(sigma_min) + u^rho (log(sigma_max) - log(sigma_min)))

    Args:
        rho: above 0; 1 gives `Exponential`, and larger values place more of the steps near the data.
        sigma_min: the last sigma / alpha above zero. None: that of the schedule.
        sigma_max: the first sigma / alpha. None: that of the schedule.
    """

    def __init__(self, rho: float = 1.0, sigma_min: float | None = None, sigma_max: float | None = None):
        super().__init__(sigma_min, sigma_max)
        check_number("Polyexponential", "rho", rho, 1e-3)
        self.rho = rho

    def sigmas(self, low: float, high: float, u: np.ndarray) -> np.ndarray:
        return np.exp(math.log(low) + u**self.rho * (math.log(high) - math.log(low)))


class UniformLogSNR(Exponential):
    """Evenly spaced log-SNR: `Exponential`, with the ends given as log-SNR.

    Args:
        min_log_snr: the first log-SNR. None: that of the schedule at t = 1.
        max_log_snr: the last log-SNR above t = 0. None: the clean end of the schedule.
    """

    def __init__(self, min_log_snr: float | None = None, max_log_snr: float | None = None):
        for argument, value in (("min_log_snr", min_log_snr), ("max_log_snr", max_log_snr)):
            if value is not None:
                check_number("UniformLogSNR", argument, value, -50.0, 50.0)
        if None not in (min_log_snr, max_log_snr) and min_log_snr >= max_log_snr:
            raise ValueError(
                f"UniformLogSNR: `max_log_snr` must exceed `min_log_snr`; received: {max_log_snr} and {min_log_snr}"
            )
        low, high = (None if end is None else math.exp(-0.5 * end) for end in (max_log_snr, min_log_snr))
        super().__init__(low, high)
        self.min_log_snr, self.max_log_snr = min_log_snr, max_log_snr
