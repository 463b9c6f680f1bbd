"""Sampling from a `DiffusionModel`: unconditional and conditional samples, image to image, inpainting and inversion.

Each request becomes a `Request`: the checked arguments, with one row per sample. All of them use one generator of
steps, `Request.steps`, which computes a batch:

    x at the first time    ->    Sampler.steps_from    ->    model.step    ->    solver, guidance, network
"""

import inspect
import random as py_random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import ops

from kdiff import backend, deprecated
from kdiff.base import check_integer, check_number
from kdiff.checks import check_examples
from kdiff.codecs import Codec
from kdiff.denoisers import Denoiser, Given
from kdiff.guidance import ClassifierFree, Guidance, Inpaint
from kdiff.guidance.base import Run
from kdiff.model.condition_inputs import condition_nulls, condition_rows
from kdiff.model.requests import Request
from kdiff.model.sizes import Sizes
from kdiff.predictions import check_beginning
from kdiff.sampling import Sampler, Step
from kdiff.schedules import NoiseSchedule
from kdiff.solvers import Solver

__all__ = ["COMPILED_STEPS", "Sampling", "as_sampler"]

# The number of compiled steps that a model caches: each takes 10 to 20 MB, and keeps the models that it calls alive.
COMPILED_STEPS = 8


class Sampling(Sizes):
    """The part of `DiffusionModel` that samples; it needs `denoise`, `schedule`, `codec` and `sampler`."""

    @deprecated.arguments(averages="ema")
    def sample(
        self,
        num_samples: int,
        *,
        sampler: Sampler | Solver | type[Solver] | str | None = None,
        guidance: Guidance | str | float | Sequence[Guidance | str] | None = None,
        steps: int | None = None,
        schedule: NoiseSchedule | type[NoiseSchedule] | str | None = None,
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
        **conditions: Any,
    ) -> np.ndarray:
        """Draws samples: new ones, variations of an `image` or a noisy `x`, or completions of what is `known`.

        Args:
            num_samples: the number of samples.
            sampler: a `Sampler`, a `Solver`, or the name of one; None: that of the model.
            guidance: a `Guidance`, its name, or a list of them, instead of that of the sampler; a number is the scale
                of `guidance.ClassifierFree`, which is added before the other rules of the sampler if it has none.
            steps: the number of steps; None: that of the sampler.
            schedule: the `NoiseSchedule` for sampling, or its name; None: that of training. The network is called at
                the same log-SNR, so any continuous schedule works within the trained range of noise levels.
            height, width: the size of the images, for a model that was built for images of any size, or whose network
                is a U-Net. By default it is that of `image`, `x`, `noise` or `known`.
            size: the same for examples with other axes, such as `(length,)` for series: all axes except the channels.
            image: the initial examples, one per sample or one for all: noise is added to them up to the time
                `strength`, where the run begins (SDEdit, Meng et al. 2021, arXiv:2108.01073).
            strength: in [0, 1]: 0 returns the image exactly, 1 keeps almost nothing of it. An array, as the mask of
                `guidance.Inpaint`, is a strength per pixel.
            x: a noisy batch at the first time of the run, such as `invert` or a run with a `stop` returns; one per
                sample or one for all.
            noise: the initial noise, instead of that of the seed: standard normal, with the shape of the data; one per
                sample or one for all. Stochastic solvers still draw from the seed. Or a function `noise(step, shape)`
                for the noise that the solver draws, as in `Sampler.steps_of`; the steps are then not compiled, all
                samples are one batch, and the initial noise is that of `x` or the seed.
            start: the time of `x`, in (0, 1].
            stop: the time at which the run ends, in [0, 1). If it is above 0, the noisy data is returned without
                decoding, for another model to continue: `refiner.sample(8, x=base.sample(8, stop=0.2), start=0.2)`.
                With the same grid the two make the steps of one run; the history of a multistep solver is not passed.
            known: examples of which a part is known: that part is kept, and the rest is generated by
                `guidance.Inpaint(known, mask)`. A grid with jumps (`times.Jumps`) increases its accuracy;
                `guidance.MomentMatching`, which is more expensive, accounts for correlations.
            mask: 1 where samples are generated and 0 where they are known; None: 1 where `known` is NaN.
            seed: the seed of the noise. Sample n of a seed is the same for any batch size and on every backend, except
                for `solvers.Adaptive`, whose samples share their substeps and agree to within its tolerance. Or a list
                with one seed per sample, each of which is then the first sample of its own seed. None: a seed is drawn
                from Python's generator, which `keras.utils.set_random_seed` seeds.
            batch_size: the number of samples per batch.
            ema: whether to use the averaged (EMA) weights.
            verbose: whether to show a progress bar.
            **conditions: one value for all samples, or one per sample, with shape `(num_samples, ...)`; text as
                strings. None is the null condition, for conditions with dropout in training.

        Returns:
            A float32 array of shape `(num_samples, ...)`; for images in [-1, 1], unless the run has a `stop`.

        Raises:
            ValueError: if the model is not built, a number is out of range, or a condition is missing, unknown or of
                another batch size.
        """
        options = {"sampler": sampler, "guidance": guidance, "steps": steps, "schedule": schedule}
        options |= {"height": height, "width": width, "size": size}
        begin = {"image": image, "strength": strength, "x": x, "noise": noise, "start": start, "stop": stop}
        options |= {**begin, "known": known, "mask": mask, "seed": seed, "ema": ema}
        run = self._run(num_samples, **options, **conditions)
        return run.ends(self, ops.convert_to_numpy if stop else self.decode, batch_size, verbose)

    @deprecated.arguments(averages="ema")
    def sample_steps(self, num_samples: int, *, preview: Codec | str | None = None, **options: Any) -> Iterator[Step]:
        """The same as `sample`, in one batch, step by step: yields a `Step` whose x and x_hat are decoded arrays.

        Args:
            num_samples: the number of samples.
            preview: a `Codec` for decoding instead of that of the model, such as a faster one.
            **options: as in `sample`, including conditions, except `batch_size` and `verbose`.
        """
        decode = self.decode if preview is None else partial(self._by_codec, Codec.get(preview).decode)
        return self._run(num_samples, **options).decoded(decode)

    @deprecated.arguments(averages="ema")
    def invert(self, image: Any, *, iterations: int = 1, batch_size: int = 64, **options: Any) -> np.ndarray:
        """The noise from which a deterministic sampler generates these examples: `sample(n, x=noise)` restores them.

        Args:
            image: examples, with shape `(count, ...)`.
            iterations: the number of calls of the network per step. Each reduces the error several times, if the steps
                are short compared to the changes of the estimate; otherwise use more steps.
            batch_size: the number of examples per batch.
            **options: `sampler`, whose solver must have an inverse, as DDIM and Euler do, `guidance`, `steps`, `ema`
                and conditions, as in `sample`.

        Returns:
            A float32 array with the shape of the encoded examples.

        Raises:
            ValueError: if the solver has no inverse; and as in `sample`.
        """
        return self._inversion(image, iterations, options).ends(self, ops.convert_to_numpy, batch_size)

    @deprecated.arguments(averages="ema")
    def invert_steps(self, image: Any, *, iterations: int = 1, **options: Any) -> Iterator[Step]:
        """The same as `invert`, in one batch, step by step: yields a `Step` whose x and x_hat are decoded arrays."""
        return self._inversion(image, iterations, options).decoded(self.decode)

    def _inversion(self, image, iterations, options) -> Request:
        """The run from these examples to noise."""
        image = np.asarray(image)
        if self.example is not None and image.ndim != 1 + len(self.example):
            raise ValueError(
                f"invert: examples must be a batch, with {1 + len(self.example)} axes; received the shape "
                f"{image.shape}. For one example it is `image[None]`"
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
    ) -> Request:
        """The checked request of `sample`, with one row per sample; with `iterations`, for the inverse sampler."""
        check_integer("sample", "num_samples", num_samples)
        seed = self._seeds(seed, num_samples)
        check_number("sample", "start", start, 1e-6, 1.0)
        if image is not None and x is not None:
            raise ValueError("sample: begin from an `image`, or from a noisy `x`, not from both")
        if image is None and not (np.ndim(strength) == 0 and strength == 1.0):
            raise ValueError("sample: a `strength` needs an `image` to begin from")
        if x is None and start != 1.0:
            raise ValueError("sample: a `start` needs a noisy `x` at that time; for an `image`, use `strength`")
        draw, noise = (noise, None) if callable(noise) else (None, noise)
        if x is not None and noise is not None:
            raise ValueError("sample: `noise` cannot be combined with `x`, which is noisy already")
        if mask is not None and known is None:
            raise ValueError("sample: a `mask` needs `known` examples")
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
        return Request(sampler, schedule, times, shape, data, x, before, given, step, seed, draw)

    @staticmethod
    def _seeds(seed, num_samples: int):
        """The seed, or an array with one per sample; for None a random one."""
        if seed is None:
            return py_random.randrange(2**32)
        if not isinstance(seed, (list, tuple, range, np.ndarray)):
            return seed
        if np.shape(seed) != (num_samples,):
            raise ValueError(f"sample: `seed` must be a number, or {num_samples}, one per sample; received: {seed!r}")
        return np.array([int(one) if isinstance(one, np.integer) else one for one in seed], object)

    def _check_beginning(self, schedule: NoiseSchedule, times: np.ndarray) -> None:
        """Raises a ValueError if the network's prediction does not determine the data at the first time."""
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
        """A compiled `Sampler.advance`, made once: the seed, times, conditions and arrays are its arguments.

        With a function for the noise it is not compiled.
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
            ema: whether to use the averaged (EMA) weights.
            schedule: the schedule of x_t and m; None: that of the model.
            **conditions: the conditions, with one row per example.
        """
        self._ready()
        return self.denoiser_in_step(ema, schedule, **conditions)

    @deprecated.arguments(averages="ema")
    def denoiser_in_step(self, ema: bool = True, schedule: NoiseSchedule | None = None, **conditions) -> Denoiser:
        """The same as `denoiser`, for use inside a compiled step, such as that of an objective.

        The arguments are those of `denoiser`.
        """
        answer = partial(self._answer, ema, self.schedule if schedule is None else schedule)
        return Denoiser(answer, Given(conditions), condition_nulls(self.network))

    def compiled_function(self, key: Any, function: Callable, others: Sequence[keras.layers.Layer] = ()) -> Callable:
        """The compiled form of a function of nested tensors that calls this model and `others`.

        It is compiled once per key, and again when the weights, the schedule or the prediction of the model change.
        """
        averaging = self._ready(others)
        models = (self, *others)
        weights = tuple(id(variable) for model in models for variable in model.variables)
        key = (key, averaging, weights, self.schedule, self.prediction, self.time_label)
        made = self._compiled_steps.pop(key, None)
        if made is None:
            made = backend.compiled(function, *models)
        self._compiled_steps[key] = made  # the most recently used
        while len(self._compiled_steps) > COMPILED_STEPS:
            del self._compiled_steps[next(iter(self._compiled_steps))]
        return made

    def _ready(self, others: Sequence[keras.layers.Layer] = ()) -> tuple:
        """Synchronises all weights; returns whether each of the models uses its averages."""
        models = [model for model in (self, *others) if isinstance(model, keras.Model)]
        for model in models:
            backend.synchronise(model)
        return tuple(model._follow_ema() for model in models if isinstance(model, Sampling))

    def encode(self, examples: Any) -> Any:
        """Encodes examples, such as images, to data."""
        check_examples(examples, self.codec.limit)
        return self._by_codec(self.codec.encode, examples)

    def decode(self, x: Any) -> Any:
        """Decodes data to examples."""
        return self._by_codec(self.codec.decode, x)

    def _by_codec(self, function: Callable, x):
        """The function of a batch, applied in batches of the codec's `batch_size`."""
        backend.synchronise(self)
        size = self.codec.batch_size or len(x)
        function = backend.without_gradients(function)
        parts = [ops.cast(function(x[i : i + size]), "float32") for i in range(0, len(x), size)]
        return parts[0] if len(parts) == 1 else ops.concatenate(parts)

    def condition_rows(
        self,
        conditions: dict[str, Any],
        num_samples: int,
        some: bool = False,
        example: tuple[int, ...] | None = None,
    ) -> dict[str, np.ndarray]:
        """The checked conditions by name, with one row per sample; a single value is repeated for all samples.

        Args:
            conditions: the conditions by name; text as strings.
            num_samples: the number of samples.
            some: whether conditions may be missing.
            example: the shape of one encoded sample, from which conditions derive defaults; None for no defaults.

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
    """Raises a ValueError for integers, such as images, and for a `noise` that is far from standard normal."""
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
    """The rules with this scale of classifier-free guidance, which is added as the first if there is none."""
    if not any(isinstance(one, ClassifierFree) for one in guidance):
        return [ClassifierFree(scale), *guidance]
    return [one.clone(scale=scale) if isinstance(one, ClassifierFree) else one for one in guidance]


def as_sampler(sampler: Sampler | Solver | type[Solver] | str) -> Sampler:
    """The sampler itself, or one with this solver."""
    return sampler if isinstance(sampler, Sampler) else Sampler(sampler)
