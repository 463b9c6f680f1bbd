"""What a `DiffusionModel` draws: new examples, others made from an image, and the noise that an image is made from.

Each is a `_Run`: what is asked for, checked, with one row a sample. All of them go through one generator of steps,
`_Run.steps`, which makes a batch of them:

    x at the first time    ->    Sampler.steps_from    ->    model.step    ->    solver, guidance, network
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops, tree

from kdiff import backend
from kdiff.base import check_integer, check_number
from kdiff.denoisers import Given
from kdiff.guidance import ClassifierFree
from kdiff.guidance.base import Run
from kdiff.model.condition_inputs import condition_nulls, condition_rows
from kdiff.predictions import check_beginning
from kdiff.sampling import Sampler, Step, initial_noise
from kdiff.schedules import NoiseSchedule
from kdiff.solvers import Solver

__all__ = ["Sampling", "as_sampler"]


class _Run(NamedTuple):
    """A run for all of its samples: arrays have one row each.

    Attributes:
        sampler: the sampler.
        schedule: to sample under.
        times: of the run.
        shape: of all samples, `(samples, ...)`.
        data: encoded examples that are a part of x at the first time; None for none.
        x: a noisy batch to begin from; None for `data` and noise.
        given: the conditions, and the arrays of each guidance.
        advance: a compiled step.
        seed: names the noise.
    """

    sampler: Sampler
    schedule: NoiseSchedule
    times: np.ndarray
    shape: tuple[int, ...]
    data: np.ndarray | None
    x: np.ndarray | None
    given: Given
    advance: Callable
    seed: int

    def steps(self, rows: np.ndarray | None = None) -> Iterator[Step]:
        """The steps of some of the samples, consecutive ones; None for all."""
        rows = np.arange(self.shape[0]) if rows is None else rows
        begin, first = self.schedule.sampled_at(self.times[0]), int(rows[0])
        if self.x is not None:
            x = self.x[rows]
        elif self.times[0] == 0:  # a strength of 0: the data, to the last digit
            x = ops.convert_to_tensor(self.data[rows])
        else:
            x = begin.sigma * initial_noise((len(rows), *self.shape[1:]), self.seed, first)
            x = x if self.data is None else x + begin.alpha * ops.convert_to_tensor(self.data[rows])
        given = tree.map_structure(lambda value: ops.convert_to_tensor(value[rows]), self.given)
        yield Step(0, len(self.times) - 1, float(self.times[0]), x, x)
        yield from self.sampler.steps_from(x, self.times, self.advance, self.schedule, given, self.seed, first)

    def ends(self, decode: Callable, batch_size: int, verbose: bool = False) -> np.ndarray:
        """The last x of each sample, decoded, in batches."""
        check_integer("sample", "batch_size", batch_size)
        count = self.shape[0]
        size = min(batch_size, count)
        progress = keras.utils.Progbar((len(self.times) - 1) * -(-count // size)) if verbose else None
        ends = []
        for first in range(0, count, size):
            # The last batch is filled up and cut: a batch of another size would be compiled again.
            for step in self.steps(np.minimum(np.arange(first, first + size), count - 1)):
                if progress and step.index:
                    progress.add(1)
            ends.append(ops.convert_to_numpy(decode(step.x)))
        return np.concatenate(ends)[:count]

    def decoded(self, decode: Callable) -> Iterator[Step]:
        """The steps of all samples in one batch, x and x_hat as decoded arrays."""
        for step in self.steps():
            if step.index:
                x, x_hat = (ops.convert_to_numpy(decode(value)) for value in (step.x, step.x_hat))
                yield step._replace(x=x, x_hat=x_hat)


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
            strength: in [0, 1]: 0 returns the image exactly, 1 keeps next to nothing of it.
            x: a noisy batch to begin from, at the run's first time, such as `invert` returns; one a sample or one for
                all.
            seed: names the noise. Sample n of a seed is the same in any batch size, and on every backend; but for
                `solvers.Adaptive`, where the samples of a batch share their sub-steps: to within its tolerance.
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
        options = {"sampler": sampler, "guidance": guidance, "steps": steps, "schedule": schedule}
        start = {"image": image, "strength": strength, "x": x}
        run = self._run(num_samples, **options, **start, seed=seed, averages=averages, **conditions)
        return run.ends(self._decode, batch_size, verbose)

    def sample_steps(self, num_samples: int, **options) -> Iterator[Step]:
        """The same as `sample`, in one batch, step by step: yields a `Step` whose x and x_hat are decoded arrays.

        Args:
            num_samples: how many.
            **options: as of `sample`, conditions included, but for `batch_size` and `verbose`.
        """
        return self._run(num_samples, **options).decoded(self._decode)

    def invert(self, image: Any, *, iterations: int = 1, batch_size: int = 64, **options) -> np.ndarray:
        """The noise from which a deterministic sampler makes these examples: `sample(n, x=noise)` gives them again.

        Args:
            image: examples, with shape `(count, ...)`.
            iterations: how often the network is asked in a step; each makes the error several times smaller, if the
                steps are short for how fast the network's estimate changes; if they are not, take more steps.
            batch_size: how many are inverted at once.
            **options: `sampler`, whose solver must have an inverse, as DDIM and Euler have, `guidance`, `steps`,
                `averages` and conditions, as of `sample`.

        Returns:
            A float32 array with the shape of the encoded examples.

        Raises:
            ValueError: if the solver has no inverse; and as of `sample`.
        """
        return self._inversion(image, iterations, options).ends(ops.convert_to_numpy, batch_size)

    def invert_steps(self, image: Any, *, iterations: int = 1, **options) -> Iterator[Step]:
        """The same as `invert`, in one batch, step by step: yields a `Step` whose x and x_hat are decoded arrays."""
        return self._inversion(image, iterations, options).decoded(self._decode)

    def _inversion(self, image, iterations, options) -> _Run:
        """The run from these examples to noise."""
        image = np.asarray(image)
        run = self._run(len(image), image=image, iterations=iterations, **options)
        times = run.times[::-1]
        x = self.schedule.sampled_at(times[0]).alpha * ops.convert_to_tensor(run.data)
        return run._replace(times=times, x=ops.convert_to_numpy(x))

    def _run(
        self,
        num_samples,
        *,
        sampler=None,
        guidance=None,
        steps=None,
        schedule=None,
        image=None,
        strength=1.0,
        x=None,
        seed=0,
        averages=True,
        iterations=None,
        **conditions,
    ) -> _Run:
        """What `sample` is asked for, checked, with one row a sample; with `iterations`, by the sampler's inverse."""
        check_integer("sample", "num_samples", num_samples)
        check_number("sample", "strength", strength, 0.0, 1.0)
        if image is not None and x is not None:
            raise ValueError("sample: begin from an `image`, or from a noisy `x`, not from both")
        if image is None and strength != 1.0:
            raise ValueError("sample: a `strength` needs an `image` to begin from")
        sampler = self._sampler(sampler, steps, guidance)
        schedule = self.schedule if schedule is None else NoiseSchedule.get(schedule)
        conditions = self._rows_of(conditions, num_samples)
        shape = (num_samples, *self._sample_shape())
        told = Run(shape, self._encode, lambda few: self._rows_of(few, num_samples, some=True), self.codec.data_shape)
        data = None if image is None else told.examples(self, "image", image)
        x = None if x is None else told.rows(self, "x", x, shape[1:])
        given, times = Given(conditions, sampler.rows(told)), sampler.times(schedule, strength)
        sampler = sampler if iterations is None else sampler.inverse(iterations)
        self._check_beginning(schedule, times)
        step = self._step(sampler, schedule, averages)
        return _Run(sampler, schedule, times, shape, data, x, given, step, seed)

    def _check_beginning(self, schedule: NoiseSchedule, times: np.ndarray) -> None:
        """Raises a ValueError if the network's prediction cannot tell the data where the run begins."""
        check_beginning(self.prediction, self.schedule, schedule.sampled_at(times[0]).log_snr)

    def _sampler(self, sampler: Sampler | Solver | str | None, steps: int | None, guidance: Any) -> Sampler:
        sampler = self.sampler if sampler is None else as_sampler(sampler)
        if isinstance(guidance, (int, float, np.number)) and not isinstance(guidance, bool):
            guidance = ClassifierFree(guidance)
        changes = {"steps": steps, "guidance": guidance}
        sampler = sampler.replaced(**{name: value for name, value in changes.items() if value is not None})
        if sampler.solver.learned and self.prediction.factor == 1:
            raise ValueError(f"{sampler.solver!r} needs the prediction LearnedVariance; this is {self.prediction!r}")
        return sampler

    def _step(self, sampler: Sampler, schedule: NoiseSchedule, averages: bool) -> Callable:
        """A compiled `Sampler.advance`, made once: seed, times, conditions and arrays are arguments of it."""
        models = (self, *sampler.models)
        for model in models:
            backend.synchronise(model)
        key = (sampler.key(), schedule, averages, self.schedule, self.prediction, self.time_label)
        if key not in self._compiled_steps:
            answer = partial(self._answer, averages, schedule)
            advance = partial(sampler.advance, answer, condition_nulls(self.network), schedule)
            self._compiled_steps[key] = backend.compiled(advance, *models)
        return self._compiled_steps[key]

    def _encode(self, examples):
        """Examples, such as images, as data."""
        return self._by_codec(self.codec.encode, examples)

    def _decode(self, x):
        """Data as examples."""
        return self._by_codec(self.codec.decode, x)

    def _by_codec(self, function: Callable, x):
        """The function of a batch, so many examples at once as the codec wants."""
        backend.synchronise(self)
        size = self.codec.batch_size or len(x)
        function = backend.without_gradients(function)
        parts = [ops.cast(function(x[i : i + size]), "float32") for i in range(0, len(x), size)]
        return parts[0] if len(parts) == 1 else ops.concatenate(parts)

    def _sample_shape(self) -> tuple[int, ...]:
        shape = self.shapes["image"][1:]
        if None in shape:
            raise ValueError(f"sample: the model was built for images of any size, {shape}; build it for one size")
        return shape

    def _rows_of(self, conditions: dict[str, Any], num_samples: int, some: bool = False) -> dict[str, np.ndarray]:
        if not self.built:
            raise ValueError("sample: the model has no weights yet; train it, load it, or call `build`")
        shapes = {name: shape[1:] for name, shape in self.shapes.items() if name != "image"}
        return condition_rows(conditions, shapes, self.network, num_samples, some)


def as_sampler(sampler: Sampler | Solver | str) -> Sampler:
    """The sampler itself, or one with this solver."""
    return sampler if isinstance(sampler, Sampler) else Sampler(sampler)
