"""The sampling loop, once for every solver, grid, schedule and network.

    x = sigma(1) noise;  for now, then in pairs(grid):  x = solver.step(denoise, x, now, then, noise)

A `Sampler` is a solver, a grid and a number of steps. It samples from anything that can denoise: a `DiffusionModel`,
which calls it for you, or a plain function `x_hat = denoise(x, marginal)`:

    sampler = Sampler("ddim", steps=20)
    x = sampler(denoise, Cosine(), (16, 32, 32, 3), seed=0)          # the result
    for step in sampler.steps_of(denoise, Cosine(), (16, 32, 32, 3)):    # every step on the way
        print(step.index, step.total, step.x_hat)
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from kdiff import backend, random
from kdiff.base import Value, check_integer
from kdiff.schedules import NoiseSchedule
from kdiff.solvers import Denoise, Solver
from kdiff.times import All, TimeGrid


class Step(NamedTuple):
    """One step of a sampling run.

    Attributes:
        index: 1 ... `total`.
        total: the number of steps of the run.
        t: the time that the step arrived at, a float.
        x: the noisy batch at time t.
        x_hat: the estimate of the data from which the step was made.
    """

    index: int
    total: int
    t: float
    x: Any
    x_hat: Any


class Sampler(Value):
    """A solver on a grid of times.

    Args:
        solver: a `Solver` or its name.
        grid: a `TimeGrid` or its name.
        steps: the number of steps. None: 50, or every step that the schedule has where the grid is "all".

    Raises:
        ValueError: if `steps` is below 1; and, when it runs, if a discrete schedule has fewer.
    """

    def __init__(self, solver="ddim", grid="trailing", steps: int | None = None):
        if steps is not None:
            check_integer("Sampler", "steps", steps)
        self.solver = Solver.get(solver)
        self.grid = TimeGrid.get(grid)
        self.steps = steps

    def times(self, schedule: NoiseSchedule) -> np.ndarray:
        """The times of a run on this schedule: float64, strictly decreasing to 0, with shape `(steps + 1,)`."""
        whole = (schedule.num_steps or self.grid.resolution) if isinstance(self.grid, All) else None
        return self.grid(schedule, self.steps or whole or 50)

    def steps_of(
        self,
        denoise: Denoise,
        schedule: NoiseSchedule,
        shape: tuple[int, ...],
        *,
        seed: int = 0,
        first: int = 0,
        compiled: Callable | None = None,
    ) -> Iterator[Step]:
        """Runs, and yields every step.

        Args:
            denoise: x_hat = denoise(x, marginal); the fields of the marginal have shape `()`.
            schedule: the schedule to sample under.
            shape: the shape of the batch, `(samples, ...)`.
            seed: names the noise; the same on every backend.
            first: the number of the first sample, so that batches of one run continue one another.
            compiled: a compiled form of `advance` for this `denoise`, if there is one.
        """
        times = self.times(schedule).astype("float32")
        key = random.key_of(seed)
        x = schedule.at(times[0]).sigma * random.normal(random.fold(key, 0, random.INITIAL), shape, first)
        state = self.solver.init(x)
        advance = compiled or backend.without_gradients(partial(self.advance, denoise, schedule))
        for index, (now, then) in enumerate(pairwise(times)):
            x, x_hat, state = advance(x, now, then, key, np.int32(index), np.int32(first), state)
            yield Step(index + 1, len(times) - 1, float(then), x, x_hat)

    def advance(self, denoise: Denoise, schedule: NoiseSchedule, x, now, then, key, index, first, state):
        """One step of the loop, noise included: a pure function of its arguments, fit to be compiled.

        Args:
            denoise: x_hat = denoise(x, marginal).
            schedule: the schedule to sample under.
            x: the noisy batch at time `now`.
            now: the time, a scalar.
            then: the time to go to.
            key: the run's key.
            index: the number of the step.
            first: the number of the first sample.
            state: the solver's state.

        Returns:
            `(x, x_hat, state)`, as of `Solver.step`.
        """
        noise = None
        if self.solver.stochastic:
            noise = random.normal(random.fold(key, index, random.STEPS), ops.shape(x), first)
        return self.solver.step(denoise, x, schedule.at(now), schedule.at(then), noise, state)

    def __call__(self, denoise: Denoise, schedule: NoiseSchedule, shape: tuple[int, ...], *, seed: int = 0):
        """Runs, and returns the last x. Arguments as of `steps_of`."""
        for step in self.steps_of(denoise, schedule, shape, seed=seed):
            x = step.x
        return x
