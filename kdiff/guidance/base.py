"""Guidance: a denoiser that wraps a denoiser, so that it works with any solver and any prediction.

    guided = guidance(denoise),    guided(x, m).x_hat = guidance.guide(denoise, x, m, here).x_hat

A guidance calls the given denoiser, any number of times and under any conditions, and returns a modified estimate. For
classifier-free guidance this is all:

    class Twice(Guidance):
        def guide(self, denoise, x, m, here):
            given, none = denoise.batched(x, m, denoise.conditions, denoise.unconditional())       # one batch
            return given.guided(none.x_hat + 2.0 * (given.x_hat - none.x_hat))

The per-sample values of its arguments (`arrays`) and its memory are passed as `here`, with one row per sample. They
are batched together with the conditions, so an outer guidance that evaluates several conditions in one batch repeats
them. A guidance returns its new memory with the estimate, and receives it in the next step of the run:

    class Smooth(Guidance):
        def start(self, x):
            return 0.0 * x

        def guide(self, denoise, x, m, here):
            estimate = denoise(x, m)
            x_hat = 0.5 * (estimate.x_hat + here.memory)
            return estimate.guided(x_hat, remember=x_hat)

A step may call the denoiser several times, as Heun's method does, and a guidance may evaluate several conditions in one
batch. All these calls receive the same memory. The new memory is that of the estimate that the solver's step returns,
and of the first set of conditions.
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
    """A step of a run; in an inversion the step that is inverted, with its index in the run from noise to data.

    Attributes:
        index: its index, 0 ... steps - 1, an int32 tensor.
        now: the marginal at the beginning of the step, with fields of shape `()`.
        then: the marginal at its end.
        schedule: the schedule of the run.
    """

    index: Any
    now: Marginal
    then: Marginal
    schedule: NoiseSchedule


class Here(NamedTuple):
    """The context of a call of `Guidance.guide`.

    Attributes:
        rows: the values of its `arrays`, by name, with one row per sample.
        memory: its memory from the previous step, or the result of `start`.
        place: the current step of the run; None outside a run.
    """

    rows: Mapping[str, Any]
    memory: Any
    place: Place | None

    def step(self, owner: Any) -> Place:
        """The current step of the run.

        Raises:
            ValueError: outside a run.
        """
        if self.place is None:
            raise ValueError(f"{type(owner).__name__} depends on the step of the run; use it in a `Sampler`")
        return self.place


class Run(NamedTuple):
    """The description of a run that a guidance receives before the run begins.

    Attributes:
        shape: the shape of all samples, `(samples, ...)`.
        encode: a function from examples to data, as a model's codec.
        conditions: a function from a dictionary of conditions to one with a row per sample, checked and tokenised.
        data_shape: a function from the shape of an example to that of its data, which raises a ValueError for an
            invalid shape.
        limit: the largest magnitude of the data, such as 1 for pixels; None if it is not known.
    """

    shape: tuple[int, ...]
    encode: Callable = ops.convert_to_tensor
    conditions: Callable | None = None
    data_shape: Callable = tuple
    limit: float | None = None

    def rows(self, owner: Any, name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
        """`value` as float32 with one row of this shape per sample; a single value is repeated for all samples.

        Raises:
            ValueError: if it has another shape, or is not finite.
        """
        value, wanted = np.asarray(value, "float32"), (self.shape[0], *shape)
        if value.shape not in (shape, wanted):
            raise ValueError(
                f"{type(owner).__name__}: `{name}` must have the shape {shape}, or {wanted} for one value per sample; "
                f"received: {value.shape}"
            )
        if not np.isfinite(value).all():
            raise ValueError(f"{type(owner).__name__}: `{name}` must be finite; it holds NaN or infinity")
        return np.broadcast_to(value, wanted)

    def examples(self, owner: Any, name: str, value: Any) -> np.ndarray:
        """Examples, such as images, encoded as data with one row per sample."""
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
    """The base class of all guidance. A new one defines `guide`, or only `change` if it is a function of x_hat.

    Attributes:
        arrays: the names of the arguments that may differ between samples. `rows` converts them to arrays, and a
            change of their values does not recompile the step.
    """

    arrays: tuple[str, ...] = ()

    def guide(self, denoise: Denoiser, x, m: Marginal, here: Here) -> Estimate:
        """The guided estimate, made by `estimate.guided(x_hat)` from a result of `denoise`.

        Args:
            denoise: the denoiser to call, with the conditions of the samples.
            x: the noisy batch, float32, with shape `(batch, ...)`.
            m: the marginal of `x`, with fields of shape `()` or `(batch,)`.
            here: the values of its `arrays` for these samples, its memory, and the step of the run.
        """
        estimate = denoise(x, m)
        return estimate.guided(self.change(estimate.x_hat))

    def change(self, x_hat):
        """The guided x_hat."""
        raise NotImplementedError

    @property
    def active(self) -> bool:
        """Whether it has any effect."""
        return True

    @property
    def models(self) -> tuple:
        """The Keras models that it calls."""
        return ()

    def rows(self, run: Run) -> dict[str, Any]:
        """The values of its `arrays`, each with one row per sample.

        Raises:
            ValueError: if a value does not fit the run.
        """
        return {}

    def start(self, x) -> Any:
        """Its memory before the first step, a nested structure with one row per sample; `x` is the noisy batch."""
        return ()

    def finish(self, x, rows: Mapping[str, Any]) -> Any:
        """The result of a run that ends above t = 0, as the grid does, for its last `x`; `rows` as in `Here`."""
        return x

    def key(self) -> tuple:
        """The cache key of a compiled step: all arguments except the arrays."""
        return (type(self), *(_hashable(getattr(self, n)) for n in self._argument_defaults() if n not in self.arrays))

    def __call__(self, denoise: Any) -> Denoiser:
        """The guided denoiser, outside a run: each call starts with the initial memory."""
        inner = Denoiser.of(denoise)
        guided = self.over(inner).answer

        def answer(given, x, m):
            x = ops.convert_to_tensor(x, "float32")
            rows = tensors(self.rows(Run(tuple(x.shape))))
            own = Given(given.conditions, (*given.rows, rows), (*given.memory, self.start(x)))
            return guided(own, x, m)._replace(memory=given.memory)

        return Denoiser(answer, inner.given, inner.nulls)

    def over(self, denoise: Denoiser, place: Place | None = None) -> Denoiser:
        """The guided denoiser; it uses the last of the given rows and memories, and passes on the others."""

        def answer(given, x, m):
            inner = Denoiser(denoise.answer, Given(given.conditions, given.rows[:-1], given.memory[:-1]), denoise.nulls)
            estimate = self.guide(inner, x, m, Here(given.rows[-1], given.memory[-1], place))
            if not isinstance(estimate, Estimate) or len(estimate.memory) != len(given.memory):
                raise TypeError(
                    f"{type(self).__name__}: `guide` must return `estimate.guided(x_hat)`, for an `estimate` returned "
                    f"by `denoise`; received: {estimate!r}"
                )
            return estimate

        return Denoiser(answer, denoise.given, denoise.nulls)


def tensors(rows: Any) -> Any:
    """A nested structure of arrays, converted to tensors."""
    return tree.map_structure(lambda value: ops.convert_to_tensor(np.array(value)), rows)


def _hashable(value):
    return tree.map_structure(_hashable, tuple(value)) if isinstance(value, list) else value


def over(values, x):
    """Values of shape `()` or `(batch,)`, reshaped to broadcast against the batch `x`."""
    return ops.reshape(ops.cast(values, "float32"), (-1, *[1] * (len(x.shape) - 1)))


def check_scale(owner: str, scale: Any) -> None:
    """Raises a ValueError unless `scale` is a finite number, or one per sample."""
    try:
        numbers = np.asarray(scale, "float64")
    except (TypeError, ValueError):
        numbers = np.full(1, np.nan)
    if numbers.ndim > 1 or not np.isfinite(numbers).all():
        raise ValueError(f"{owner}: `scale` must be a number, or one per sample; received: {scale!r}")


class Clip(Guidance):
    """Static thresholding: x_hat is clipped to [-limit, limit], as in the code of DDPM.

    Args:
        limit: the largest magnitude of the data.
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
