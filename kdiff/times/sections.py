"""A grid with a given number of steps in each section of a process: the `timestep_respacing` of improved DDPM."""

from collections.abc import Sequence
from typing import Self

import numpy as np

from kdiff.base import check_choice, check_integer
from kdiff.schedules import NoiseSchedule
from kdiff.times.grids import TimeGrid

__all__ = ["DEEPFLOYD", "Sections"]

# The step counts with which DeepFloyd IF is sampled, by their original names: "fast" and "smart" for the first stage,
# with most steps at low noise or at both ends, and "super" for the next stage, with most steps at high noise.
DEEPFLOYD = {
    "fast27": (10, 10, 3, 2, 2),
    "smart27": (7, 4, 2, 1, 2, 4, 7),
    "smart50": (10, 6, 4, 3, 2, 2, 3, 4, 6, 10),
    "smart100": (1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7, 7, 8, 9, 10, 13),
    "smart185": (1, 1, 2, 2, 2, 3, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20),
    "super27": (1, 1, 1, 1, 1, 1, 1, 2, 5, 13),
    "super40": (2, 2, 2, 2, 2, 2, 3, 4, 6, 15),
    "super100": (4, 4, 6, 6, 8, 8, 10, 10, 14, 30),
}


class Sections(TimeGrid):
    """Divides the T steps into sections of equal size, the cleanest first, and spaces `count` steps evenly in each:

        i = first + round(k (size - 1) / (count - 1)),    k = 0 ... count - 1

    for a section of `size` steps; a single step is the first of its section. If the number of sections does not divide
    T, the first sections have one step more. It is the `timestep_respacing` of the code of improved DDPM (Nichol and
    Dhariwal 2021, arXiv:2102.09672).

    Args:
        counts: the number of steps in each section, integers of at least 1.

    Raises:
        ValueError: if they are not; and, when called, if the number of steps of the run is not their sum, or a section
            has fewer steps than its count.
    """

    named = False

    def __init__(self, counts: Sequence[int]):
        self.counts = tuple(counts)
        if not self.counts:
            raise ValueError("Sections: `counts` must have at least one entry; received none")
        for count in self.counts:
            check_integer("Sections", "counts", count)

    @classmethod
    def deepfloyd(cls, name: str) -> Self:
        """The grid of this name in `DEEPFLOYD`, such as "fast27", "smart50" or "super40"."""
        check_choice("Sections", "name", name, tuple(DEEPFLOYD))
        return cls(DEEPFLOYD[name])

    def default_steps(self, schedule: NoiseSchedule) -> int:
        return sum(self.counts)

    def indices(self, num_steps: int, steps: int) -> np.ndarray:
        if steps != sum(self.counts):
            raise ValueError(f"Sections: `steps` must be {sum(self.counts)}, the sum of `counts`; received: {steps}")
        size, more = divmod(num_steps, len(self.counts))
        taken, first = [], 0
        for part, count in enumerate(self.counts):
            own = size + (part < more)
            if count > own:
                raise ValueError(f"Sections: part {part} has {own} steps; received a count of {count}")
            distances = np.full(count - 1, (own - 1) / max(1, count - 1))
            # Cumulative sums, not products: at halves the published lists round as these do.
            taken.append(first + np.round(np.append(0.0, np.cumsum(distances))))
            first += own
        return np.concatenate(taken)[::-1]
