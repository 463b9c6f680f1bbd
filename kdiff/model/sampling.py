"""What a `DiffusionModel` draws: new examples, others made from an image, and the noise that an image is made from.

Each is a `_Run`: what is asked for, checked, with one row a sample. All of them go through one generator of steps,
`_Run.steps`, which makes a batch of them:

    x at the first time    ->    Sampler.steps_from    ->    model.step    ->    solver, guidance, network
"""

import inspect
import random as py_random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops, tree

from kdiff import backend, deprecated
from kdiff.base import check_integer, check_number
from kdiff.checks import check_examples
from kdiff.codecs import Codec
from kdiff.denoisers import Denoiser, Given
from kdiff.guidance import ClassifierFree, Inpaint
from kdiff.guidance.base import Run
from kdiff.model.condition_inputs import condition_nulls, condition_rows, fits, words
from kdiff.predictions import check_beginning
from kdiff.sampling import Sampler, Step, initial_noise
from kdiff.schedules import NoiseSchedule
from kdiff.solvers import Solver

__all__ = ["COMPILED_STEPS", "Sampling", "as_sampler"]

# How many compiled steps a model keeps, the latest: each takes 10 to 20 MB, and holds the models that it asks.
COMPILED_STEPS = 8


class _Run(NamedTuple):
    """A run for all of its samples: arrays have one row each.

    Attributes:
        sampler: the sampler.
        schedule: to sample under.
        times: of the run.
        shape: of all samples, `(samples, ...)`.
        data: encoded examples that are a part of x at the first time; None for none.
        x: a noisy batch to begin from; None for `data` and noise.
        before: how many steps of the grid were left out before the first.
        given: the conditions, and the arrays of each guidance.
        advance: a compiled step.
        seed: names the noise; or one a sample.
        draw: the noise of each step, as of `Sampler.steps_of`; None for that of the seed.
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

    def steps(self, rows: np.ndarray | None = None) -> Iterator[Step]:
        """The steps of some of the samples, consecutive ones; None for all."""
        rows = np.arange(self.shape[0]) if rows is None else rows
        begin, first, seed = self.schedule.sampled_at(self.times[0]), int(rows[0]), self.seed
        if np.ndim(seed):
            first, seed = 0, seed[rows]
        if self.x is not None:
            x = self.x[rows]
        elif self.times[0] == 0:  # a strength of 0: the data, to the last digit
            x = ops.convert_to_tensor(self.data[rows])
        else:
            x = begin.sigma * initial_noise((len(rows), *self.shape[1:]), seed, first)
            x = x if self.data is None else x + begin.alpha * ops.convert_to_tensor(self.data[rows])
        given = tree.map_structure(lambda value: ops.convert_to_tensor(value[rows]), self.given)
        yield Step(0, len(self.times) - 1, float(self.times[0]), x, x)
        following = (self.times, self.advance, self.schedule, given, seed, first, self.before)
        yield from self.sampler.steps_from(x, *following, noise=self.draw)

    def ends(self, decode: Callable, batch_size: int, verbose: bool = False) -> np.ndarray:
        """The last x of each sample, decoded, in batches."""
        check_integer("sample", "batch_size", batch_size)
        count = self.shape[0]
        size = min(batch_size, count)
        if self.draw is not None and size < count:
            raise ValueError(
                f"sample: a function for `noise` is asked for all {count} samples at once: `batch_size` must be as "
                f"large; received: {batch_size}"
            )
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

    @deprecated.arguments(averages="ema")
    def sample(
        self,
        num_samples: int,
        *,
        sampler: Sampler | Solver | str | None = None,
        guidance: Any = None,
        steps: int | None = None,
        schedule: NoiseSchedule | str | None = None,
        height: int | None = None,
        width: int | None = None,
        size: Sequence[int] | None = None,
        image: Any = None,
        strength: Any = 1.0,
        x: Any = None,
        noise: Any = None,
        start: float = 1.0,
        stop: float = 0.0,
        known: Any = None,
        mask: Any = None,
        seed: int | Sequence[int] | None = 0,
        batch_size: int = 64,
        ema: bool = True,
        verbose: bool = False,
        **conditions,
    ) -> np.ndarray:
        """New examples; or, from an `image` or a noisy `x`, other ones; or the rest of what is `known`.

        Args:
            num_samples: how many.
            sampler: a `Sampler`, a `Solver`, or the name of one; None is the model's own.
            guidance: a `Guidance`, its name, or a list of them, in place of the sampler's own; a number is the scale of
                `guidance.ClassifierFree`, the sampler's or else one before its other rules, which stay.
            steps: the number of steps; None: the sampler's own.
            schedule: a schedule, or its name, to sample under; None: the one of training. The network is asked at
                the same log-SNR, so that any continuous schedule will do within the noise levels that it has seen.
            height, width: of the images, for a model that is built for images of any size, or whose network is a U-Net.
                What is given of `image`, `x`, `noise` or `known` has its size.
            size: the same for examples with other axes, such as `(length,)` of series: all but the channels.
            image: examples to begin from, one a sample or one for all: noise is added to them up to the time
                `strength`, and the run begins there (SDEdit, Meng et al. 2021, arXiv:2108.01073).
            strength: in [0, 1]: 0 returns the image exactly, 1 keeps next to nothing of it. An array, as the mask of
                `guidance.Inpaint`, is a strength a pixel.
            x: a noisy batch to begin from, at the run's first time, such as `invert` or a run with a `stop` returns;
                one a sample or one for all.
            noise: in place of what the run would draw to begin with: standard normal, of the shape of the data; one a
                sample or one for all. What a stochastic solver draws on its way is of `seed`. Or a function,
                `noise(step, shape)`, of what the solver draws in place of that: as of `Sampler.steps_of`; the steps are
                then not compiled, and all samples are one batch. What the run begins with is then `x`, or of `seed`.
            start: the time at which `x` is, in (0, 1].
            stop: the time at which the run ends, in [0, 1). Above 0 the noisy data is returned as it is, not decoded,
                for another model to go on from: `refiner.sample(8, x=base.sample(8, stop=0.2), start=0.2)`. With the
                same grid the two make the steps of one run; what a multistep solver remembers is not handed on.
            known: examples of which a part is known: that part is kept, and the rest drawn to suit it, by
                `guidance.Inpaint(known, mask)`, to which a grid with jumps (`times.Jumps`) adds accuracy;
                `guidance.MomentMatching`, which asks more of the network, counts in what the rest depends on.
            mask: 1 where it is to be drawn and 0 where it is known; None where `known` is NaN.
            seed: names the noise. Sample n of a seed is the same in any batch size, and on every backend; but for
                `solvers.Adaptive`, where the samples of a batch share their sub-steps: to within its tolerance. Or a
                list, one a sample, each of which is then the first sample of its own seed. None: one is drawn, from
                Python's generator, which `keras.utils.set_random_seed` seeds.
            batch_size: how many are made at once.
            ema: use the averaged weights.
            verbose: show a progress bar.
            **conditions: one value for all samples, or one a sample, with shape `(num_samples, ...)`; text as strings.
                None is no condition, where training has left it out at times.

        Returns:
            A float32 array of shape `(num_samples, ...)`; of images, in [-1, 1], unless the run has a `stop`.

        Raises:
            ValueError: if the model is not built, a number is out of range, or a condition is missing, unknown or of
                another batch size.
        """
        options = {"sampler": sampler, "guidance": guidance, "steps": steps, "schedule": schedule}
        options |= {"height": height, "width": width, "size": size}
        begin = {"image": image, "strength": strength, "x": x, "noise": noise, "start": start, "stop": stop}
        options |= {**begin, "known": known, "mask": mask, "seed": seed, "ema": ema}
        run = self._run(num_samples, **options, **conditions)
        return run.ends(ops.convert_to_numpy if stop else self.decode, batch_size, verbose)

    @deprecated.arguments(averages="ema")
    def sample_steps(self, num_samples: int, *, preview: Codec | str | None = None, **options) -> Iterator[Step]:
        """The same as `sample`, in one batch, step by step: yields a `Step` whose x and x_hat are decoded arrays.

        Args:
            num_samples: how many.
            preview: a `Codec` that decodes in place of the model's own, such as one that is faster.
            **options: as of `sample`, conditions included, but for `batch_size` and `verbose`.
        """
        decode = self.decode if preview is None else partial(self._by_codec, Codec.get(preview).decode)
        return self._run(num_samples, **options).decoded(decode)

    @deprecated.arguments(averages="ema")
    def invert(self, image: Any, *, iterations: int = 1, batch_size: int = 64, **options) -> np.ndarray:
        """The noise from which a deterministic sampler makes these examples: `sample(n, x=noise)` gives them again.

        Args:
            image: examples, with shape `(count, ...)`.
            iterations: how often the network is asked in a step; each makes the error several times smaller, if the
                steps are short for how fast the network's estimate changes; if they are not, take more steps.
            batch_size: how many are inverted at once.
            **options: `sampler`, whose solver must have an inverse, as DDIM and Euler have, `guidance`, `steps`,
                `ema` and conditions, as of `sample`.

        Returns:
            A float32 array with the shape of the encoded examples.

        Raises:
            ValueError: if the solver has no inverse; and as of `sample`.
        """
        return self._inversion(image, iterations, options).ends(ops.convert_to_numpy, batch_size)

    @deprecated.arguments(averages="ema")
    def invert_steps(self, image: Any, *, iterations: int = 1, **options) -> Iterator[Step]:
        """The same as `invert`, in one batch, step by step: yields a `Step` whose x and x_hat are decoded arrays."""
        return self._inversion(image, iterations, options).decoded(self.decode)

    def _inversion(self, image, iterations, options) -> _Run:
        """The run from these examples to noise."""
        image = np.asarray(image)
        if self.example is not None and image.ndim != 1 + len(self.example):
            raise ValueError(
                f"invert: examples must be a batch, with {1 + len(self.example)} axes; received the shape "
                f"{image.shape}. Of one example it is `image[None]`"
            )
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
        height=None,
        width=None,
        size=None,
        image=None,
        strength=1.0,
        x=None,
        noise=None,
        start=1.0,
        stop=0.0,
        known=None,
        mask=None,
        seed=0,
        ema=True,
        iterations=None,
        **conditions,
    ) -> _Run:
        """What `sample` is asked for, checked, with one row a sample; with `iterations`, by the sampler's inverse."""
        check_integer("sample", "num_samples", num_samples)
        seed = self._seeds(seed, num_samples)
        check_number("sample", "start", start, 1e-6, 1.0)
        if image is not None and x is not None:
            raise ValueError("sample: begin from an `image`, or from a noisy `x`, not from both")
        if image is None and not (np.ndim(strength) == 0 and strength == 1.0):
            raise ValueError("sample: a `strength` needs an `image` to begin from")
        if x is None and start != 1.0:
            raise ValueError("sample: a `start` needs a noisy `x`, which is at that time; an `image` has a `strength`")
        draw, noise = (noise, None) if callable(noise) else (None, noise)
        if x is not None and noise is not None:
            raise ValueError("sample: `noise` is added to an `image`, or to nothing; `x` has its noise")
        if mask is not None and known is None:
            raise ValueError("sample: a `mask` needs what is `known`")
        sampler = self._sampler(sampler, steps, guidance)
        if known is not None:
            sampler = sampler.replaced(guidance=(*sampler.guidance, Inpaint(known, mask)))
        if np.ndim(strength):
            sampler = sampler.replaced(guidance=(*sampler.guidance, Inpaint(image, strength)))
            strength = float(np.max(strength))
        check_number("sample", "strength", strength, 0.0, 1.0)
        schedule = self.schedule if schedule is None else NoiseSchedule.get(schedule)
        if (height is None) != (width is None):
            raise ValueError(f"sample: give `height` and `width`, both or neither; received: {height} and {width}")
        size = size if height is None else (height, width)
        given = {"size": size, "x": x, "noise": noise, "image": image, "known": known}
        shape = (num_samples, *self._sample_shape({name: one for name, one in given.items() if one is not None}))
        conditions = self.condition_rows(conditions, num_samples, example=shape[1:])
        rows = partial(self.condition_rows, num_samples=num_samples, some=True)
        plain = type(self.codec).data_shape is Codec.data_shape  # of another codec the data is no pictures
        told = Run(shape, self.encode, rows, self.codec.data_shape, self.codec.limit if plain else None)
        data = None if image is None else told.examples(self, "image", image)
        for name, value in {"x": x, "noise": noise}.items():
            _check_noise(name, value)
        x = None if x is None else told.rows(self, "x", x, shape[1:])
        given, times = Given(conditions, sampler.rows(told)), sampler.times(schedule, min(start, strength), stop)
        before = len(sampler.times(schedule, stop=stop)) - len(times)
        if noise is not None:
            begin = schedule.sampled_at(times[0])
            x = float(begin.sigma) * told.rows(self, "noise", noise, shape[1:])
            x = x if data is None else x + float(begin.alpha) * data
        sampler = sampler if iterations is None else sampler.inverse(iterations)
        self._check_beginning(schedule, times)
        step = self._step(sampler, schedule, ema, draw)
        return _Run(sampler, schedule, times, shape, data, x, before, given, step, seed, draw)

    @staticmethod
    def _seeds(seed, num_samples: int):
        """The seed, or an array of one a sample; for None one that is drawn."""
        if seed is None:
            return py_random.randrange(2**32)
        if not isinstance(seed, (list, tuple, range, np.ndarray)):
            return seed
        if np.shape(seed) != (num_samples,):
            raise ValueError(f"sample: `seed` must be one number, or {num_samples}, one a sample; received: {seed!r}")
        return np.array([int(one) if isinstance(one, np.integer) else one for one in seed], object)

    def _check_beginning(self, schedule: NoiseSchedule, times: np.ndarray) -> None:
        """Raises a ValueError if the network's prediction cannot tell the data where the run begins."""
        check_beginning(self.prediction, self.schedule, schedule.sampled_at(times[0]).log_snr)

    def _sampler(self, sampler: Sampler | Solver | str | None, steps: int | None, guidance: Any) -> Sampler:
        sampler = self.sampler if sampler is None else as_sampler(sampler)
        if isinstance(guidance, (int, float, np.number)) and not isinstance(guidance, bool):
            guidance = _scaled(sampler.guidance, guidance)
        changes = {"steps": steps, "guidance": guidance}
        sampler = sampler.replaced(**{name: value for name, value in changes.items() if value is not None})
        if sampler.solver.learned and self.prediction.factor == 1:
            raise ValueError(f"{sampler.solver!r} needs the prediction LearnedVariance; this is {self.prediction!r}")
        return sampler

    def _step(self, sampler: Sampler, schedule: NoiseSchedule, ema: bool, draw: Callable | None) -> Callable:
        """A compiled `Sampler.advance`, made once: seed, times, conditions and arrays are arguments of it.

        With a function that draws it is not compiled.
        """
        answer, nulls = partial(self._answer, ema, schedule), condition_nulls(self.network)
        if draw is not None:
            self._ready(sampler.models)
            return backend.without_gradients(partial(sampler.advance, answer, nulls, schedule, draw=draw))
        rows = tuple((name, np.asarray(null).tobytes()) for name, null in nulls.items())  # constants of the step
        key = (sampler.key(), schedule, ema, rows)
        others = (*sampler.models, schedule)  # which may have weights
        return self.compiled_function(key, partial(sampler.advance, answer, nulls, schedule), others)

    @deprecated.arguments(averages="ema")
    def denoiser(self, ema: bool = True, schedule: NoiseSchedule | None = None, **conditions) -> Denoiser:
        """The model as a `Denoiser`: `estimate = model.denoiser()(x_t, m)`.

        Args:
            ema: use the averaged weights.
            schedule: that x_t and m are of; None for the model's own.
            **conditions: one row an example.
        """
        self._ready()
        return self.denoiser_in_step(ema, schedule, **conditions)

    @deprecated.arguments(averages="ema")
    def denoiser_in_step(self, ema: bool = True, schedule: NoiseSchedule | None = None, **conditions) -> Denoiser:
        """The same as `denoiser` for use in a compiled step, as that of an objective, before which all is up to date.

        Arguments as of `denoiser`.
        """
        answer = partial(self._answer, ema, self.schedule if schedule is None else schedule)
        return Denoiser(answer, Given(conditions), condition_nulls(self.network))

    def compiled_function(self, key: Any, function: Callable, others: Sequence[keras.layers.Layer] = ()) -> Callable:
        """The function of nests of tensors, which asks this model, and `others`, in its compiled form.

        It is made once for a key, and again when what the model computes with has changed.
        """
        averaging = self._ready(others)
        models = (self, *others)
        weights = tuple(id(variable) for model in models for variable in model.variables)
        key = (key, averaging, weights, self.schedule, self.prediction, self.time_label)
        made = self._compiled_steps.pop(key, None)
        if made is None:
            made = backend.compiled(function, *models)
        self._compiled_steps[key] = made  # the last to be forgotten
        while len(self._compiled_steps) > COMPILED_STEPS:
            del self._compiled_steps[next(iter(self._compiled_steps))]
        return made

    def _ready(self, others: Sequence[keras.layers.Layer] = ()) -> tuple:
        """Brings all weights up to date; whether each of the models uses its averages."""
        models = [model for model in (self, *others) if isinstance(model, keras.Model)]
        for model in models:
            backend.synchronise(model)
        return tuple(model._follow_ema() for model in models if isinstance(model, Sampling))

    def encode(self, examples):
        """Examples, such as images, as data."""
        check_examples(examples, self.codec.limit)
        return self._by_codec(self.codec.encode, examples)

    def decode(self, x):
        """Data as examples."""
        return self._by_codec(self.codec.decode, x)

    def _by_codec(self, function: Callable, x):
        """The function of a batch, so many examples at once as the codec wants."""
        backend.synchronise(self)
        size = self.codec.batch_size or len(x)
        function = backend.without_gradients(function)
        parts = [ops.cast(function(x[i : i + size]), "float32") for i in range(0, len(x), size)]
        return parts[0] if len(parts) == 1 else ops.concatenate(parts)

    def _sample_shape(self, given: dict[str, Any]) -> tuple[int, ...]:
        """The shape of one encoded sample; what it may be any, what is given decides."""
        if not self.built:
            raise ValueError("sample: the model has no weights yet; train it, load it, or call `build`")
        shape = self.shapes["image"][1:]
        if given and getattr(self.network, "any_size", False):
            shape = (*[None] * (len(shape) - 1), shape[-1])
        if None in shape or "size" in given:
            for name, value in given.items():
                shape = self._sized(name, value, shape)
        if None in shape:
            raise ValueError(
                f"sample: the model was built for data of any size, ({words(shape)}): give `height` and `width`, or "
                "`size`, or begin from something that has a size"
            )
        return shape

    def _sized(self, name: str, value: Any, shape: tuple) -> tuple:
        """The shape, of which sizes are not known yet, of one sample that has the size of what is given."""
        if name == "size":
            known = [self._size_of_data(value)]
        elif name in ("x", "noise"):
            known = [np.shape(value)[-len(shape) :]]
        else:  # examples, one or several
            known = [self._data_shape(np.shape(value)[first:]) for first in (0, 1)]
        fitting = [one for one in known if one is not None and fits(one, shape)]
        if not fitting:
            raise ValueError(
                f"sample: of this model, for data of the shape ({words(shape)}), `{name}` cannot be "
                f"{value if name == 'size' else f'of the shape {np.shape(value)}'}"
            )
        return fitting[0]

    def _data_shape(self, shape: tuple) -> tuple | None:
        """That of encoded data; None if there are no such examples."""
        try:
            return tuple(self.codec.data_shape(tuple(shape)))
        except ValueError:
            return None

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether this is the shape of an example of the model's: of any size, if its network takes any."""
        wanted = self.shapes["image"][1:]
        if getattr(self.network, "any_size", False):
            wanted = (*[None] * (len(wanted) - 1), wanted[-1])
        data = self._data_shape(tuple(shape))
        return data is not None and fits(data, wanted)

    def _size_of_data(self, size: Sequence[int]) -> tuple | None:
        """The shape of encoded data for examples of this size."""
        size = tuple(size) if isinstance(size, (list, tuple, np.ndarray)) else (size,)
        for one in size:
            check_integer("sample", "size", one)
        if self.example is None:
            raise ValueError(
                f"sample: the model was built for encoded data, and its codec, {self.codec!r}, changes the size: in "
                "place of `size` give a `noise` of the shape of encoded data"
            )
        return self._data_shape((*size, self.example[-1]))

    def condition_rows(
        self,
        conditions: dict[str, Any],
        num_samples: int,
        some: bool = False,
        example: tuple[int, ...] | None = None,
    ) -> dict[str, np.ndarray]:
        """The conditions by name, checked, with one row a sample: one value may stand for all.

        Args:
            conditions: by name; text as strings.
            num_samples: how many.
            some: whether conditions may be missing.
            example: the shape of one sample, encoded, of which a condition may have its default; None for no defaults.

        Raises:
            ValueError: if the model has no weights; if a condition is missing, unknown or of another batch size.
        """
        if not self.built:
            raise ValueError("sample: the model has no weights yet; train it, load it, or call `build`")
        shapes = {name: shape[1:] for name, shape in self.shapes.items() if name != "image"}
        factor = getattr(self.codec, "factor", 1)
        sizes = None if example is None else tuple(side * factor for side in example[:-1])
        return condition_rows(conditions, shapes, self.network, num_samples, some, _ARGUMENTS, sizes)


_ARGUMENTS = tuple(inspect.signature(Sampling.sample).parameters)[2:-1]  # without self, num_samples and conditions


def _check_noise(name: str, value: Any) -> None:
    """Raises a ValueError for what can be no noise: whole numbers, as pictures are; of `noise`, what is not normal."""
    if value is None:
        return
    value = np.asarray(value)
    if value.dtype.kind not in "f" and "float" not in value.dtype.name:
        what = "a noisy batch" if name == "x" else "standard normal noise"
        raise ValueError(f"sample: `{name}` is {what}, of floating-point numbers; received: {value.dtype}")
    most = float(np.nanmax(np.abs(value), initial=0.0))
    if name == "noise" and most > 20.0:
        raise ValueError(f"sample: `noise` must be standard normal, and reaches {most:.4g}; noisy data is `x`")


def _scaled(guidance: Sequence, scale: float) -> list:
    """The rules with this scale of classifier-free guidance, which acts first if there is none yet."""
    if not any(isinstance(one, ClassifierFree) for one in guidance):
        return [ClassifierFree(scale), *guidance]
    return [one.clone(scale=scale) if isinstance(one, ClassifierFree) else one for one in guidance]


def as_sampler(sampler: Sampler | Solver | str) -> Sampler:
    """The sampler itself, or one with this solver."""
    return sampler if isinstance(sampler, Sampler) else Sampler(sampler)
