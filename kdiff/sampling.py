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
from kdiff.base import Value, check_integer, check_number
from kdiff.denoisers import Denoiser, Given
from kdiff.guidance import Guidance
from kdiff.guidance.base import Place, Run, tensors
from kdiff.schedules import NoiseSchedule
from kdiff.solvers import DPMSolverFast, Solver
from kdiff.times import Exponential, TimeGrid

__all__ = ["Sampler", "State", "Step", "dpm_fast", "initial_noise"]


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


class State(NamedTuple):
    """What a run carries from step to step: a nest of tensors.

    Attributes:
        solver: the solver's state.
        given: what is known of the samples of this batch, and what the guidance remembers.
    """

    solver: Any
    given: Given


class Sampler(Value):
    """A solver on a grid of times.

    Args:
        solver: a `Solver` or its name.
        grid: a `TimeGrid` or its name; None is the solver's own: "trailing", or what its documentation says.
        steps: the number of steps. None: 50, or every step that the schedule has where the grid is "all".
        guidance: a `Guidance` or its name, or several, of which the first is applied first.
        to_zero: whether the run goes to t = 0. Otherwise its last step is left out, and it ends at the grid's last time
            above zero.

    Raises:
        ValueError: if `steps` is below 1; and, when it runs, if a discrete schedule has fewer.
    """

    def __init__(
        self,
        solver="ddim",
        grid=None,
        steps: int | None = None,
        guidance: Guidance | str | Sequence[Guidance | str] = (),
        to_zero: bool = True,
    ):
        if steps is not None:
            check_integer("Sampler", "steps", steps)
        self.solver = Solver.get(solver)
        self.grid = self.solver.grid if grid is None else TimeGrid.get(grid)
        self.steps = steps
        guidance = guidance if isinstance(guidance, (list, tuple)) else (guidance,)
        self.guidance = tuple(Guidance.get(one) for one in guidance)
        self.to_zero = to_zero

    def times(self, schedule: NoiseSchedule, strength: float = 1.0, stop: float = 0.0) -> np.ndarray:
        """The times of a run on this schedule: float64, with shape `(steps + 1,)`.

        They fall; those of a grid with jumps (`times.Jumps`) also rise. With a `strength` below 1 the run begins there,
        in place of the nearest time of the grid, and leaves out all before. With a `stop` above 0 it ends there, in
        place of the nearest time below the first. What ends at a time and what begins there are together the whole run.
        With a strength of 0, or one that is not above the end of a run that does not go to t = 0, there is no step: the
        times are [0].
        """
        check_number("Sampler", "strength", strength, 0.0, 1.0)
        check_number("Sampler", "stop", stop, 0.0, 1.0)
        steps = self.steps or self.grid.default_steps(schedule)
        times = self.grid(schedule, steps)[: None if self.to_zero else -1]
        if len(times) < 2:
            raise ValueError("Sampler: a run of one step that does not go to t = 0 has no step; give more `steps`")
        if stop > 0 and stop >= min(strength, times[0]):
            raise ValueError(f"Sampler: `stop` must be below {min(strength, times[0])}, where the run begins: {stop}")
        if stop > times[-1]:
            times = _until(schedule.nearest(stop), times)
        return _from(schedule.nearest(strength), times) if strength < times[0] else times

    @property
    def models(self) -> tuple:
        """The Keras models that the guidance asks."""
        return tuple(model for one in self.guidance for model in one.models)

    def replaced(self, **changes: Any) -> "Sampler":
        """A sampler with the same objects, except for `changes`."""
        return Sampler(**{**{name: getattr(self, name) for name in self._argument_defaults()}, **changes})

    @property
    def active(self) -> tuple[Guidance, ...]:
        """The guidance that changes anything."""
        return tuple(one for one in self.guidance if one.active)

    def key(self) -> tuple:
        """What a compiled step depends on: all but grid, steps and the arrays of the guidance."""
        return (self.solver, *(one.key() for one in self.active))

    def rows(self, run: Run) -> tuple:
        """The arrays of each active guidance, with one row a sample, checked."""
        return tuple(one.rows(run) for one in self.active)

    def steps_of(
        self,
        denoise: Any,
        schedule: NoiseSchedule,
        shape: tuple[int, ...],
        *,
        x: Any = None,
        times: np.ndarray | None = None,
        seed: int | Sequence[int] = 0,
        first: int = 0,
        noise: Callable[[int, tuple[int, ...]], Any] | None = None,
    ) -> Iterator[Step]:
        """Runs, and yields every step.

        Args:
            denoise: x_hat = denoise(x, marginal), or a `Denoiser`; the fields of the marginal have shape `()`.
            schedule: the schedule to sample under.
            shape: the shape of the batch, `(samples, ...)`.
            x: the noisy batch to start from, at the first time; None for sigma noise.
            times: the times, as of `times`; None for all of the grid.
            seed: names the noise, the same on every backend; or one a sample, of which it is sample `first`.
            first: the number of the first sample, so that batches of one run continue one another.
            noise: `noise(step, shape)` gives the noise of a step, 0, 1, ..., in place of that of the seed: standard
                normal numbers, such as another library drew. It is called once for each draw of a solver; most solvers
                make one a step, and those without noise none. The noise to begin with is `x`.
        """
        denoise = Denoiser.of(denoise)
        advance = backend.without_gradients(partial(self.advance, denoise.answer, denoise.nulls, schedule, draw=noise))
        times = self.times(schedule) if times is None else times
        given = denoise.given._replace(rows=tensors(self.rows(Run(shape))))
        x = schedule.sampled_at(times[0]).sigma * initial_noise(shape, seed, first) if x is None else x
        return self.steps_from(x, times, advance, schedule, given, seed, first, noise=noise)

    def steps_from(
        self,
        x,
        times: np.ndarray,
        advance: Callable,
        schedule: NoiseSchedule,
        given: Given,
        seed: int | Sequence[int] = 0,
        first: int = 0,
        before: int = 0,
        noise: Callable[[int, tuple[int, ...]], Any] | None = None,
    ) -> Iterator[Step]:
        """The loop: every step of a run from `x`, the batch at the first of the `times`.

        Args:
            x: the noisy batch.
            times: of the run; where they rise, unless all do, noise is added.
            advance: `x, x_hat, state = advance(x, now, then, key, index, first, state)`, as `Sampler.advance`.
            schedule: the schedule to sample under.
            given: what is known of the samples.
            seed: names the noise; or one a sample, of which it is sample `first`.
            first: the number of the first sample.
            before: how many steps of the grid were left out: its steps have numbers, and noise, of their own.
            noise: as of `steps_of`, where a time rises; what `advance` draws it knows itself.
        """
        times, key = times.astype("float32"), random.key_of(seed)
        x = x_hat = ops.convert_to_tensor(x, "float32")
        memory = tuple(one.start(x) for one in self.active)
        state = State(self.solver.init(x, _steps_from(times, 0)), given._replace(memory=memory))
        backwards = times[-1] > times[0]
        for index, (now, then) in enumerate(pairwise(times)):
            number = before + index
            if then > now and not backwards:
                x = _noisier(schedule, x, now, then, key, number, first, noise)
                state = state._replace(solver=self.solver.init(x, _steps_from(times, index + 1)))
            else:
                x, x_hat, state = advance(x, now, then, key, np.int32(number), np.int32(first), state)
            yield Step(index + 1, len(times) - 1, float(then), x, x_hat)

    def advance(
        self,
        answer: Callable,
        nulls,
        schedule: NoiseSchedule,
        x,
        now,
        then,
        key,
        index,
        first,
        state: State,
        draw: Callable | None = None,
    ):
        """One step of the loop, noise included: a pure function of its arguments, fit to be compiled.

        Args:
            answer: as of a `Denoiser`.
            nulls: as of a `Denoiser`.
            schedule: the schedule to sample under.
            x: the noisy batch at time `now`.
            now: the time, a scalar.
            then: the time to go to.
            key: the run's key.
            index: the number of the step.
            first: the number of the first sample.
            state: what the last step returned.
            draw: `noise(step, shape)`, as of `steps_of`; where it is given the step cannot be compiled.

        Returns:
            `(x, x_hat, state)`: the batch at `then`, and the estimate of the data that led there.
        """
        place = Place(index, schedule.sampled_at(now), schedule.sampled_at(then), schedule)
        denoise = Denoiser(answer, state.given, nulls)
        for one in self.active:
            denoise = one.over(denoise, place)
        streams = itertools.count(random.STEPS)

        def noise():
            if draw is not None:
                return _drawn(draw, int(index), tuple(x.shape))
            return random.normal(random.fold_in(key, index, next(streams)), ops.shape(x), first)

        x, estimate, solver = self.solver.step(denoise, schedule, x, place.now, place.then, noise, state.solver)
        return x, estimate.x_hat, State(solver, state.given._replace(memory=estimate.memory))

    def inverse(self, iterations: int = 1) -> "Sampler":
        """The sampler that goes from data to noise, where its `times` are read backwards.

        Raises:
            ValueError: if the solver has no inverse.
        """
        return self.replaced(solver=self.solver.inverse(iterations))

    def invert(self, denoise: Any, schedule: NoiseSchedule, x, *, iterations: int = 1):
        """The noise from which a deterministic solver makes `x`: the run backwards, from t = 0.

        Args:
            denoise: x_hat = denoise(x, marginal).
            schedule: the schedule of the run.
            x: data, with shape `(samples, ...)`.
            iterations: how often the denoiser is asked in a step; each makes the error several times smaller, if the
                steps are short for how fast x_hat changes; if they are not, take more steps (`DDIMInversion`).

        Returns:
            x at the grid's first time.

        Raises:
            ValueError: if the solver has no inverse.
        """
        inverse, times = self.inverse(iterations), self.times(schedule)[::-1]
        x = schedule.sampled_at(times[0].astype("float32")).alpha * ops.convert_to_tensor(x, "float32")
        for step in inverse.steps_of(denoise, schedule, tuple(x.shape), x=x, times=times):
            x = step.x
        return x

    def __call__(
        self, denoise: Any, schedule: NoiseSchedule, shape: tuple[int, ...], *, x=None, seed: int = 0, noise=None
    ):
        """Runs, and returns the last x. Arguments as of `steps_of`."""
        for step in self.steps_of(denoise, schedule, shape, x=x, seed=seed, noise=noise):
            x = step.x
        return x


def dpm_fast(evaluations: int, sigma_min: float | None = None, sigma_max: float | None = None) -> Sampler:
    """k-diffusion's `sample_dpm_fast`: `DPMSolverFast` on as many steps as that many calls of the denoiser make.

    The run ends at `sigma_min`, as there, not at t = 0.

    Args:
        evaluations: the number of calls, at least 2.
        sigma_min: the last sigma / alpha; None is that of the first step of a discrete schedule.
        sigma_max: the first; None is the schedule's.
    """
    check_integer("dpm_fast", "evaluations", evaluations, minimum=2)
    grid = Exponential(sigma_min, sigma_max)
    return Sampler(DPMSolverFast(evaluations % 3), grid, evaluations // 3 + 2, to_zero=False)


def _drawn(draw: Callable, step: int, shape: tuple[int, ...]):
    noise = ops.convert_to_tensor(draw(step, shape), "float32")
    if tuple(noise.shape) != shape:
        raise ValueError(f"Sampler: `noise({step}, {shape})` must have that shape; it has {tuple(noise.shape)}")
    if not np.isfinite(ops.convert_to_numpy(noise)).all():
        raise ValueError(f"Sampler: `noise({step}, {shape})` must be finite; it holds NaN or infinity")
    return noise


def initial_noise(shape: tuple[int, ...], seed: int | Sequence[int] = 0, first: int = 0):
    """The noise that a run begins with: standard normal, the same on every backend. `seed` may be one a sample."""
    return random.normal(random.fold_in(random.key_of(seed), 0, random.INITIAL), shape, first)


def _from(start: float, times: np.ndarray) -> np.ndarray:
    """The times from the one nearest to `start` on, which it takes the place of; the last of them stays.

    Where `start` is not above the last there is no step to make, and the time is that of data, 0.
    """
    if np.float32(start) <= np.float32(times[-1]):
        return np.zeros(1)
    return np.append(start, times[1 + np.argmin(np.abs(times[:-1] - start)) :])


def _until(stop: float, times: np.ndarray) -> np.ndarray:
    """The times before the one nearest to `stop`, which takes its place."""
    return np.append(times[: max(1, np.argmin(np.abs(times[:-1] - stop)))], stop)


def _steps_from(times: np.ndarray, index: int) -> int:
    """How many steps there are from here in one direction."""
    signs = np.sign(np.diff(times[index:], append=times[-1]))
    return int(np.argmax(signs != signs[0]))


def _noisier(schedule: NoiseSchedule, x, now, then, key, index: int, first: int, draw: Callable | None = None):
    """A draw from q(x_then | x_now) = N(r x_now, sigma_then^2 - r^2 sigma_now^2), r = alpha_then / alpha_now."""
    now, then = schedule.sampled_at(now), schedule.sampled_at(then)
    ratio = then.alpha / now.alpha
    if draw is None:
        noise = random.normal(random.fold_in(key, np.int32(index), random.STEPS), ops.shape(x), np.int32(first))
    else:
        noise = _drawn(draw, index, tuple(x.shape))
    # sigma_then^2 - r^2 sigma_now^2, without cancellation.
    deviation = then.sigma * ops.sqrt(-ops.expm1(then.log_snr - now.log_snr))
    return ratio * x + deviation * noise
