"""What a `DiffusionModel` draws: new examples, others made from an image, and the noise that an image is made from.

All is one run of a `Sampler`: x at its first time, then solver steps with the model's own denoiser, guided. A batch of
samples is a slice of the rows of one `_Task`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops, tree

from kdiff import backend
from kdiff.base import check_integer, check_number
from kdiff.conversion import transfer
from kdiff.guidance import ClassifierFree, Denoiser
from kdiff.guidance.base import Run
from kdiff.model.condition_inputs import condition_nulls, condition_rows
from kdiff.sampling import Sampler, Step, initial_noise
from kdiff.schedules import NoiseSchedule
from kdiff.solvers import Solver


class _Task(NamedTuple):
    """A run of `sample` for all of its samples: arrays have one row each.

    Attributes:
        sampler: the sampler.
        schedule: to sample under.
        times: of the run.
        data: examples to begin from, encoded; None for none.
        x: a noisy batch to begin from; None for none.
        conditions: by name.
        rows: the arrays of each guidance.
    """

    sampler: Sampler
    schedule: NoiseSchedule
    times: np.ndarray
    data: np.ndarray | None
    x: np.ndarray | None
    conditions: dict[str, np.ndarray]
    rows: tuple


class Sampling:
    """The half of a `DiffusionModel` that samples; it needs `denoise`, `schedule`, `codec` and `sampler`."""

    def sample(
        self,
        num_samples: int,
        *,
        sampler: Sampler | Solver | str | None = None,
        guidance: Any = None,
        steps: int | None = None,
        schedule: NoiseSchedule | str | None = None,
        image: Any = None,
        strength: float = 1.0,
        x: Any = None,
        seed: int = 0,
        batch_size: int = 64,
        averages: bool = True,
        verbose: bool = False,
        **conditions,
    ) -> np.ndarray:
        """New examples; or, from an `image` or a noisy `x`, other ones.

        Args:
            num_samples: how many.
            sampler: a `Sampler`, a `Solver`, or the name of one; None is the model's own.
            guidance: a `Guidance`, its name, or a list of them, in place of the sampler's own; a number is the scale of
                `guidance.ClassifierFree`.
            steps: the number of steps; None: the sampler's own.
            schedule: a schedule, or its name, to sample under; None: the one of training. The network is asked at
                the same log-SNR, so that any continuous schedule will do within the noise levels that it has seen.
            image: examples to begin from, one a sample or one for all: noise is added to them up to the time
                `strength`, and the run begins there (SDEdit, Meng et al. 2021, arXiv:2108.01073).
            strength: in [0, 1]: 0 returns the image, 1 keeps next to nothing of it.
            x: a noisy batch to begin from, at the run's first time, such as `invert` returns; one a sample or one for
                all.
            seed: names the noise. Sample n of a seed is the same in any batch size, and on every backend.
            batch_size: how many are made at once.
            averages: use the averaged weights.
            verbose: show a progress bar.
            **conditions: one value for all samples, or one a sample, with shape `(num_samples, ...)`; text as strings.
                None is no condition, where training has left it out at times.

        Returns:
            A float32 array of shape `(num_samples, ...)`; of images, in [-1, 1].

        Raises:
            ValueError: if the model is not built, a number is out of range, or a condition is missing, unknown or of
                another batch size.
        """
        task = self._task(num_samples, sampler, guidance, steps, schedule, image, strength, x, conditions)
        check_integer("sample", "batch_size", batch_size)
        progress = keras.utils.Progbar((len(task.times) - 1) * -(-num_samples // batch_size)) if verbose else None
        samples = []
        for first in range(0, num_samples, batch_size):
            # The last batch is filled up and cut: a batch of another size would be compiled again.
            rows = np.minimum(np.arange(first, first + min(batch_size, num_samples)), num_samples - 1)
            begin, steps_of = self._run(task, rows, seed, averages)
            for step in steps_of:
                begin = step.x
                if progress:
                    progress.add(1)
            samples.append(ops.convert_to_numpy(self.codec.decode(begin)))
        return np.concatenate(samples)[:num_samples]

    def sample_steps(
        self,
        num_samples: int,
        *,
        sampler: Sampler | Solver | str | None = None,
        guidance: Any = None,
        steps: int | None = None,
        schedule: NoiseSchedule | str | None = None,
        image: Any = None,
        strength: float = 1.0,
        x: Any = None,
        seed: int = 0,
        averages: bool = True,
        **conditions,
    ) -> Iterator[Step]:
        """The same as `sample`, in one batch, step by step: yields a `Step` whose x and x_hat are decoded arrays."""
        task = self._task(num_samples, sampler, guidance, steps, schedule, image, strength, x, conditions)
        yield from self._decoded(self._run(task, np.arange(num_samples), seed, averages)[1])

    def invert(
        self,
        image: Any,
        *,
        sampler: Sampler | Solver | str | None = None,
        guidance: Any = None,
        steps: int | None = None,
        iterations: int = 1,
        batch_size: int = 64,
        averages: bool = True,
        **conditions,
    ) -> np.ndarray:
        """The noise from which a deterministic sampler makes these examples: `sample(n, x=noise)` gives them again.

        Args:
            image: examples, with shape `(count, ...)`.
            sampler: as of `sample`; its solver must have an inverse, as DDIM and Euler have.
            guidance: as of `sample`.
            steps: the number of steps; None: the sampler's own.
            iterations: how often the network is asked in a step; each makes the error several times smaller.
            batch_size: how many are inverted at once.
            averages: use the averaged weights.
            **conditions: as of `sample`.

        Returns:
            A float32 array with the shape of the encoded examples.

        Raises:
            ValueError: if the solver has no inverse; and as of `sample`.
        """
        check_integer("invert", "batch_size", batch_size)
        task = self._inversion(image, sampler, guidance, steps, iterations, conditions)
        count, noise = len(task.x), []
        for first in range(0, count, batch_size):
            rows = np.minimum(np.arange(first, first + min(batch_size, count)), count - 1)
            *_, step = self._run(task, rows, 0, averages)[1]
            noise.append(ops.convert_to_numpy(step.x))
        return np.concatenate(noise)[:count]

    def invert_steps(
        self,
        image: Any,
        *,
        sampler: Sampler | Solver | str | None = None,
        guidance: Any = None,
        steps: int | None = None,
        iterations: int = 1,
        averages: bool = True,
        **conditions,
    ) -> Iterator[Step]:
        """The same as `invert`, in one batch, step by step: yields a `Step` whose x and x_hat are decoded arrays."""
        task = self._inversion(image, sampler, guidance, steps, iterations, conditions)
        yield from self._decoded(self._run(task, np.arange(len(task.x)), 0, averages)[1])

    def _inversion(self, image, sampler, guidance, steps, iterations, conditions) -> "_Task":
        """The task whose run goes from these examples to noise."""
        image = np.asarray(image)
        task = self._task(len(image), sampler, guidance, steps, None, image, 1.0, None, conditions)
        times = task.times[::-1]
        x = self.schedule.at(times[0]).alpha * ops.convert_to_tensor(task.data)
        return task._replace(sampler=task.sampler.inverse(iterations), times=times, x=ops.convert_to_numpy(x))

    def _decoded(self, run: Iterator[Step]) -> Iterator[Step]:
        for step in run:
            x, x_hat = (ops.convert_to_numpy(self.codec.decode(value)) for value in (step.x, step.x_hat))
            yield step._replace(x=x, x_hat=x_hat)

    def _task(self, count, sampler, guidance, steps, schedule, image, strength, x, conditions) -> "_Task":
        """What `sample` is asked for, checked, with one row a sample."""
        check_integer("sample", "num_samples", count)
        check_number("sample", "strength", strength, 0.0, 1.0)
        if image is not None and x is not None:
            raise ValueError("sample: begin from an `image`, or from a noisy `x`, not from both")
        if image is None and strength != 1.0:
            raise ValueError("sample: a `strength` needs an `image` to begin from")
        sampler = self._sampler(sampler, steps, guidance)
        schedule = self.schedule if schedule is None else NoiseSchedule.get(schedule)
        conditions = self._rows_of(conditions, count)
        shape = (count, *self._sample_shape())
        run = Run(shape, self.codec.encode, lambda some: self._rows_of(some, count, partial=True))
        data = None if image is None else run.examples(self, "image", image)
        x = None if x is None else run.rows(self, "x", x, shape[1:])
        return _Task(sampler, schedule, sampler.times(schedule, strength), data, x, conditions, sampler.rows(run))

    def _sampler(self, sampler: Sampler | Solver | str | None, steps: int | None, guidance: Any) -> Sampler:
        sampler = self.sampler if sampler is None else as_sampler(sampler)
        if isinstance(guidance, (int, float, np.number)) and not isinstance(guidance, bool):
            guidance = ClassifierFree(guidance)
        changes = {"steps": steps, "guidance": guidance}
        return sampler.replaced(**{name: value for name, value in changes.items() if value is not None})

    def _run(self, task: "_Task", rows: np.ndarray, seed: int, averages: bool) -> tuple[Any, Iterator[Step]]:
        """Where these samples begin, and their steps."""
        sampler = task.sampler
        for model in (self, *sampler.models):
            backend.synchronise(model)
        if sampler.solver.learned and self.prediction.factor == 1:
            raise ValueError(f"{sampler.solver!r} needs the prediction LearnedVariance; this is {self.prediction!r}")
        begin, first = task.schedule.at(task.times[0]), int(rows[0])
        if task.x is not None:
            x = task.x[rows]
        else:
            x = begin.sigma * initial_noise((len(rows), *self._sample_shape()), seed, first)
            x = x if task.data is None else x + begin.alpha * ops.convert_to_tensor(task.data[rows])
        function = self._step_function(sampler, task.schedule, averages)
        conditions, arrays = tree.map_structure(
            lambda value: ops.convert_to_tensor(value[rows]), (task.conditions, task.rows)
        )

        def advance(*arguments):
            return function(conditions, *arguments)

        options = {"x": x, "times": task.times, "seed": seed, "first": first, "rows": arrays, "compiled": advance}
        return x, sampler.steps_of(None, task.schedule, tuple(x.shape), **options)

    def _step_function(self, sampler: Sampler, schedule: NoiseSchedule, averages: bool):
        """A compiled step of this solver, made once; seed, times, conditions and arrays are arguments of it."""
        key = (sampler.key(), schedule, averages, self.schedule, self.prediction, self.time_label)
        if key not in self._step_functions:

            def denoise(x_t, m, **conditions):
                return self.denoise(x_t, m, averages, sampler.solver.learned, **conditions)

            denoise = transfer(denoise, self.schedule, schedule)
            nulls = condition_nulls(self.network)

            def advance(conditions, *arguments):
                return sampler.advance(Denoiser(denoise, conditions, nulls), schedule, *arguments)

            self._step_functions[key] = backend.compiled(advance, self, *sampler.models)
        return self._step_functions[key]

    def _sample_shape(self) -> tuple[int, ...]:
        shape = self.shapes["image"][1:]
        if None in shape:
            raise ValueError(f"sample: the model was built for images of any size, {shape}; build it for one size")
        return shape

    def _rows_of(self, conditions: dict[str, Any], num_samples: int, partial: bool = False) -> dict[str, np.ndarray]:
        if not self.built:
            raise ValueError("sample: the model has no weights yet; train it, load it, or call `build`")
        shapes = {name: shape[1:] for name, shape in self.shapes.items() if name != "image"}
        return condition_rows(conditions, shapes, self.network, num_samples, partial)


def as_sampler(sampler: Sampler | Solver | str) -> Sampler:
    """The sampler itself, or one with this solver."""
    return sampler if isinstance(sampler, Sampler) else Sampler(sampler)
