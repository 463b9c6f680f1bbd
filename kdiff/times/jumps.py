"""A grid that returns to higher noise levels, as in RePaint."""

import numpy as np

from kdiff.base import check_integer
from kdiff.schedules import NoiseSchedule
from kdiff.times.grids import TimeGrid, check_steps

__all__ = ["Jumps"]


class Jumps(TimeGrid):
    """Another grid, in which each segment of `length` steps is repeated `repeats` times (RePaint's resampling).

    After `length` steps, noise is added by the forward process, without a call of the network, and they are repeated:

        x_now = r x_then + sqrt(sigma_now^2 - r^2 sigma_then^2) noise,    r = alpha_now / alpha_then.

    This harmonises the generated region with the known one in inpainting (Lugmayr et al. 2022, arXiv:2201.09865,
    section 4.2), and corrects errors of earlier steps. Segments are counted from the clean end; the remaining steps at
    the noisy end are made once.

    Args:
        grid: a `TimeGrid` or its name, which receives the number of steps of the run.
        length: the length of a segment, in steps.
        repeats: how many times each segment is made; 1 gives the grid itself.
    """

    def __init__(self, grid="trailing", length: int = 10, repeats: int = 10):
        check_integer("Jumps", "length", length)
        check_integer("Jumps", "repeats", repeats)
        self.grid, self.length, self.repeats = TimeGrid.get(grid), length, repeats

    def default_steps(self, schedule: NoiseSchedule) -> int:
        return self.grid.default_steps(schedule)

    def __call__(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        """The times, float64, decreasing within each segment, with shape `(total steps + jumps + 1,)`."""
        check_steps(self, steps, self.repeats)
        times = self.grid(schedule, steps)
        path = list(times[: steps % self.length + 1])
        for start in range(len(path) - 1, steps, self.length):
            piece = times[start + 1 : start + self.length + 1]
            path += [*piece, *[times[start], *piece] * (self.repeats - 1)]
        return np.array(path)
