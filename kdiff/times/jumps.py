"""A grid that goes back to more noise, and down again."""

import numpy as np

from kdiff.base import check_integer
from kdiff.schedules import NoiseSchedule
from kdiff.times.grids import TimeGrid, check_steps

__all__ = ["Jumps"]


class Jumps(TimeGrid):
    """Another grid, of which every `length` steps are made `repeats` times.

    After `length` steps noise is added, which asks nothing of the network, and the steps are made again:

        x_now = r x_then + sqrt(sigma_now^2 - r^2 sigma_then^2) noise,    r = alpha_now / alpha_then.

    So what is drawn comes into harmony with what is given (RePaint, Lugmayr et al. 2022, arXiv:2201.09865, section
    4.2), or errors are forgotten. The pieces are counted from the clean end; what is left over at the noisy one is made
    once.

    Args:
        grid: a `TimeGrid` or its name; its steps are those that a run counts.
        length: of a piece, in steps.
        repeats: how often each is made; 1 is the grid itself.
    """

    def __init__(self, grid="trailing", length: int = 10, repeats: int = 10):
        check_integer("Jumps", "length", length)
        check_integer("Jumps", "repeats", repeats)
        self.grid, self.length, self.repeats = TimeGrid.get(grid), length, repeats

    def default_steps(self, schedule: NoiseSchedule) -> int:
        return self.grid.default_steps(schedule)

    def __call__(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        """The times: float64, falling in pieces, with shape `(steps in all + jumps + 1,)`."""
        check_steps(self, steps, self.repeats)
        times = self.grid(schedule, steps)
        path = list(times[: steps % self.length + 1])
        for start in range(len(path) - 1, steps, self.length):
            piece = times[start + 1 : start + self.length + 1]
            path += [*piece, *[times[start], *piece] * (self.repeats - 1)]
        return np.array(path)
