"""Times as diffusers takes them, where kdiff's own differ; they have no names to `get` them by."""

import numpy as np
from keras import ops

from kdiff.schedules import NoiseSchedule
from kdiff.times import FlowShift, TimeGrid

__all__ = ["FlowMatching", "LinspaceUnrounded", "WithFirst", "Within", "WithoutLast"]


class LinspaceUnrounded(TimeGrid):
    """`steps` equal spaces from T - 1 to 0, between the steps of the process where they fall there: Euler's, Heun's.

    diffusers draws a straight line through sigma / alpha there, and a table of kdiff through its logarithm: the times
    are those at which that is the same.
    """

    named = False

    def indices(self, num_steps: int, steps: int) -> np.ndarray:
        """linspace(T - 1, 0, steps)."""
        return np.linspace(num_steps - 1, 0, steps)

    def above_zero(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        """Those of the indices; between i and i + 1, at (1 - f) s_i + f s_(i + 1)."""
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
    """A grid of one step more, without the last of its times: DPM-Solver's and UniPC's in diffusers.

    Args:
        grid: a `TimeGrid` or its name.
    """

    named = False

    def __init__(self, grid="linspace"):
        self.grid = TimeGrid.get(grid)

    def above_zero(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        """The first `steps` times of a run of `steps` + 1."""
        return self.grid.above_zero(schedule, steps + 1)[:-1]


class WithFirst(TimeGrid):
    """A grid, and after it the first step of the process: for runs that end there, with `Sampler(to_zero=False)`.

    Stable Diffusion's end there (diffusers: `set_alpha_to_one` is false, or `final_sigmas_type` is "sigma_min").

    Args:
        grid: a `TimeGrid` or its name.
    """

    named = False

    def __init__(self, grid="leading"):
        self.grid = TimeGrid.get(grid)

    def above_zero(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        """The times of the grid, and 1 / T if it does not end there."""
        times, first = self.grid.above_zero(schedule, steps), 1.0 / schedule.num_steps
        return np.append(times, first) if times[-1] > first * 1.001 else times


class Within(TimeGrid):
    """A grid of noise levels between the first and the last of another grid, as diffusers' Euler has Karras' sigmas.

    Args:
        noise: the grid of noise, such as `Karras()`: its `sigma_min` and `sigma_max` are set.
        ends: the grid from which they are.
    """

    named = False

    def __init__(self, noise="karras", ends="linspace"):
        self.noise, self.ends = TimeGrid.get(noise), TimeGrid.get(ends)

    def above_zero(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        """The noise levels."""
        times = self.ends.above_zero(schedule, steps)[[0, -1]].astype("float32")
        high, low = np.exp(-0.5 * ops.convert_to_numpy(schedule.log_snr(times)).astype("float64"))
        return self.noise.clone(sigma_min=float(low), sigma_max=float(high)).above_zero(schedule, steps)


class FlowMatching(TimeGrid):
    """Rectified flow's times as diffusers takes them: `steps` equal spaces u, from 1 to the first step's, then shifted:

        t = w(u),   w(u) = shift u / (1 + (shift - 1) u),   u = 1 ... w(1 / T).

    Args:
        shift: above 1 there are more steps near the noise.
        num_steps: T.
    """

    named = False

    def __init__(self, shift: float = 1.0, num_steps: int = 1000):
        self.shift, self.num_steps = shift, num_steps
        self._warp = FlowShift(shift).warp

    def above_zero(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        """w(1 ... w(1 / T))."""
        return self._warp(np.linspace(1.0, self._warp(np.float64(1.0 / self.num_steps)), steps))
