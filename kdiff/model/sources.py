"""The kinds of data that `fit` takes, each of which is mapped and checked in its own way.

source = source_of(x, y).prepared(network)      one class for each kind of data
source.shapes()                                 the shapes of the inputs, by name
source.checked(check)                           the data for Keras
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from types import GeneratorType
from typing import Any, Self

import keras
import numpy as np
from keras import tree

from kdiff import backend
from kdiff.codecs import Codec
from kdiff.model.condition_inputs import Preparation
from kdiff.model.feeding import BatchCheck, check_axes, packed, unpack
from kdiff.text import is_text

__all__ = ["Source", "source_of"]

_UNEVEN = (
    "Where lengths vary, a batch holds examples of one length: "
    "`tf.data.Dataset.bucket_by_sequence_length(..., no_padding=True)`"
)


def source_of(x: Any, y: Any = None, sample_weight: Any = None) -> "Source":
    """The source of the batches in `x`; `y` and `sample_weight` may be given only with arrays.

    Raises:
        TypeError: if `x` has a type on which Keras does not train.
        ValueError: if `y` or `sample_weight` is given with anything but arrays.
    """
    y = np.asarray(y) if isinstance(y, (list, tuple)) else y
    sample_weight = np.asarray(sample_weight) if isinstance(sample_weight, (list, tuple)) else sample_weight
    if isinstance(x, dict) or all(hasattr(x, name) for name in ("shape", "dtype", "__getitem__")):
        parts = dict(x) if isinstance(x, dict) else {"image": x}
        for name, part in {"label": y, "sample_weight": sample_weight, **parts}.items():
            if type(part).__name__ == "RaggedTensor":
                raise ValueError(f"`{name}` is ragged. {_UNEVEN}")
            if isinstance(part, np.ndarray) and part.dtype.kind == "O" and not is_text(part):
                raise ValueError(
                    f"`{name}` holds Python objects, of dtype object; make numbers of one type of it: "
                    f"`numpy.stack(x)`, `x.astype('int32')`. {_UNEVEN}"
                )
        return _Arrays((x, y, sample_weight))
    kinds = (
        (backend.is_tf_dataset, _Dataset),
        (lambda data: isinstance(data, keras.utils.PyDataset), _PyDataset),
        (lambda data: isinstance(data, GeneratorType), _Generator),
        (backend.is_data_loader, _Loader),
    )
    source = next((source for is_one, source in kinds if is_one(x)), None)
    if source is None:
        hint = f": `numpy.stack(x)` makes one array. {_UNEVEN}" if isinstance(x, (list, tuple)) else ""
        raise TypeError(
            "`x` must be an array, a dictionary of arrays, a tf.data.Dataset, a PyDataset, a PyTorch DataLoader or a "
            f"generator of batches; received: {type(x).__name__}{hint}"
        )
    if y is not None or sample_weight is not None:
        raise ValueError(f"`y` and `sample_weight` must be part of the batches of a {type(x).__name__}")
    return source(x)


class Source:
    """The base class of sources of batches. A subclass defines `mapped` and `first`."""

    def __init__(self, data: Any):
        self.data = data

    def mapped(self, function: Callable[[Any], Any]) -> Self:
        """The same batches after `function`, which maps arrays on the host."""
        raise NotImplementedError

    def first(self) -> Any:
        """The first batch, which is not consumed; None if there is none."""
        raise NotImplementedError

    def prepared(self, network: keras.layers.Layer) -> Self:
        """The same source, with text converted to numbers."""
        return self.mapped(Preparation(network))

    def shapes(self, codec: Codec | None = None) -> dict[str, tuple]:
        """The shapes of the inputs, {"image": (None, 32, 32, 3), ...}.

        Args:
            codec: the codec of a model that will be built for these shapes.

        Raises:
            ValueError: if there are no examples, or the rank of an input is not known; if `check_axes` rejects the
                images.
        """
        batch = self.first()
        if batch is None:
            raise ValueError(f"`x` is empty: {self._empty}")
        inputs, _ = unpack(tuple(batch) if isinstance(batch, list) else batch)
        for name, array in inputs.items():
            shape = getattr(array, "shape", None)
            if shape is None or getattr(shape, "rank", 0) is None or len(shape) == 0:
                raise ValueError(
                    f"`{name}` must be a batch of known rank; received the shape {shape}. Of single examples make "
                    "batches: `dataset.batch(32)`"
                )
        if codec is not None and "image" in inputs:
            check_axes(inputs["image"], codec)
        return {name: (None, *tuple(array.shape)[1:]) for name, array in inputs.items()}

    def check_shares(self, devices: int, size: int | None) -> None:
        """Raises a ValueError if the `devices` cannot share each batch equally, as far as is known before.

        Args:
            devices: how many.
            size: of the batches that Keras makes of arrays; None if these are one batch.
        """

    def checked(self, check: BatchCheck) -> Any:
        """The data for Keras, with `check` called on every batch; labels and weights join the dictionary of inputs."""
        return self.mapped(_Packed(check)).data


class _Packed:
    """A check whose batches have the form that Keras requires of generators; a class, so that it can be pickled."""

    def __init__(self, check: BatchCheck):
        self.check = check

    def __call__(self, batch):
        return (self.check(batch),)


class _Arrays(Source):
    """Arrays, `(x, y, sample_weight)`, which are checked as a whole."""

    _empty = "it has no example"

    def mapped(self, function):
        x, y, sample_weight = self.data
        batch = function((x, y, sample_weight))
        return _Arrays((*batch, None, None)[:3])

    def first(self):
        inputs, _ = unpack(self.data)
        return self.data if len(next(iter(inputs.values()))) else None

    def check_shares(self, devices, size):
        count = len(next(iter(unpack(self.data)[0].values())))
        size = count if size is None else min(count, size)
        backend.check_shares(size, devices)
        backend.check_shares(count % size, devices, "the last batch")

    def checked(self, check):
        check.devices = 1  # these are all batches in one
        return check(self.data)


class _Generator(Source):
    """A generator of batches."""

    _empty = "the generator yields no batch"

    def mapped(self, function):
        return _Generator(function(batch) for batch in self.data)

    def first(self):
        first = next(self.data, None)
        if first is not None:
            self.data = _chained(first, self.data)
        return first


def _chained(first: Any, rest: Iterator) -> Iterator:
    """A generator, because Keras recognises generators by their type."""
    yield from itertools.chain([first], rest)


class _PyDataset(Source):
    """A `keras.utils.PyDataset`."""

    _empty = "the PyDataset has no batch"

    def mapped(self, function):
        return _PyDataset(_MappedPyDataset(self.data, function))

    def first(self):
        return None if self.data.num_batches == 0 else self.data[0]


class _MappedPyDataset(keras.utils.PyDataset):
    def __init__(self, dataset: keras.utils.PyDataset, function: Callable):
        super().__init__(dataset.workers, dataset.use_multiprocessing, dataset.max_queue_size)
        self.dataset, self.function = dataset, function

    @property
    def num_batches(self):
        return self.dataset.num_batches

    def __getitem__(self, index):
        return self.function(self.dataset[index])

    def on_epoch_begin(self):
        self.dataset.on_epoch_begin()

    def on_epoch_end(self):
        self.dataset.on_epoch_end()


class _Loader(Source):
    """A PyTorch `DataLoader`."""

    _empty = "the DataLoader has no batch"

    def mapped(self, function):
        loader = self._copy()
        loader.collate_fn = _MappedCollation(loader.collate_fn, function)
        return _Loader(loader)

    def first(self):
        return next(iter(self._copy()), None)

    def _copy(self):
        """With workers of its own: those that persist, of `persistent_workers`, keep the collation they began with."""
        loader = copy.copy(self.data)
        loader._iterator = None
        return loader

    def check_shares(self, devices, size):
        if self.data.batch_size is not None and hasattr(self.data.dataset, "__len__"):
            backend.check_shares(self.data.batch_size, devices)
            last = 0 if self.data.drop_last else len(self.data.sampler) % self.data.batch_size
            backend.check_shares(last, devices, "the last batch")


class _MappedCollation:
    def __init__(self, collate, function: Callable):
        self.collate, self.function = collate, function

    def __call__(self, samples):
        batch = self.collate(samples)
        return backend.loader_batch(self.function(tuple(batch) if isinstance(batch, list) else batch))


class _Dataset(Source):
    """A `tf.data.Dataset`, which is mapped by graphs, and whose shapes are known without a batch."""

    _empty = "the tf.data.Dataset has no batch"

    def first(self):
        count = int(self.data.cardinality())  # below 0 if it is endless (-1) or unknown (-2)
        if count == 0 or (count == -2 and next(iter(self.data.take(1)), None) is None):
            return None
        return self.data.element_spec

    def prepared(self, network):
        """The static shapes and types of converted text are those of the null condition, or of the first batch."""
        prepare, texts = Preparation(network), []
        columns = set()

        def _row(name, value):
            return prepare.value(name, value if value.shape.rank else value[None])[0]

        def look(name, spec):
            if is_text(spec):
                texts.append(name)
            elif hasattr(prepare.layers.get(name), "rows") and spec.shape.rank == 2 and spec.shape[1] == 1:
                columns.add(name)

        prepare.mapped(self.data.element_spec, look)
        if not texts and not columns:
            return self
        nulls = {name: getattr(prepare.layers[name], "null", None) for name in texts if name in prepare.layers}
        rows = {name: np.asarray(null) for name, null in nulls.items() if null is not None}
        if rows.keys() != nulls.keys() and (first := next(iter(self.data.take(1)), None)) is not None:
            prepare.mapped(first, lambda name, v: name in nulls and rows.update({name: _row(name, v)}))

        def value(name, tensor):
            if name in columns:
                return tensor[:, 0]
            if name not in rows or not is_text(tensor) or tensor.shape.rank == 0:  # a scalar is no batch, see `shapes`
                return tensor
            shape = (tensor.shape[0], *rows[name].shape)
            return backend.on_host(lambda array: prepare.value(name, array), tensor, shape, rows[name].dtype)

        return _Dataset(self.data.map(lambda *batch: prepare.mapped(batch if len(batch) > 1 else batch[0], value)))

    def check_shares(self, devices, size):
        static = tree.flatten(self.data.element_spec)[0].shape[0]
        backend.check_shares(static or 0, devices)

    def checked(self, check):
        checked = backend.checked_dataset(self.data, check)
        return checked.map(lambda *batch: (packed(batch if len(batch) > 1 else batch[0]),))
