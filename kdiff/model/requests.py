"""A request of `sample`, checked, and the generator of its steps."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import keras
import numpy as np
from keras import ops, tree

from kdiff import backend
from kdiff.base import check_integer
from kdiff.denoisers import Given
from kdiff.sampling import Sampler, Step, initial_noise
from kdiff.schedules import NoiseSchedule

__all__ = ["Request"]


class Request(NamedTuple):
    """A run for all of its samples: arrays have one row per sample.

    Attributes:
        sampler: the sampler.
        schedule: the schedule of the run.
        times: the times of the run.
        shape: the shape of all samples, `(samples, ...)`.
        data: encoded examples that x contains at the first time; None for none.
        x: the noisy batch at the first time; None: `data` plus noise.
        before: the number of steps of the grid that precede the first.
        given: the conditions, and the arrays of each guidance.
        advance: a compiled step.
        seed: the seed of the noise, or one per sample.
        draw: a function for the noise of each step, as in `Sampler.steps_of`; None: the noise of the seed.
        encode: a function that adds to `given` what conditions are encoded to; None for none.
    """

    sampler: Sampler
    schedule: NoiseSchedule
    times: np.ndarray
    shape: tuple[int, ...]
    data: np.ndarray | None
    x: np.ndarray | None
    before: int
    given: Given
    advance: Callable
    seed: int | np.ndarray
    draw: Callable | None = None
    encode: Callable[[Given], Given] | None = None

    def steps(self, rows: np.ndarray | None = None) -> Iterator[Step]:
        """The steps for some of the samples, which must be consecutive; None for all."""
        rows = np.arange(self.shape[0]) if rows is None else rows
        begin, first, seed = self.schedule.sampled_at(self.times[0]), int(rows[0]), self.seed
        if np.ndim(seed):
            first, seed = 0, seed[rows]
        if self.x is not None:
            x = self.x[rows]
        elif self.times[0] == 0:  # a strength of 0: exactly the data
            x = ops.convert_to_tensor(self.data[rows])
        else:
            x = begin.sigma * initial_noise((len(rows), *self.shape[1:]), seed, first)
            x = x if self.data is None else x + begin.alpha * ops.convert_to_tensor(self.data[rows])
        x = backend.on_devices(ops.convert_to_tensor(x, "float32"))
        given = tree.map_structure(lambda value: backend.on_devices(ops.convert_to_tensor(value[rows])), self.given)
        given = given if self.encode is None else self.encode(given)
        yield Step(0, len(self.times) - 1, float(self.times[0]), x, x)
        following = (self.times, self.advance, self.schedule, given, seed, first, self.before)
        yield from self.sampler.steps_from(x, *following, noise=self.draw)

    def ends(self, model: keras.Model, decode: Callable, batch_size: int, verbose: bool = False) -> np.ndarray:
        """The final x of each sample, decoded, computed in batches, each of them on all devices of the model."""
        check_integer("sample", "batch_size", batch_size)
        count, devices = self.shape[0], 1 if self.draw else backend.device_count(model)
        size = -(-min(batch_size, count) // devices) * devices
        if self.draw is not None and size < count:
            raise ValueError(
                f"sample: a function for `noise` is called for all {count} samples at once, so `batch_size` must be at "
                f"least that; received: {batch_size}"
            )
        progress = keras.utils.Progbar((len(self.times) - 1) * -(-count // size)) if verbose else None

        def end(rows):
            for step in self.steps(rows):
                if progress and step.index and rows[0] % size == 0:  # on the first device only
                    progress.add(1)
            return ops.convert_to_numpy(decode(step.x))

        # The last batch is padded and cut: a batch of another size would be compiled again.
        batches = [np.minimum(np.arange(first, first + size), count - 1) for first in range(0, count, size)]
        made = partial(backend.over_devices, model, end) if devices > 1 else end
        return np.concatenate([made(rows) for rows in batches])[:count]

    def decoded(self, decode: Callable) -> Iterator[Step]:
        """The steps of all samples in one batch, with x and x_hat as decoded arrays."""
        for step in self.steps():
            if step.index:
                x, x_hat = (ops.convert_to_numpy(decode(value)) for value in (step.x, step.x_hat))
                yield step._replace(x=x, x_hat=x_hat)
