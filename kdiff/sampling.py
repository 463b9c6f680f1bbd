"""The sampling loop, shared by all solvers, grids, schedules and networks.

    x = sigma(1) noise
    for now, then in pairs(grid):  x = solver.step(guidance(denoise), schedule, x, now, then, noise)

A `Sampler` consists of a solver, a grid, a number of steps and optional guidance. It samples from any denoiser: a
`DiffusionModel`, which calls it in `sample`, or a function `x_hat = denoise(x, marginal)`:

    sampler = Sampler("ddim", steps=20)
    x = sampler(denoise, Cosine(), (16, 32, 32, 3), seed=0)              # the result
    for step in sampler.steps_of(denoise, Cosine(), (16, 32, 32, 3)):    # every step
        print(step.index, step.total, step.x_hat)
"""

import contextlib
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
from kdiff.reuse import Reuse, Store, kept_in, nothing_kept
from kdiff.schedules import Marginal, NoiseSchedule
from kdiff.solvers import Adaptive, DPMSolverFast, Solver
from kdiff.times import Exponential, TimeGrid
from kdiff.times.parts import begun_at, ended_at, steps_onward

__all__ = ["Sampler", "State", "Step", "dpm_fast", "initial_noise"]


class Step(NamedTuple):
    """One step of a sampling run.

    Attributes:
        index: 1 ... `total`.
        total: the number of steps of the run.
        t: the time at the end of the step, a float.
        x: the noisy batch at time t.
        x_hat: the estimate of the data that was used in the step.
    """

    index: int
    total: int
    t: float
    x: Any
    x_hat: Any


class State(NamedTuple):
    """The state of a run between steps, a nested structure of tensors.

    Attributes:
        solver: the state of the solver.
        given: the inputs known for the samples of the batch, with the memory of the guidance.
        kept: features that networks may reuse, as in `Reuse`.
    """

    solver: Any
    given: Given
    kept: Any = ()


class Sampler(Value):
    """A solver on a grid of times.

    Args:
        solver: a `Solver` or its name.
        grid: a `TimeGrid` or its name; None: the default of the solver, "trailing" unless it is documented otherwise.
        steps: the number of steps. None: 50, or every step of the schedule if the grid is "all".
        guidance: a `Guidance` or its name, or several, the first of which is applied first.
        to_zero: whether the run goes to t = 0. Otherwise its last step is omitted, and it ends at the last time of the
            grid above zero.
        reuse: a `Reuse`, by which networks compute less in most steps; None for none.

    Raises:
        ValueError: if `steps` is below 1; and, when it runs, if a discrete schedule has fewer steps.
    """

    def __init__(
        self,
        solver: Solver | type[Solver] | str = "ddim",
        grid: TimeGrid | type[TimeGrid] | str | None = None,
        steps: int | None = None,
        guidance: Guidance | str | Sequence[Guidance | str] = (),
        to_zero: bool = True,
        reuse: Reuse | None = None,
    ):
        if steps is not None:
            check_integer("Sampler", "steps", steps)
        self.solver = Solver.get(solver)
        self.grid = self.solver.grid if grid is None else TimeGrid.get(grid)
        self.steps = steps
        guidance = guidance if isinstance(guidance, (list, tuple)) else (guidance,)
        self.guidance = tuple(Guidance.get(one) for one in guidance)
        self.to_zero = to_zero
        self.reuse = None if reuse is None else Reuse.get(reuse)
        if reuse is not None and isinstance(self.solver, Adaptive):
            raise ValueError(f"Sampler: {self.solver!r} takes no fixed steps, in which something could be reused")
        if reuse is not None and self.solver.branches:
            raise ValueError(
                f"Sampler: {self.solver!r} calls the network a different number of times in different steps, so "
                "nothing can be reused; 'ipndm', 'dpm_solver_pp' and others call it once in each"
            )

    def times(self, schedule: NoiseSchedule, strength: float = 1.0, stop: float = 0.0) -> np.ndarray:
        """The times of a run on this schedule: float64, with shape `(steps + 1,)`.

        They decrease; those of a grid with jumps (`times.Jumps`) also increase. With a `strength` below 1 the run
        begins at that time, which replaces the nearest time of the grid, and omits the preceding ones. With a `stop`
        above 0 it ends at that time, which replaces the nearest time below the first. A run that ends at a time and one
        that begins there are together the whole run. Jumps stay within the run: those to times above its beginning
        lead to its beginning, and steps to times below its end, from which jumps return, lead to its end. With a
        strength of 0, or one not above the end of a run that does not go to t = 0, there is no step, and the times are
        [0].
        """
        check_number("Sampler", "strength", strength, 0.0, 1.0)
        check_number("Sampler", "stop", stop, 0.0, 1.0)
        steps = self.steps or self.grid.default_steps(schedule)
        times = self.grid(schedule, steps)[: None if self.to_zero else -1]
        if len(times) < 2:
            raise ValueError("Sampler: a run of one step that does not go to t = 0 has no step; use more `steps`")
        if stop > 0 and stop >= min(strength, times[0]):
            raise ValueError(f"Sampler: `stop` must be below {min(strength, times[0])}, where the run begins: {stop}")
        if stop > times[-1]:
            times = ended_at(schedule.nearest(stop), times)
        return begun_at(schedule.nearest(strength), times) if strength < times[0] else times

    @property
    def models(self) -> tuple:
        """The Keras models that the guidance calls."""
        return tuple(model for one in self.guidance for model in one.models)

    def replaced(self, **changes: Any) -> "Sampler":
        """A sampler with the same objects, except for `changes`."""
        return Sampler(**{**{name: getattr(self, name) for name in self._argument_defaults()}, **changes})

    @property
    def active(self) -> tuple[Guidance, ...]:
        """The guidance that has any effect."""
        return tuple(one for one in self.guidance if one.active)

    def key(self) -> tuple:
        """The cache key of a compiled step: everything except the grid, the steps and the arrays of the guidance."""
        return (self.solver, self.reuse and self.reuse.shallow, *(one.key() for one in self.active))

    def rows(self, run: Run) -> tuple:
        """The checked arrays of each active guidance, with one row per sample."""
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
        """Runs the sampler, and yields every step.

        Args:
            denoise: x_hat = denoise(x, marginal), or a `Denoiser`; the fields of the marginal have shape `()`.
            schedule: the schedule of the run.
            shape: the shape of the batch, `(samples, ...)`.
            x: the noisy batch at the first time; None: noise of the initial sigma.
            times: the times, as returned by `times`; None: all times of the grid.
            seed: the seed of the noise, which is the same on every backend; or one seed per sample, of which sample
                `first` is drawn.
            first: the index of the first sample, so that consecutive batches continue each other.
            noise: a function `noise(step, shape)` for the noise of step 0, 1, ..., instead of that of the seed:
                standard normal numbers, such as those of another library. It is called once per draw of the solver,
                which for most stochastic solvers is once per step. The initial noise is that of `x` or the seed.
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
            times: the times of the run; where they increase, unless all do, noise is added.
            advance: `x, x_hat, state = advance(x, now, then, key, index, first, state)`, as `Sampler.advance`.
            schedule: the schedule of the run.
            given: the inputs known for the samples.
            seed: the seed of the noise; or one per sample, of which sample `first` is drawn.
            first: the index of the first sample.
            before: the number of omitted steps of the grid, so that each step of the grid has its own noise.
            noise: as in `steps_of`, for the noise added where times increase; `advance` draws its own.
        """
        times = times.astype("float32")
        key, first = ops.convert_to_tensor(random.key_of(seed)), ops.convert_to_tensor(np.int32(first))
        x = x_hat = ops.convert_to_tensor(x, "float32")
        memory = tuple(one.start(x) for one in self.active)
        kept = nothing_kept() if self.reuse else ()
        state = State(self.solver.init(x, steps_onward(times, 0)), given._replace(memory=memory), kept)
        backwards = times[-1] > times[0]
        for index, (now, then) in enumerate(pairwise(times)):
            number = before + (len(times) - 2 - index if backwards else index)  # that of the step that is inverted
            if then > now and not backwards:
                x = _noisier(schedule, x, now, then, key, number, first, noise)
                state = state._replace(solver=self.solver.init(x, steps_onward(times, index + 1)))
            else:
                if self.reuse:
                    state = state._replace(kept=self.reuse.at(index, state.kept))
                x, x_hat, state = advance(x, now, then, key, np.int32(number), first, state)
                if self.reuse and not state.kept["deep"]:
                    raise ValueError(
                        f"Sampler: {self.reuse!r} needs a UNet, UViT, DiT or MMDiT of 2 blocks or more: nothing here "
                        "can be reused"
                    )
            if index + 2 == len(times) and not (self.to_zero or backwards) and then == self._last_time(schedule):
                for one, rows in zip(self.active, given.rows, strict=True):
                    x = one.finish(x, rows)
            yield Step(index + 1, len(times) - 1, float(then), x, x_hat)

    def _last_time(self, schedule: NoiseSchedule) -> np.float32:
        """The last time of the grid above zero."""
        return np.float32(self.grid(schedule, self.steps or self.grid.default_steps(schedule))[-2])

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
        within: Callable[[Given], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        """One step of the loop, including noise: a pure function of its arguments, which can be compiled.

        Args:
            answer: that of a `Denoiser`.
            nulls: those of a `Denoiser`.
            schedule: the schedule of the run.
            x: the noisy batch at time `now`.
            now: the time, a scalar.
            then: the time to step to.
            key: the key of the run.
            index: the index of the step.
            first: the index of the first sample.
            state: the state returned by the previous step.
            draw: `noise(step, shape)`, as in `steps_of`; with it the step cannot be compiled.
            within: the context in which the denoiser is called, such as that of encoded conditions.

        Returns:
            `(x, x_hat, state)`: the batch at `then`, the estimate of the data in this step, and the new state.
        """
        both = schedule.sampled_at(ops.stack([now, then]))
        now, then = (Marginal(*(field[i] for field in both)) for i in (0, 1))
        place = Place(index, *((then, now) if self.solver.inverts else (now, then)), schedule)
        denoise = Denoiser(answer, state.given, nulls)
        for one in self.active:
            denoise = one.over(denoise, place)
        streams = itertools.count(random.STEPS)

        def noise():
            if draw is not None:
                return _drawn(draw, int(index), tuple(x.shape))
            return random.normal(random.fold_in(key, index, next(streams)), ops.shape(x), first)

        store = Store(state.kept, self.reuse.shallow) if self.reuse else None
        with within(state.given), kept_in(store):
            x, estimate, solver = self.solver.step(denoise, schedule, x, now, then, noise, state.solver)
        kept = store.kept if store else ()
        return x, estimate.x_hat, State(solver, state.given._replace(memory=estimate.memory), kept)

    def inverse(self, iterations: int = 1) -> "Sampler":
        """The sampler from data to noise, for reversed `times`.

        Raises:
            ValueError: if the solver has no inverse.
        """
        return self.replaced(solver=self.solver.inverse(iterations))

    def invert(self, denoise: Any, schedule: NoiseSchedule, x: Any, *, iterations: int = 1) -> Any:
        """The noise from which a deterministic solver generates `x`: the reversed run, from t = 0.

        Args:
            denoise: x_hat = denoise(x, marginal).
            schedule: the schedule of the run.
            x: data, with shape `(samples, ...)`.
            iterations: the number of calls of the denoiser per step. Each reduces the error several times, if the steps
                are short compared to the changes of x_hat; otherwise use more steps (`DDIMInversion`).

        Returns:
            x at the first time of the grid.

        Raises:
            ValueError: if the solver has no inverse.
        """
        inverse, times = self.inverse(iterations), self.times(schedule)[::-1]
        x = schedule.sampled_at(times[0].astype("float32")).alpha * ops.convert_to_tensor(x, "float32")
        for step in inverse.steps_of(denoise, schedule, tuple(x.shape), x=x, times=times):
            x = step.x
        return x

    def __call__(
        self,
        denoise: Any,
        schedule: NoiseSchedule,
        shape: tuple[int, ...],
        *,
        x: Any = None,
        seed: int | Sequence[int] = 0,
        noise: Callable[[int, tuple[int, ...]], Any] | None = None,
    ) -> Any:
        """Runs the sampler, and returns the final x. The arguments are those of `steps_of`."""
        for step in self.steps_of(denoise, schedule, shape, x=x, seed=seed, noise=noise):
            x = step.x
        return x


def dpm_fast(evaluations: int, sigma_min: float | None = None, sigma_max: float | None = None) -> Sampler:
    """`sample_dpm_fast` of k-diffusion: `DPMSolverFast` with the number of steps for this number of evaluations.

    As in k-diffusion, the run ends at `sigma_min` rather than at t = 0.

    Args:
        evaluations: the number of calls of the denoiser, at least 2.
        sigma_min: the last sigma / alpha; None: that of the first step of a discrete schedule.
        sigma_max: the first sigma / alpha; None: that of the schedule.
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


def initial_noise(shape: tuple[int, ...], seed: int | Sequence[int] = 0, first: int = 0) -> Any:
    """The initial noise of a run: standard normal, the same on every backend. `seed` may be one per sample."""
    return random.normal(random.fold_in(random.key_of(seed), 0, random.INITIAL), shape, first)


def _noisier(schedule: NoiseSchedule, x, now, then, key, index: int, first, draw: Callable | None = None):
    """A draw from q(x_then | x_now) = N(r x_now, sigma_then^2 - r^2 sigma_now^2), r = alpha_then / alpha_now."""
    now, then = schedule.sampled_at(now), schedule.sampled_at(then)
    ratio = then.alpha / now.alpha
    if draw is None:
        noise = random.normal(random.fold_in(key, np.int32(index), random.STEPS), ops.shape(x), first)
    else:
        noise = _drawn(draw, index, tuple(x.shape))
    # sigma_then^2 - r^2 sigma_now^2, without cancellation.
    deviation = then.sigma * ops.sqrt(-ops.expm1(then.log_snr - now.log_snr))
    return ratio * x + deviation * noise
