"""The model whose likelihood is measured, a `DiffusionModel` or a denoiser with its schedule, and batches of data."""

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
    """A batch. All batches have the same size: the last is padded with copies.

    Attributes:
        x: the data, a float32 array with shape `(batch, ...)`.
        given: the conditions, as tensors.
        first: the index of its first example.
        count: the number of its rows without padding.
    """

    x: np.ndarray
    given: Given
    first: int
    count: int


class Subject:
    """A model or a denoiser whose likelihood is measured.

    Args:
        model: a `DiffusionModel`, a `Denoiser`, or a function `x_hat = denoise(x, m)`; it is compiled, so it uses
            `keras.ops`.
        schedule: the schedule of a denoiser; a model has its own.
        ema: whether to use the averaged (EMA) weights of a model.

    Raises:
        TypeError: if `model` is none of these.
        ValueError: if a denoiser is given without a schedule, or a model with one.
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
            self.schedule, self.codec, self.given = NoiseSchedule.get(schedule), None, denoiser.given
        else:
            if schedule is not None:
                raise ValueError("likelihood: a model is measured on its own schedule; leave out `schedule`")
            if not model.built:
                raise ValueError("likelihood: the model has no weights yet; train it, load it, or call `build`")
            denoiser = model.denoiser(ema)
            self.schedule, self.codec, self.given = model.schedule, model.codec, Given()
        self.answer, self.ema = denoiser.answer, ema

    @property
    def images(self) -> Callable | None:
        """The method of the codec that maps data to images, if it has one."""
        return None if self.codec is None else self.codec.images

    def compiled(self, key: Any, function: Callable) -> Callable:
        """`function(answer, *arguments)`, on nests of tensors, compiled with this `answer`; once per key of a model."""
        function = partial(function, self.answer)
        if self.model is None:
            return backend.compiled(function)
        return self.model.compiled_function((key, self.ema), function)

    def batches(self, data: Any, size: int) -> Iterator[Batch]:
        """Yields the data in batches, encoded.

        Args:
            data: examples with shape `(n, ...)`; a dictionary of these, as "image", and conditions; a pair of examples
                and labels; or an iterable of such batches, such as a `tf.data.Dataset`.
            size: the batch size for arrays.

        Raises:
            ValueError: if there are no examples, or the model does not take them.
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
    """Yields (examples, conditions) per batch."""
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
