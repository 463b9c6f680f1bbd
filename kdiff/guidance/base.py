"""Guidance: a denoiser made from a denoiser, so that it works with any solver and any prediction.

    guided = guidance(denoise),    guided(x, m).x_hat = guidance.guide(denoise, x, m, here).x_hat

A guidance is a function of values. It asks the denoiser that it is given, as often and under whatever conditions it
wants, and answers with an estimate made from one of the answers. That is all that classifier-free guidance wants:

    class Twice(Guidance):
        def guide(self, denoise, x, m, here):
            given, none = denoise.batched(x, m, denoise.conditions, denoise.unconditional())       # one batch
            return given.guided(none.x_hat + 2.0 * (given.x_hat - none.x_hat))

What it has for each sample, its `arrays`, and what it remembered come to it as `here`, one row a sample, and travel as
conditions do: whoever asks several questions in one batch repeats them without knowing. What it wants to remember it
gives back with the estimate; in a run it is told so in the next step:

    class Smooth(Guidance):
        def start(self, x):
            return 0.0 * x

        def guide(self, denoise, x, m, here):
            estimate = denoise(x, m)
            x_hat = 0.5 * (estimate.x_hat + here.memory)
            return estimate.guided(x_hat, remember=x_hat)

A step may ask several times, as Heun's method does, and a guidance may ask several questions in one batch. All are told
the same, and what is remembered is of the estimate that the solver's step returns, and of the first of the questions.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from keras import ops, tree

from kdiff.base import Value, check_number
from kdiff.denoisers import Denoiser, Estimate, Given
from kdiff.schedules import Marginal, NoiseSchedule

__all__ = ["Clip", "DynamicThreshold", "Guidance", "Here", "Place", "Run", "check_scale", "over", "tensors"]


class Place(NamedTuple):
    """A step of a run.

    Attributes:
        index: its number, 0 ... steps - 1, an int32 tensor.
        now: where the step begins; fields of shape `()`.
        then: where it leads.
        schedule: the schedule of the run.
    """

    index: Any
    now: Marginal
    then: Marginal
    schedule: NoiseSchedule


class Here(NamedTuple):
    """What a guidance is told beside the question.

    Attributes:
        rows: its `arrays` that are given, by name, one row a sample.
        memory: what it remembered in the last step, or `start`.
        place: the step of the run; None outside of a run.
    """

    rows: Mapping[str, Any]
    memory: Any
    place: Place | None

    def step(self, owner: Any) -> Place:
        """The step of the run.

        Raises:
            ValueError: outside of a run.
        """
        if self.place is None:
            raise ValueError(f"{type(owner).__name__}: it depends on the step; use it in a `Sampler`")
        return self.place


class Run(NamedTuple):
    """What a guidance is told of a run before it begins.

    Attributes:
        shape: of all samples, `(samples, ...)`.
        encode: from examples to data, as a model's codec does.
        conditions: from a dictionary of conditions to one with a row a sample, checked and tokenised.
        data_shape: from the shape of one example to that of its data; a ValueError if there is none such.
        limit: the largest magnitude that the data itself has, as pixels have 1; None if it is not known.
    """

    shape: tuple[int, ...]
    encode: Callable = ops.convert_to_tensor
    conditions: Callable | None = None
    data_shape: Callable = tuple
    limit: float | None = None

    def rows(self, owner: Any, name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
        """`value` as float32 with one row a sample, each of this shape; one value for all samples is repeated.

        Raises:
            ValueError: if it has another shape, or is not finite.
        """
        value, wanted = np.asarray(value, "float32"), (self.shape[0], *shape)
        if value.shape not in (shape, wanted):
            raise ValueError(
                f"{type(owner).__name__}: `{name}` must have the shape {shape}, or {wanted} for one a sample; "
                f"received: {value.shape}"
            )
        if not np.isfinite(value).all():
            raise ValueError(f"{type(owner).__name__}: `{name}` must be finite; it holds NaN or infinity")
        return np.broadcast_to(value, wanted)

    def examples(self, owner: Any, name: str, value: Any) -> np.ndarray:
        """Examples, such as images, as data with one row a sample."""
        value = np.asarray(value)
        one = self._is_example(value.shape)
        if not one:
            self.data_shape(value.shape[1:])
        encoded = ops.convert_to_numpy(self.encode(value[None] if one else value))
        return self.rows(owner, name, encoded[0] if one else encoded, self.shape[1:])

    def _is_example(self, shape: tuple[int, ...]) -> bool:
        try:
            return tuple(self.data_shape(shape)) == tuple(self.shape[1:])
        except ValueError:
            return False


class Guidance(Value):
    """The base of all guidance. A new one defines `guide`, or, if it changes x_hat alone, `change`.

    Attributes:
        arrays: the names of the arguments that may differ from sample to sample. `rows` makes arrays of them, and
            other numbers in them are no reason to compile again.
    """

    arrays: tuple[str, ...] = ()

    def guide(self, denoise: Denoiser, x, m: Marginal, here: Here) -> Estimate:
        """The guided estimate: `guided(x_hat)` of an answer of `denoise`.

        Args:
            denoise: the denoiser to ask, with the conditions of the samples.
            x: the noisy batch, float32, with shape `(batch, ...)`.
            m: the marginal that it is at; fields of shape `()` or `(batch,)`.
            here: what it has for these samples, what it remembers, and where in a run it is.
        """
        estimate = denoise(x, m)
        return estimate.guided(self.change(estimate.x_hat))

    def change(self, x_hat):
        """The guided x_hat."""
        raise NotImplementedError

    @property
    def active(self) -> bool:
        """Whether it changes anything."""
        return True

    @property
    def models(self) -> tuple:
        """The Keras models that it asks."""
        return ()

    def rows(self, run: Run) -> dict[str, Any]:
        """The `arrays` that are given, with one row a sample each.

        Raises:
            ValueError: if one does not fit the run.
        """
        return {}

    def start(self, x) -> Any:
        """What it remembers before the first step, a nest of tensors with a row a sample; `x` is the noisy batch."""
        return ()

    def key(self) -> tuple:
        """What a compiled step depends on: all arguments but the arrays."""
        return (type(self), *(_hashable(getattr(self, n)) for n in self._argument_defaults() if n not in self.arrays))

    def __call__(self, denoise: Any) -> Denoiser:
        """The guided denoiser, outside of a run: each question is a first one."""
        inner = Denoiser.of(denoise)
        guided = self.over(inner).answer

        def answer(given, x, m):
            x = ops.convert_to_tensor(x, "float32")
            rows = tensors(self.rows(Run(tuple(x.shape))))
            own = Given(given.conditions, (*given.rows, rows), (*given.memory, self.start(x)))
            return guided(own, x, m)._replace(memory=given.memory)

        return Denoiser(answer, inner.given, inner.nulls)

    def over(self, denoise: Denoiser, place: Place | None = None) -> Denoiser:
        """The guided denoiser; of the rows and memories that are given it takes the last, and passes on the others."""

        def answer(given, x, m):
            inner = Denoiser(denoise.answer, Given(given.conditions, given.rows[:-1], given.memory[:-1]), denoise.nulls)
            estimate = self.guide(inner, x, m, Here(given.rows[-1], given.memory[-1], place))
            if not isinstance(estimate, Estimate) or len(estimate.memory) != len(given.memory):
                raise TypeError(
                    f"{type(self).__name__}: `guide` must return `estimate.guided(x_hat)`, of an `estimate` that "
                    f"`denoise` gave it; received: {estimate!r}"
                )
            return estimate

        return Denoiser(answer, denoise.given, denoise.nulls)


def tensors(rows: Any) -> Any:
    """A nest of arrays as tensors."""
    return tree.map_structure(lambda value: ops.convert_to_tensor(np.array(value)), rows)


def _hashable(value):
    return tree.map_structure(_hashable, tuple(value)) if isinstance(value, list) else value


def over(values, x):
    """Numbers, `()` or `(batch,)`, shaped to broadcast against the batch `x`."""
    return ops.reshape(ops.cast(values, "float32"), (-1, *[1] * (len(x.shape) - 1)))


def check_scale(owner: str, scale: Any) -> None:
    """Raises a ValueError unless `scale` is a finite number, or one a sample."""
    try:
        numbers = np.asarray(scale, "float64")
    except (TypeError, ValueError):
        numbers = np.full(1, np.nan)
    if numbers.ndim > 1 or not np.isfinite(numbers).all():
        raise ValueError(f"{owner}: `scale` must be a number, or one a sample; received: {scale!r}")


class Clip(Guidance):
    """Static thresholding: x_hat is clipped to [-limit, limit], as DDPM's code does.

    Args:
        limit: the largest magnitude of data.
    """

    def __init__(self, limit: float = 1.0):
        check_number("Clip", "limit", limit, 0.0)
        self.limit = limit

    def change(self, x_hat):
        """clip(x_hat, -limit, limit)."""
        return ops.clip(x_hat, -self.limit, self.limit)


class DynamicThreshold(Guidance):
    """Dynamic thresholding (Saharia et al. 2022, "Imagen", arXiv:2205.11487, section 2.3):

        s = max(quantile of |x_hat|, 1),   x_hat <- clip(x_hat, -s, s) / s,     for each example.

    Args:
        quantile: in [0, 1].
        highest: the largest s.
    """

    def __init__(self, quantile: float = 0.995, highest: float = float("inf")):
        check_number("DynamicThreshold", "quantile", quantile, 0.0, 1.0)
        check_number("DynamicThreshold", "highest", highest, 1.0)
        self.quantile, self.highest = quantile, highest

    def change(self, x_hat):
        """clip(x_hat, -s, s) / s."""
        magnitudes = ops.reshape(ops.abs(x_hat), (ops.shape(x_hat)[0], -1))
        s = over(ops.clip(ops.quantile(magnitudes, self.quantile, axis=-1), 1.0, self.highest), x_hat)
        return ops.clip(x_hat, -s, s) / s
