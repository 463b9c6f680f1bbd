"""What is measured: a `DiffusionModel`, or a denoiser with its schedule, and the data, batch by batch."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from keras import ops, tree

from kdiff import backend
from kdiff.base import check_integer
from kdiff.denoisers import Denoiser, Given
from kdiff.model import DiffusionModel
from kdiff.schedules import NoiseSchedule

__all__ = ["Batch", "Subject"]


class Batch(NamedTuple):
    """A batch, all of which have one size: the last is filled up with copies.

    Attributes:
        x: data, float32, with shape `(batch, ...)`, an array.
        given: the conditions, tensors.
        first: the number of its first example.
        count: how many of its rows count.
    """

    x: np.ndarray
    given: Given
    first: int
    count: int


class Subject:
    """A model or a denoiser, of which likelihoods are asked.

    Args:
        model: a `DiffusionModel`, or `x_hat = denoise(x, m)`, or a `Denoiser`; of `keras.ops`, for it is compiled.
        schedule: of a denoiser; a model has its own.
        ema: use the averaged weights of a model.

    Raises:
        TypeError: if it is neither.
        ValueError: if a denoiser comes without a schedule, or a model with one.
    """

    def __init__(self, model: Any, schedule: Any, ema: bool):
        self.model = model if isinstance(model, DiffusionModel) else None
        if self.model is None:
            if not callable(model):
                raise TypeError(f"likelihood: a DiffusionModel or a denoiser is expected; received: {model!r}")
            if schedule is None:
                raise ValueError(
                    "likelihood: a denoiser needs the `schedule` that its noise is of, as schedule='cosine'"
                )
            denoiser = Denoiser.of(model)
            self.schedule, self.limit, self.given = NoiseSchedule.get(schedule), None, denoiser.given
        else:
            if schedule is not None:
                raise ValueError("likelihood: a model is measured on its own schedule; leave out `schedule`")
            if not model.built:
                raise ValueError("likelihood: the model has no weights yet; train it, load it, or call `build`")
            denoiser = model.denoiser(ema)
            self.schedule, self.limit, self.given = model.schedule, model.codec.limit, Given()
        self.answer, self.ema = denoiser.answer, ema

    def compiled(self, key: Any, function: Callable) -> Callable:
        """`function(answer, *arguments)` of nests of tensors, without `answer`, compiled; of a model once for a key."""
        function = partial(function, self.answer)
        if self.model is None:
            return backend.compiled(function)
        return self.model.compiled_function((key, self.ema), function)

    def batches(self, data: Any, size: int) -> Iterator[Batch]:
        """The batches of data, encoded.

        Args:
            data: examples `(n, ...)`; a dictionary of them, "image", and of conditions; a pair of examples and labels;
                or an iterable of such batches, as a `tf.data.Dataset` is.
            size: the batch size of arrays.

        Raises:
            ValueError: if there are none, or they are not what the model takes.
        """
        check_integer("likelihood", "batch_size", size)
        first = 0
        for examples, conditions in _cut(data, size):
            count = len(examples)
            size = count if first == 0 else size
            rows = np.minimum(np.arange(max(size, count)), count - 1)
            x = self._encoded(examples)[rows]
            if self.model is None:  # a denoiser has the conditions of all examples
                given = tree.map_structure(lambda value: ops.convert_to_numpy(value)[first + rows], self.given)  # noqa: B023
            else:
                conditions = self.model.condition_rows(conditions, count, example=x.shape[1:])
                given = Given({name: np.asarray(value)[rows] for name, value in conditions.items()})
            yield Batch(x, tree.map_structure(ops.convert_to_tensor, given), first, count)
            first += count
        if first == 0:
            raise ValueError("likelihood: there is no data")

    def _encoded(self, examples: np.ndarray) -> np.ndarray:
        if self.model is not None and not self.model.takes(examples.shape[1:]):
            raise ValueError(
                f"likelihood: examples must be as those that the model learns, in a batch, "
                f"{self.model.shapes['image'][1:]} when they are encoded; received the shape {examples.shape}"
            )
        x = ops.convert_to_numpy(self.model.encode(examples)) if self.model else np.asarray(examples, "float32")
        if not np.isfinite(x).all():
            raise ValueError("likelihood: there are NaN or infinite numbers in the data")
        return x


def _cut(data: Any, size: int) -> Iterator[tuple[np.ndarray, Mapping[str, Any]]]:
    """(examples, conditions) of each batch."""
    if isinstance(data, (dict, tuple)) or hasattr(data, "shape"):
        examples, conditions = _parts(data)
        for i in range(0, len(examples), size):
            few = slice(i, i + size)
            yield examples[few], {name: value[few] for name, value in conditions.items()}
    elif isinstance(data, Iterable):
        yield from map(_parts, data)
    else:
        raise TypeError(f"likelihood: data must be an array, a dictionary of arrays or batches of them: {data!r}")


def _parts(batch: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    if isinstance(batch, (tuple, list)):
        x, *labels = batch
        parts = dict(x) if isinstance(x, dict) else {"image": x}
        if len(labels) > 1:
            raise ValueError(f"likelihood: a batch is `x`, `(x, label)` or a dictionary; received {len(batch)} parts")
        if labels:
            parts["label"] = labels[0]
    else:
        parts = dict(batch) if isinstance(batch, dict) else {"image": batch}
    parts = {
        name: value if isinstance(value, np.ndarray) else ops.convert_to_numpy(value) for name, value in parts.items()
    }
    if "image" not in parts:
        raise ValueError(f"likelihood: a batch needs its examples, 'image'; received: {sorted(parts)}")
    if len({len(value) for value in parts.values()}) > 1:
        raise ValueError(f"likelihood: rows differ: { {name: len(value) for name, value in parts.items()} }")
    return parts.pop("image"), parts
