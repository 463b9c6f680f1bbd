"""The likelihood of the probability flow (Song et al. 2021, arXiv:2011.13456, section 4.3 and appendix D.2).

In z = x_t / alpha, s = sigma / alpha and u = log s the flow of any schedule is dz/du = z - x_hat, and the density of z
changes along it by its divergence (Chen et al. 2018, arXiv:1806.07366, theorem 1). With y = z / sqrt(1 + s^2), which
has about the same scale at any noise level,

    log p(y_0) = log p(y_1) + W,     dW/du = g = d / (1 + s^2) - tr(d x_hat / d z),
    log p(z) = log p(y) - d log(1 + s^2) / 2,     z_0 = x,     p(z_1) = N(0, s_1^2 I),

and g vanishes at both ends. The trace is a mean over directions v of v^T (d x_hat / d z) v, with one vector-Jacobian
product each: along all axes it is exact, along random v with E[v v^T] = I unbiased (Hutchinson 1989; Skilling 1989).

W is an additional coordinate of the state for each direction, so any deterministic solver integrates both at once: as
a y it has z = sqrt(1 + s^2) W, which follows the flow with the estimate W / sqrt(1 + s^2) - sqrt(1 + s^2) g.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from keras import ops, tree

from kdiff import deprecated, random
from kdiff.base import Value, check_integer, check_number
from kdiff.denoisers import Denoiser
from kdiff.likelihood.decoders import Levels
from kdiff.likelihood.report import Report
from kdiff.likelihood.subject import Batch, Subject
from kdiff.schedules import Marginal
from kdiff.solvers import Solver
from kdiff.times import TimeGrid

__all__ = ["Exact", "Hutchinson", "Probes", "encode", "ode"]


class Probes(Value):
    """The base of the ways to take a trace. A new one defines `directions`, and whether it is `exact`.

    Attributes:
        exact: whether the directions are to be summed over, not averaged.
    """

    exact = False

    def directions(self, key: Any, shape: tuple[int, ...], first: int) -> Any:
        """v, with shape `(batch, count, size)`, for data of the shape `(batch, ...)`, from example `first` on."""
        raise NotImplementedError


class Exact(Probes):
    """Along each axis: as many vector-Jacobian products, and copies of the batch, as an example has numbers."""

    exact = True

    def directions(self, key: Any, shape: tuple[int, ...], first: int) -> Any:
        size = math.prod(shape[1:])
        return ops.broadcast_to(ops.eye(size), (shape[0], size, size))


class Hutchinson(Probes):
    """Along random directions, with coordinates of 1 and -1, the same all along the flow: unbiased, and of all random
    directions with independent coordinates those of the smallest variance.

    Args:
        count: how many, of each example.
    """

    def __init__(self, count: int = 1):
        check_integer("Hutchinson", "count", count)
        self.count = count

    def directions(self, key: Any, shape: tuple[int, ...], first: int) -> Any:
        drawn = random.normal(key, (shape[0], self.count, math.prod(shape[1:])), first)
        return ops.where(drawn > 0, 1.0, -1.0)


@deprecated.arguments(averages="ema")
def ode(
    model: Any,
    data: Any,
    *,
    solver: Any = "rk4",
    steps: int = 50,
    tolerance: float | None = None,
    grid: Any = "trailing",
    probes: Any = None,
    start: float | None = None,
    dequantise: bool | None = None,
    schedule: Any = None,
    seed: int = 0,
    batch_size: int = 64,
    ema: bool = True,
) -> Report:
    """-log p(x) of each example under the probability flow (see the module).

    It is not a bound, but the likelihood of the deterministic model. Its errors are those of the solver, of the probes,
    which are included in the standard error, and of the start time, which data is assigned instead of 0.

    Args:
        model: a `DiffusionModel`, or a denoiser, `x_hat = denoise(x, m)`.
        data: as in `bound`.
        solver: a deterministic `solvers.Solver` or its name, which integrates from data to noise. `Adaptive` measures
            its error over the numbers of an example and its probes together: give it small tolerances. Steps grow
            towards noise, where "lms" and, with few steps, "uni_pc" extrapolate badly; `tolerance` notices.
        steps: the number of steps; each step of "rk4" needs four calls of the network and as many vector-Jacobian
            products.
        tolerance: the tolerance of the mean, in nats: the steps are doubled until the mean of a batch changes by less.
            None: only `steps` are made.
        grid: the `times.TimeGrid`, used in increasing order, or its name.
        probes: `Exact`, `Hutchinson` or the name of one; None: exact for up to 16 elements per example.
        start: the time assigned to data. None: the first step of the schedule, or t = 0, where its log-SNR is finite,
            such as 15 for `Cosine`.
        dequantise: whether to add uniform noise of the width of a level to images, so that the result bounds the
            probability of the 256 levels, -log P(x) <= -log p(x + u) + d log 127.5 (Theis et al. 2016,
            arXiv:1511.01844). None: for images (the codecs `Pixels` and `Haar`).
        schedule: the schedule of a denoiser; a model has its own.
        seed: the seed of the noise and the probes, which are the same on every backend.
        batch_size: the number of examples per batch, for arrays.
        ema: whether to use the averaged (EMA) weights.

    Returns:
        A `Report` with the terms "noise", the density at the end of the flow, "volume", the integral, and "levels", the
        contribution of dequantisation.

    Raises:
        ValueError: if the solver is stochastic, or there is no data; if images to be dequantised are not on the levels;
            if the tolerance is not met with 128 times the steps, or all that the schedule has.
    """
    if tolerance is not None:
        check_number("ode", "tolerance", tolerance, 1e-6)
    flow = _Flow(Subject(model, schedule, ema), solver, steps, grid, probes, start)
    subject = flow.subject
    levels = subject.images is not None if dequantise is None else dequantise
    terms: dict[str, list] = {"noise": [], "volume": []} | ({"levels": []} if levels else {})
    for batch in subject.batches(data, batch_size):
        size = math.prod(batch.x.shape[1:])
        if levels:
            images = batch.x if subject.images is None else ops.convert_to_numpy(subject.images(batch.x))
            Levels().check(images)
            noise = random.uniform(random.fold_in(random.key_of(seed), 0, random.INITIAL), images.shape, batch.first)
            noise = (noise - 0.5) / 127.5
            noise = noise if subject.images is None else subject.codec.encode(noise)
            batch = batch._replace(x=batch.x + ops.convert_to_numpy(noise))
            terms["levels"].append(np.full(batch.count, size * math.log(127.5)))
        noise, volume = flow.likelihood(batch, seed, tolerance)
        terms["noise"].append(noise)
        terms["volume"].append(volume)
    joined = {name: np.concatenate(parts) for name, parts in terms.items()}
    return Report(joined, size, start=flow.begin.t)


@deprecated.arguments(averages="ema")
def encode(
    model: Any,
    data: Any,
    *,
    solver: Any = "rk4",
    steps: int = 50,
    grid: Any = "trailing",
    start: float | None = None,
    schedule: Any = None,
    batch_size: int = 64,
    ema: bool = True,
) -> np.ndarray:
    """The noise x_1 at the end of the flow from each example, from which `Sampler(solver, grid, steps)` restores it.

    Args:
        model, data, solver, steps, grid, start, schedule, batch_size, ema: as in `ode`.

    Returns:
        float32, with the shape of the encoded data.

    Raises:
        ValueError: as in `ode`.
    """
    flow, ends = _Flow(Subject(model, schedule, ema), solver, steps, grid, None, start), []
    for batch in flow.subject.batches(data, batch_size):
        noise, _ = flow.encode(batch, 0, steps, volume=False)
        ends.append((flow.end(steps).sigma * noise).reshape(batch.x.shape)[: batch.count].astype("float32"))
    return np.concatenate(ends)


class _Flow:
    """A solver, and the times that it goes through, upwards."""

    def __init__(self, subject: Subject, solver: Any, steps: int, grid: Any, probes: Any, start: float | None):
        self.subject, self.schedule, self.solver = subject, subject.schedule, Solver.get(solver)
        self.probes = None if probes is None else Probes.get(probes)
        if self.solver.stochastic:
            raise ValueError(
                "likelihood: the flow needs a deterministic solver, such as 'rk4', 'dpm_solver_pp' or 'adaptive'; "
                f"received: {self.solver!r}"
            )
        self.grid, self.steps = TimeGrid.get(grid), steps
        self.start = self.schedule.first_time if start is None else start
        check_number("likelihood", "start", self.start, 0.0, 0.999)
        self.begin = self._at(self.start)

    def _at(self, t) -> Marginal:
        return Marginal(*(float(ops.convert_to_numpy(field)) for field in self.schedule.at(np.float32(t))))

    def end(self, steps: int) -> Marginal:
        """Where a run of so many steps ends."""
        return self._at(self.grid(self.schedule, steps)[0])

    def likelihood(self, batch: Batch, seed: int, tolerance: float | None) -> tuple[np.ndarray, np.ndarray]:
        """The terms "noise" and "volume" of the rows that count, float64."""
        last, steps, most = None, self.steps, self.schedule.num_steps or math.inf
        for _ in range(1 if tolerance is None else 8):
            if last is not None and steps > most:
                break
            noise, volume = self._likelihood(batch, seed, steps)
            mean = np.mean(noise + volume)
            if tolerance is None or (last is not None and abs(mean - last) < tolerance):
                return noise, volume
            last, steps = mean, 2 * steps
        raise ValueError(
            f"ode: with {steps // 2} steps the mean of -log p still changes by more than {tolerance} nats; give a "
            "larger `tolerance`, more `steps`, or another `grid` or `start`"
        )

    def _likelihood(self, batch: Batch, seed: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
        noise, volume = self.encode(batch, seed, steps)
        size = noise.shape[1]
        nats = 0.5 * np.sum(noise**2, axis=1) + 0.5 * size * math.log(2.0 * math.pi)
        # From N(0, s_1^2 I) to the density of y_1, and from that of y_0 to that of x.
        wider = 0.5 * size * (np.log1p(np.exp(-self.begin.log_snr)) - np.log1p(np.exp(self.end(steps).log_snr)))
        return nats[: batch.count], (wider - volume)[: batch.count]

    def encode(self, batch: Batch, seed: int, steps: int, volume: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """(x_1 / sigma_1, W): float64, with shapes `(batch, size)` and `(batch,)`."""
        times = self.grid(self.schedule, steps)[::-1]
        times = np.append(self.start, times[times > self.start]).astype("float32")
        shape = batch.x.shape
        size = math.prod(shape[1:])
        probes = self.probes or (Exact() if size <= 16 else Hutchinson())
        if volume:
            key = random.fold_in(random.key_of(seed), 1, random.INITIAL)
            directions = probes.directions(key, shape, batch.first)
        else:
            directions = ops.zeros((shape[0], 0, size))
        counts = 1 if probes.exact or not volume else directions.shape[1]
        state = np.concatenate(
            [self.begin.alpha * batch.x.reshape(len(batch.x), -1), np.zeros((shape[0], counts))], axis=1
        )
        key = ("likelihood.flow", self.solver, self.schedule, probes.exact, shape[1:])
        step = self.subject.compiled(key, self._stepping(shape[1:], probes.exact))
        state = ops.convert_to_tensor(state, "float32")
        memory = self.solver.init(state, len(times) - 1)
        for now, then in pairwise(times):
            state, memory = step(state, memory, now, then, directions, batch.given)
        state = ops.convert_to_numpy(state).astype("float64")
        volume = state[:, size:].mean(axis=1) if volume else np.zeros(len(state))
        end = self.end(steps)
        return state[:, :size] / end.sigma, volume / math.hypot(end.alpha, end.sigma)

    def _stepping(self, shape: tuple[int, ...], exact: bool) -> Callable:
        """`state, memory = step(answer, state, memory, now, then, directions, given)`; memory is the solver's own."""
        schedule, solver, size = self.schedule, self.solver, math.prod(shape)

        def step(answer, state, memory, now, then, directions, given):
            count = directions.shape[1]

            def denoise(x, m):
                data, volume = x[:, :size], x[:, size:]
                copies = max(count, 1)
                repeated = Denoiser(answer, tree.map_structure(lambda rows: ops.repeat(rows, copies, axis=0), given))
                data = ops.reshape(ops.repeat(data, copies, axis=0), (-1, *shape))
                if count == 0:
                    x_hat = ops.reshape(repeated(data, m).x_hat, (-1, size))
                    return ops.concatenate([x_hat, volume], axis=1)
                estimate, pull = repeated.vjp(data, m)
                x_hat = ops.reshape(estimate.x_hat, (-1, copies, size))[:, 0]
                pulled = ops.reshape(pull(ops.reshape(directions, (-1, *shape))), (-1, count, size))
                trace = m.alpha * ops.sum(directions * pulled, axis=-1)
                trace = ops.sum(trace, axis=1, keepdims=True) if exact else trace
                shrunk = ops.sqrt(ops.sigmoid(m.log_snr))  # 1 / sqrt(1 + s^2)
                volume = volume / m.alpha * shrunk
                return ops.concatenate([x_hat, shrunk * volume - (size * shrunk**2 - trace) / shrunk], axis=1)

            now, then = schedule.at(now), schedule.at(then)
            state, _, memory = solver.step(Denoiser.of(denoise), schedule, state, now, then, None, memory)
            return state, memory

        return step
