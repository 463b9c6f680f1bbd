"""Time grids of diffusers that differ from kdiff's own; they cannot be obtained by name through `get`."""

import numpy as np
from keras import ops

from kdiff.schedules import NoiseSchedule
from kdiff.times import BetaQuantile, FlowShift, Karras, TimeGrid, Trailing
from kdiff.times.noise_grids import _Sigmas

__all__ = [
    "HAIR",
    "BetaSigmas",
    "Consistent",
    "FlowMatching",
    "FlowSigmas",
    "LinspaceUnrounded",
    "SineSquared",
    "Uniform",
    "UpTo",
    "Upwards",
    "WithFirst",
    "Within",
    "WithoutLast",
    "stretched",
]

# The decrement of t in a step that has length 0 in diffusers: the network is called, but x does not change.
HAIR = 2.0**-22


class LinspaceUnrounded(TimeGrid):
    """`steps` equally spaced indices from T - 1 to 0, interpolated between steps of the process, for Euler and Heun.

    diffusers interpolates sigma / alpha linearly, a table of kdiff its logarithm: the times are those at which both
    agree.
    """

    named = False

    def indices(self, num_steps: int, steps: int) -> np.ndarray:
        """linspace(T - 1, 0, steps)."""
        return np.linspace(num_steps - 1, 0, steps)

    def above_zero(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        """The times of the indices; between i and i + 1, at (1 - f) s_i + f s_(i + 1)."""
        times = super().above_zero(schedule, steps)
        if schedule.num_steps is None:
            return times
        below, fraction = np.divmod(times * schedule.num_steps, 1.0)
        ends = np.minimum([below, below + 1.0], schedule.num_steps) / schedule.num_steps
        rise = np.diff(-0.5 * ops.convert_to_numpy(schedule.log_snr(ends.astype("float32"))).astype("float64"), axis=0)[
            0
        ]
        return (below + np.log1p(fraction * np.expm1(rise)) / np.where(rise > 0, rise, 1.0)) / schedule.num_steps


class WithoutLast(TimeGrid):
    """A grid with one more step, without its last time, as in DPM-Solver and UniPC of diffusers.

    Args:
        grid: a `TimeGrid` or its name.
    """

    named = False

    def __init__(self, grid="linspace"):
        self.grid = TimeGrid.get(grid)

    def above_zero(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        """The first `steps` times of a run of `steps` + 1."""
        return self.grid.above_zero(schedule, steps + 1)[:-1]


class UpTo(TimeGrid):
    """An index grid on only the first steps of the process, as with `lambda_min_clipped` in diffusers.

    For these, "trailing" keeps the spacing of the whole process, so that there may be fewer times than requested.

    Args:
        grid: an index `TimeGrid`, or its name.
        last: the number of steps of the process in use.
    """

    named = False

    def __init__(self, grid="linspace", last: int = 1000):
        self.grid, self.last = TimeGrid.get(grid), last

    def indices(self, num_steps: int, steps: int) -> np.ndarray:
        """The indices of the grid on `last` steps."""
        if isinstance(self.grid, Trailing):
            return np.round(np.arange(self.last, 0, -num_steps / steps)) - 1
        return self.grid.indices(self.last, steps)


class WithFirst(TimeGrid):
    """A grid followed by the first step of the process, for runs that end there, with `Sampler(to_zero=False)`.

    Stable Diffusion's runs end there (diffusers: `set_alpha_to_one` is false, or `final_sigmas_type` is "sigma_min").
    If the grid itself ends there, or the schedule is continuous, the time that follows is slightly lower: diffusers
    takes a step of length 0 there, in which the network is called again and the order drops.

    Args:
        grid: a `TimeGrid` or its name.
        first: the final time, if the grid does not end there; None for the first step of the process.
    """

    named = False

    def __init__(self, grid="leading", first: float | None = None):
        self.grid, self.first = TimeGrid.get(grid), first

    def above_zero(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        """The times of the grid, then 1 / T, or a time slightly below the last."""
        times, first = self.grid.above_zero(schedule, steps), self.first or schedule.first_time
        return np.append(times, first if first and times[-1] > first * 1.001 else times[-1] * (1.0 - HAIR))


class Upwards(TimeGrid):
    """An index grid for inversion (a run to noise), in decreasing order, for `Sampler(to_zero=False)`: the noisiest
    step in use, and the steps that lead to it:

        "linspace"    round(k (last - 1) / steps)            k = steps ... 0
        "leading"     last - 1;  k floor(last / (steps + 1)) + offset,    k = steps - 1 ... 0

    Args:
        grid: a `Leading` or a `Linspace`.
        last: the number of steps of the process in use.
    """

    named = False

    def __init__(self, grid="linspace", last: int = 1000):
        self.grid, self.last = TimeGrid.get(grid), last

    def above_zero(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        """The `steps` + 1 times."""
        return super().above_zero(schedule, steps + 1)

    def indices(self, num_steps: int, steps: int) -> np.ndarray:
        """The index i for one step fewer than these times."""
        return np.append(self.last - 1, self.grid.indices(self.last, steps)[1:])


class BetaSigmas(_Sigmas):
    """s = sigma / alpha at the quantiles of a beta distribution between its ends, with both parameters 0.6; the
    `use_beta_sigmas` of diffusers (Lee et al. 2024, arXiv:2407.12173, use quantiles of times: `times.BetaQuantile`).

    Args:
        sigma_min: the last sigma / alpha above zero. None for that of the schedule.
        sigma_max: the first. None for that of the schedule.
    """

    named = False

    def sigmas(self, low: float, high: float, u: np.ndarray) -> np.ndarray:
        """sigma_min + (sigma_max - sigma_min) q(u)."""
        return low + BetaQuantile(0.6, 0.6).warp(u) * (high - low)


class Within(TimeGrid):
    """A grid of noise levels between the first and last of another grid, as Karras sigmas in diffusers' Euler.

    Args:
        noise: the grid of noise levels, such as `Karras()`; its `sigma_min` and `sigma_max` are set if they are None.
        ends: the grid from which these are taken.
    """

    named = False

    def __init__(self, noise="karras", ends="linspace"):
        self.noise, self.ends = TimeGrid.get(noise), TimeGrid.get(ends)

    def above_zero(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        """The noise levels."""
        times = self.ends.above_zero(schedule, steps)[[0, -1]].astype("float32")
        high, low = np.exp(-0.5 * ops.convert_to_numpy(schedule.log_snr(times)).astype("float64"))
        given = {"sigma_min": self.noise.sigma_min or float(low), "sigma_max": self.noise.sigma_max or float(high)}
        return self.noise.clone(**given).above_zero(schedule, steps)


class FlowMatching(TimeGrid):
    """The times of rectified flow in diffusers: `steps` equally spaced u from 1 to that of the first step, shifted:

        t = w(u),   w(u) = shift u / (1 + (shift - 1) u),   u = 1 ... w(1 / T).

    Args:
        shift: above 1, there are more steps near the noise.
        num_steps: T.
        last: the last u; None for w(1 / T).
        terminal: the value to which the last t is moved, all others stretched, as in LTX; None for no change.
        noise: a grid of noise levels, such as `Karras()`, used as values of t between its first and its last; None for
            none.
    """

    named = False

    def __init__(
        self,
        shift: float = 1.0,
        num_steps: int = 1000,
        last: float | None = None,
        terminal: float | None = None,
        noise=None,
    ):
        self.shift, self.num_steps, self.last, self.terminal = shift, num_steps, last, terminal
        self.noise = None if noise is None else TimeGrid.get(noise)
        self._warp = FlowShift(shift).warp

    def above_zero(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        """w(1 ... w(1 / T))."""
        last = self._warp(np.float64(1.0 / self.num_steps)) if self.last is None else self.last
        times = stretched(self._warp(np.linspace(1.0, last, steps)), self.terminal)
        if self.noise is None:
            return times
        return self.noise.sigmas(times[-1], times[0], np.linspace(1.0, 0.0, steps))


class FlowSigmas(TimeGrid):
    """The times of rectified flow in the solvers of diffusers with `use_flow_sigmas`, t = w(u):

        "ends below"     u = 1 - 1 / T ... 0 in `steps` + 1 values, without the last        DPM-Solver, DEIS, SASolver
        "begins at one"  u = 1 ... 1 / T in `steps` + 1 values, without the last            UniPC; its first is 1 - 1e-6

    Args:
        shift: of w, as in `FlowMatching`.
        num_steps: T.
        from_one: whether u begins at 1.
        terminal: the value to which the last t is moved, all others stretched, as in LTX; None for no change.
    """

    named = False

    def __init__(
        self, shift: float = 1.0, num_steps: int = 1000, from_one: bool = False, terminal: float | None = None
    ):
        self.shift, self.num_steps, self.from_one, self.terminal = shift, num_steps, from_one, terminal
        self._warp = FlowShift(shift).warp

    def above_zero(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        """w(u)."""
        last = 1.0 / self.num_steps
        ends = (1.0, last) if self.from_one else (1.0 - last, 0.0)
        times = stretched(self._warp(np.linspace(*ends, steps + 1)[:-1]), self.terminal)
        times, labels = np.minimum(times, 1.0 - 1e-6), times * self.num_steps
        # diffusers truncates 99.99999999999999, the result of rounding, to 99: such a time is moved below the float32
        # neighbourhood of 100, also for `times.RoundedLabel`.
        whole = np.ceil(labels)
        return np.where((labels < whole) & (whole - labels < 1e-9), (whole - 2e-3) / self.num_steps, times)


def stretched(times: np.ndarray, terminal: float | None) -> np.ndarray:
    """Rescales 1 - t so that the last t is `terminal`, in the order of operations of diffusers."""
    return times if terminal is None else 1.0 - (1.0 - times) / ((1.0 - times[-1]) / (1.0 - terminal))


class Consistent(Karras):
    """Karras' noise levels at a subset of the `num_steps` at which a consistency model was distilled: the indices
    0, T // steps, 2 (T // steps), ..., from `sigma_max` down; with few steps they end far above `sigma_min`.

    Args:
        num_steps: T.
        rho: as in `Karras`.
        sigma_min: as in `Karras`.
        sigma_max: as in `Karras`.
    """

    named = False

    def __init__(self, num_steps: int = 40, rho: float = 7.0, sigma_min: float = 0.002, sigma_max: float = 80.0):
        super().__init__(rho, sigma_min, sigma_max)
        self.num_steps = num_steps

    def spaces(self, steps: int, closed: bool) -> np.ndarray:
        """u, in T - 1 spaces from 1 to 0."""
        if steps > self.num_steps:
            raise ValueError(f"Consistent: `steps` must be at most {self.num_steps}; received: {steps}")
        return 1.0 - np.arange(steps) * (self.num_steps // steps) / (self.num_steps - 1)


class SineSquared(TimeGrid):
    """Times at which sin(pi t / 2) = sin(pi u / 2)^2, u = 1 ... 1 / steps: the grid of IPNDM in diffusers."""

    named = False

    def above_zero(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        """2 / pi arcsin(sin(pi u / 2)^2)."""
        return 2.0 / np.pi * np.arcsin(np.sin(np.pi / 2.0 * np.arange(steps, 0, -1) / steps) ** 2)


class Uniform(TimeGrid):
    """1 ... 1 / steps, then slightly above 0, for runs that end there with `Sampler(to_zero=False)`: Wuerstchen's."""

    named = False

    def above_zero(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        """1 ... 1 / steps, 1e-7."""
        return np.append(np.arange(steps, 0, -1) / steps, 1e-7)
