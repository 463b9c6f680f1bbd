"""Guidance: a denoiser made from a denoiser, so that it works with any solver and any prediction.

    guided = guidance(denoise),    x_hat = guided(x, m)

A `Denoiser` knows its conditions, and can be asked under others. That is all that classifier-free guidance wants:

    class Twice(Guidance):
        def guide(self, denoise, x, m):
            given, none = denoise.each(x, m, denoise.conditions, denoise.without())       # one batch
            return none + 2.0 * (given - none)

In a run, a guidance is `bound` before each step: to the arrays that it has for the samples of this batch (`rows`), to
what it remembers of the steps before (`memory`), and to the step's `Place`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from keras import ops, tree

from kdiff import backend
from kdiff.base import Value, check_number
from kdiff.schedules import Marginal, NoiseSchedule
from kdiff.solvers import Denoise


class Denoiser:
    """x_hat = denoise(x, m), under conditions that may be changed.

    Args:
        function: `function(x, m, **conditions)` gives x_hat, with the shape of `x`, or a pair, x_hat and the learned
            variance.
        conditions: tensors with one row an example, by name.
        nulls: the row that stands for no condition, by the name of each condition that has one.
    """

    def __init__(self, function: Callable, conditions: Mapping | None = None, nulls: Mapping | None = None):
        self.function, self.conditions, self.nulls = function, dict(conditions or {}), dict(nulls or {})

    @classmethod
    def of(cls, denoise: Denoise) -> Self:
        """The denoiser itself, or a plain function `x_hat = denoise(x, m)` as one without conditions."""
        return denoise if isinstance(denoise, Denoiser) else cls(denoise)

    def __call__(self, x, m: Marginal):
        """x_hat under `conditions`, or a pair, x_hat and the learned variance."""
        return self.function(x, m, **self.conditions)

    def mapped(self, change: Callable[["Denoiser"], Callable]) -> "Denoiser":
        """A denoiser with the same conditions, of which each question (x, m) is put to `change(denoiser)`."""

        def function(x, m, **conditions):
            return change(Denoiser(self.function, conditions, self.nulls))(x, m)

        return Denoiser(function, self.conditions, self.nulls)


class Asked(Denoiser):
    """A denoiser as `Guidance.guide` gets it: it answers with x_hat alone, and keeps the learned variance aside.

    Attributes:
        variance: that of the first answer, under the run's own conditions; None if there is none.
    """

    variance = None

    def __call__(self, x, m: Marginal):
        """x_hat under `conditions`."""
        return self.each(x, m, self.conditions)[0]

    def each(self, x, m: Marginal, *conditions: Mapping) -> list:
        """x_hat under each of these conditions, asked in one batch."""
        count = len(conditions)
        joined = {name: ops.concatenate([one[name] for one in conditions]) for name in conditions[0]}
        places = Marginal(*(ops.concatenate([v] * count) if len(v.shape) else v for v in m)) if count > 1 else m
        estimate = self.function(ops.concatenate([x] * count) if count > 1 else x, places, **joined)
        return ops.split(self._kept(estimate, ops.shape(x)[0]), count)

    def linearised(self, x, m: Marginal):
        """(x_hat, pull): x_hat, and the function that takes v, with its shape, to (d x_hat / d x)^T v."""
        x_hat, pull, variance = backend.pullback(lambda x: _pair(self.function(x, m, **self.conditions)), x)
        self._kept(x_hat if variance is None else (x_hat, variance), ops.shape(x)[0])
        return x_hat, pull

    def _kept(self, estimate, batch):
        x_hat, variance = _pair(estimate)
        if self.variance is None and variance is not None:
            self.variance = variance[:batch]
        return x_hat

    def without(self, names: Sequence[str] | None = None, instead: Mapping | None = None) -> dict[str, Any]:
        """The conditions without some of them: their null rows in their place.

        Args:
            names: which; None for all that have a null.
            instead: other values, one row an example, for some of them.

        Raises:
            ValueError: if one of `names` has no null, or nothing has.
        """
        names, instead = self.nulls if names is None else names, instead or {}
        unknown = [name for name in names if name not in self.nulls and name not in instead]
        if unknown or not (names or instead):
            raise ValueError(
                f"Guidance: the conditions {unknown or list(self.conditions)} cannot be left out, for nothing stands "
                f"for none of them: give their layers a `dropout` above 0, such as LabelEmbedding(10, dropout=0.1). "
                f"Those that can: {sorted(self.nulls)}"
            )
        nulls = {name: _rows_like(self.nulls[name], self.conditions[name]) for name in names if name not in instead}
        return {**self.conditions, **nulls, **instead}


def _pair(estimate):
    return estimate if isinstance(estimate, tuple) else (estimate, None)


def _rows_like(row, rows):
    return ops.broadcast_to(ops.cast(ops.convert_to_tensor(row), rows.dtype), ops.shape(rows))


class Place(NamedTuple):
    """The step of a run in which a guidance is asked.

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


class Run(NamedTuple):
    """What a guidance is told of a run before it begins.

    Attributes:
        shape: of all samples, `(samples, ...)`.
        encode: from examples to data, as a model's codec does.
        conditions: from a dictionary of conditions to one with a row a sample, checked and tokenised.
    """

    shape: tuple[int, ...]
    encode: Callable = ops.convert_to_tensor
    conditions: Callable | None = None

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
        one = value.ndim == len(self.shape) - 1
        encoded = ops.convert_to_numpy(self.encode(value[None] if one else value))
        return self.rows(owner, name, encoded[0] if one else encoded, self.shape[1:])


class Guidance(Value):
    """The base of all guidance. A new one defines `guide`, or, if it changes x_hat alone, `change`.

    Attributes:
        arrays: the names of the arguments that may differ from sample to sample. They are made tensors by `rows`, and
            other numbers in them are no reason to compile again.
        remembers: whether it has a `memory`.
        place: the step that it is bound to; None outside of a run.
        memory: what `guide` left at its last call: a nest of tensors.
    """

    arrays: tuple[str, ...] = ()
    remembers: bool = False
    place: Place | None = None
    memory: Any = ()

    def __call__(self, denoise: Denoise) -> Denoiser:
        """The guided denoiser."""

        def guided(denoise):
            def answer(x, m):
                x = ops.convert_to_tensor(x, "float32")
                asked = Asked(denoise.function, denoise.conditions, denoise.nulls)
                x_hat = self._repeated(x.shape[0]).guide(asked, x, m)
                return x_hat if asked.variance is None else (x_hat, asked.variance)

            return answer

        return Denoiser.of(denoise).mapped(guided)

    def guide(self, denoise: Asked, x, m: Marginal):
        """The guided x_hat, of the shape of `x`."""
        return self.change(denoise(x, m))

    def change(self, x_hat):
        """The guided x_hat."""
        raise NotImplementedError

    # In a run

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
        """The memory before the first step; `x` is the noisy batch."""
        return ()

    def bound(self, rows: Mapping[str, Any], memory: Any, place: Place) -> Self:
        """A copy for one step."""
        arrays = {name: rows.get(name) for name in self.arrays}
        return self._copied({**arrays, "memory": memory, "place": place})

    def _copied(self, attributes: Mapping[str, Any]) -> Self:
        """A copy with the same objects, models and all, but for these attributes."""
        one = object.__new__(type(self))
        one.__dict__.update({**self.__dict__, **attributes})
        return one

    def _repeated(self, batch: int) -> Self:
        """Itself, or, where another guidance asks about several batches in one, a copy with its arrays as often."""
        arrays = {name: getattr(self, name) for name in self.arrays}
        sizes = [value.shape[0] for value in tree.flatten(arrays) if len(getattr(value, "shape", ()))]
        if self.place is None or not sizes or max(sizes) == batch:
            return self
        times = batch // max(sizes)
        return self._copied(tree.map_structure(lambda rows: ops.concatenate([rows] * times), arrays))

    def key(self) -> tuple:
        """What a compiled step depends on: all arguments but the arrays."""
        return (type(self), *(_hashable(getattr(self, n)) for n in self._argument_defaults() if n not in self.arrays))

    def _placed(self) -> Place:
        if self.place is None:
            raise ValueError(f"{type(self).__name__}: it depends on the step; use it in a `Sampler`")
        return self.place


def _hashable(value):
    return tree.map_structure(_hashable, tuple(value)) if isinstance(value, list) else value


def over(values, x):
    """Numbers, `()` or `(batch,)`, shaped to broadcast against the batch `x`."""
    return ops.reshape(ops.cast(values, "float32"), (-1, *[1] * (len(x.shape) - 1)))


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
