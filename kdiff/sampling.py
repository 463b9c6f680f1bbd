"""The sampling loop, once for every solver, grid, schedule and network.

    x = sigma(1) noise
    for now, then in pairs(grid):  x = solver.step(guidance(denoise), schedule, x, now, then, noise)

A `Sampler` is a solver, a grid, a number of steps and any guidance. It samples from anything that can denoise: a
`DiffusionModel`, which calls it for you, or a plain function `x_hat = denoise(x, marginal)`:

    sampler = Sampler("ddim", steps=20)
    x = sampler(denoise, Cosine(), (16, 32, 32, 3), seed=0)          # the result
    for step in sampler.steps_of(denoise, Cosine(), (16, 32, 32, 3)):    # every step on the way
        print(step.index, step.total, step.x_hat)
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from kdiff import backend, random
from kdiff.base import Value, check_integer
from kdiff.guidance import Guidance
from kdiff.schedules import NoiseSchedule
from kdiff.solvers import Denoise, Solver
from kdiff.times import TimeGrid


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
        guidance: a `Guidance` or its name, or several, of which the first is applied first.
        to_zero: whether the run goes to t = 0. Otherwise its last step is left out, and it ends at the grid's last time
            above zero.

    Raises:
        ValueError: if `steps` is below 1, or below what the solver needs; and, when it runs, if a discrete schedule has
            fewer.
    """

    def __init__(
        self,
        solver="ddim",
        grid="trailing",
        steps: int | None = None,
        guidance: Guidance | str | Sequence[Guidance | str] = (),
        to_zero: bool = True,
    ):
        if steps is not None:
            check_integer("Sampler", "steps", steps)
        self.solver = Solver.get(solver)
        self.grid = TimeGrid.get(grid)
        self.steps = steps
        guidance = guidance if isinstance(guidance, (list, tuple)) else (guidance,)
        self.guidance = tuple(Guidance.get(one) for one in guidance)
        self.to_zero = to_zero

    def times(self, schedule: NoiseSchedule) -> np.ndarray:
        """The times of a run on this schedule: float64, strictly decreasing, with shape `(steps + 1,)`."""
        steps = self.steps or self.grid.default_steps(schedule)
        times = self.grid(schedule, steps)[: None if self.to_zero else -1]
        if len(times) < 2:
            raise ValueError("Sampler: a run of one step that does not go to t = 0 has no step; give more `steps`")
        self.solver.check(len(times) - 1)
        return times

    def steps_of(
        self,
        denoise: Denoise,
        schedule: NoiseSchedule,
        shape: tuple[int, ...],
        *,
        x: Any = None,
        seed: int = 0,
        first: int = 0,
        compiled: Callable | None = None,
    ) -> Iterator[Step]:
        """Runs, and yields every step.

        Args:
            denoise: x_hat = denoise(x, marginal); the fields of the marginal have shape `()`.
            schedule: the schedule to sample under.
            shape: the shape of the batch, `(samples, ...)`.
            x: the noisy batch to start from, at the grid's first time; None for sigma noise.
            seed: names the noise; the same on every backend.
            first: the number of the first sample, so that batches of one run continue one another.
            compiled: a compiled form of `advance` for this `denoise`, if there is one.
        """
        times = self.times(schedule)
        if x is None:
            noise = random.normal(random.fold(random.key_of(seed), 0, random.INITIAL), shape, first)
            x = schedule.at(times[0]).sigma * noise
        yield from self._run(denoise, schedule, x, times, seed, first, compiled)

    def invert(self, denoise: Denoise, schedule: NoiseSchedule, x, *, iterations: int = 1):
        """The noise from which a deterministic solver makes `x`: the run backwards, from t = 0.

        Args:
            denoise: x_hat = denoise(x, marginal).
            schedule: the schedule of the run.
            x: data, with shape `(samples, ...)`.
            iterations: how often the denoiser is asked in a step; each makes the error several times smaller.

        Returns:
            x at the grid's first time.

        Raises:
            ValueError: if the solver has no inverse.
        """
        inverse = Sampler(self.solver.inverse(iterations), self.grid, self.steps, self.guidance, self.to_zero)
        times = self.times(schedule)[::-1]
        x = schedule.at(times[0].astype("float32")).alpha * ops.convert_to_tensor(x, "float32")
        for step in inverse._run(denoise, schedule, x, times, 0, 0, None):
            x = step.x
        return x

    def _run(self, denoise, schedule, x, times, seed, first, compiled) -> Iterator[Step]:
        times, key = times.astype("float32"), random.key_of(seed)
        x = ops.convert_to_tensor(x, "float32")
        state = self.solver.init(x, len(times) - 1)
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
        for guidance in self.guidance:
            denoise = guidance(denoise)
        streams = itertools.count(random.STEPS)

        def noise():
            return random.normal(random.fold(key, index, next(streams)), ops.shape(x), first)

        return self.solver.step(denoise, schedule, x, schedule.at(now), schedule.at(then), noise, state)

    def __call__(self, denoise: Denoise, schedule: NoiseSchedule, shape: tuple[int, ...], *, x=None, seed: int = 0):
        """Runs, and returns the last x. Arguments as of `steps_of`."""
        for step in self.steps_of(denoise, schedule, shape, x=x, seed=seed):
            x = step.x
        return x
