"""A grid with as many steps in each part of a process as are said: the `timestep_respacing` of improved DDPM."""

from collections.abc import Sequence
from typing import Self

import numpy as np

from kdiff.base import check_choice, check_integer
from kdiff.schedules import NoiseSchedule
from kdiff.times.grids import TimeGrid

__all__ = ["DEEPFLOYD", "Sections"]

# The lists of steps that DeepFloyd IF is sampled with, by their names there: "fast" and "smart" of the first stage,
# with most steps where there is little noise or at both ends, "super" of the next, with most where there is much.
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
    """The T steps in parts of equal size, the cleanest first, and of each part so many, at even distances:

        i = first + round(k (size - 1) / (count - 1)),    k = 0 ... count - 1

    of a part of `size` steps; one alone is its first. Of T that the number of parts does not divide, the first parts
    have one step more. Nichol & Dhariwal, "Improved DDPM" (2021), whose code calls it `timestep_respacing`.

    Args:
        counts: whole numbers of at least 1, one a part.

    Raises:
        ValueError: if they are not; and, when called, if the run has another number of steps than all together, or a
            part has fewer.
    """

    named = False

    def __init__(self, counts: Sequence[int]):
        self.counts = tuple(counts)
        if not self.counts:
            raise ValueError("Sections: `counts` must be one number or more; received none")
        for count in self.counts:
            check_integer("Sections", "counts", count)

    @classmethod
    def deepfloyd(cls, name: str) -> Self:
        """The list of steps of this name, such as "fast27", "smart50" or "super40", of `DEEPFLOYD`."""
        check_choice("Sections", "name", name, tuple(DEEPFLOYD))
        return cls(DEEPFLOYD[name])

    def default_steps(self, schedule: NoiseSchedule) -> int:
        return sum(self.counts)

    def indices(self, num_steps: int, steps: int) -> np.ndarray:
        if steps != sum(self.counts):
            raise ValueError(f"Sections: `steps` must be {sum(self.counts)}, as `counts` say; received: {steps}")
        size, more = divmod(num_steps, len(self.counts))
        taken, first = [], 0
        for part, count in enumerate(self.counts):
            own = size + (part < more)
            if count > own:
                raise ValueError(f"Sections: part {part} has {own} steps; received a count of {count}")
            distances = np.full(count - 1, (own - 1) / max(1, count - 1))
            # Sums, not products: on halves the published lists have what these round to.
            taken.append(first + np.round(np.append(0.0, np.cumsum(distances))))
            first += own
        return np.concatenate(taken)[::-1]
