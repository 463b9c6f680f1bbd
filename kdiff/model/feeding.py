"""What `fit` and `evaluate` are given: unpacked into named tensors, and checked before any work is lost.

Examples come alone, as a pair with labels, or in a dictionary with named conditions; as arrays, `tf.data.Dataset`,
`keras.utils.PyDataset`, PyTorch `DataLoader` or generator. All become one dictionary, {"image": ..., "label": ...}.
Text becomes what the network's layer for it takes. Every batch is looked at on its way to the model, so that one bad
batch is an error and not a ruined network.
"""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from types import GeneratorType
from typing import Any

import keras
import numpy as np

from kdiff import backend
from kdiff.model.condition_inputs import (
    Preparation,
    check_values,
    condition_layers,
    condition_names,
    fits,
    is_integer,
    value_range,
    words,
)
from kdiff.text import is_text

# Images that went through floating-point resizing may pass 1 by a rounding error.
TOLERANCE = 1e-3


def unpack(data: Any) -> tuple[dict[str, Any], Any]:
    """(inputs, sample_weight) from x, (x,), (x, y) or (x, y, sample_weight), where x is an image or a dictionary.

    Labels in second place become the condition "label". "sample_weight" may also stand in the dictionary.

    Raises:
        ValueError: if there is no "image", or if labels are given twice.
    """
    x, label, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    inputs = dict(x) if isinstance(x, dict) else {"image": x}
    sample_weight = inputs.pop("sample_weight", sample_weight)
    if "image" not in inputs:
        raise ValueError(f"data: a dictionary must have an 'image'; received the keys {sorted(inputs)}")
    if label is not None and "label" in inputs:
        raise ValueError("data: labels are given twice, as `y` and as 'label' in the dictionary")
    return inputs if label is None else {**inputs, "label": label}, sample_weight


def packed(data: Any) -> tuple[dict[str, Any]]:
    """The batch in one dictionary, sample weights included: Keras drops those where there is no `y`."""
    inputs, sample_weight = unpack(data)
    return (inputs,) if sample_weight is None else ({**inputs, "sample_weight": sample_weight},)


def prepared(x: Any, y: Any, network: keras.layers.Layer) -> tuple[Any, Any]:
    """The data and the labels with numbers in place of text, on their way."""
    prepare = Preparation(network)
    if _is_array(x) or isinstance(x, dict):
        return prepare((x, y)) if y is not None else (prepare(x), None)
    if backend.is_tf_dataset(x):
        return _prepared_dataset(x, prepare), y
    if isinstance(x, keras.utils.PyDataset):
        return _MappedPyDataset(x, prepare), y
    if isinstance(x, GeneratorType):
        return (prepare(batch) for batch in x), y
    if backend.is_data_loader(x):
        return _mapped_loader(x, prepare), y
    return x, y


def _prepared_dataset(dataset: Any, prepare: Preparation) -> Any:
    """A tf.data.Dataset without strings: static shapes and types are those of a null, or of the first batch."""
    texts = []
    prepare.mapped(dataset.element_spec, lambda name, spec: is_text(spec) and texts.append(name))
    nulls = {name: getattr(prepare.layers[name], "null", None) for name in texts if name in prepare.layers}
    rows = {name: np.asarray(null) for name, null in nulls.items() if null is not None}
    if rows.keys() != nulls.keys() and (first := next(iter(dataset.take(1)), None)) is not None:
        prepare.mapped(first, lambda name, value: name in nulls and rows.update({name: prepare.value(name, value)[0]}))

    def value(name, tensor):
        if name not in rows or not is_text(tensor):
            return tensor
        shape = (tensor.shape[0], *rows[name].shape)
        return backend.on_host(lambda array: prepare.value(name, array), tensor, shape, rows[name].dtype)

    return (
        dataset.map(lambda *batch: prepare.mapped(batch if len(batch) > 1 else batch[0], value)) if texts else dataset
    )


class BatchCheck:
    """Looks at a batch and raises a ValueError that names what is wrong with it.

    Args:
        shape: the shape of one example, with None for an axis of any length.
        limit: the largest magnitude of floating-point examples; None if any will do.
        network: whose conditions the batch must hold.

    Attributes:
        error: what was raised last: tf.data hides it in an error of its own.
    """

    def __init__(self, shape: tuple, limit: float | None, network: keras.layers.Layer):
        self.shape, self.limit = shape, limit
        self.conditions, self.layers = condition_names(network), condition_layers(network)
        self.error: ValueError | None = None

    def __call__(self, data: Any) -> Any:
        """Checks a batch and returns it."""
        try:
            inputs, _ = unpack(data)
            self.names(inputs)
            self.size(inputs["image"].shape)
            self.image(inputs["image"])
            for name, condition in inputs.items():
                self.condition(name, condition, len(inputs["image"]))
        except ValueError as error:
            self.error = error
            raise
        return data

    @contextlib.contextmanager
    def reported(self) -> Iterator[None]:
        """Raises what the check had to say, where tf.data has hidden it in an error of its own."""
        try:
            yield
        except Exception as error:
            if self.error is not None and self.error is not error and str(self.error) in str(error):
                raise self.error from None
            raise

    def names(self, inputs: dict[str, Any]) -> None:
        """The conditions must be those that the network takes."""
        if self.conditions is None:
            return
        given = set(inputs) - {"image"}
        if missing := set(self.conditions) - given:
            raise ValueError(
                f"data: the network takes the conditions {sorted(self.conditions)}; missing: {sorted(missing)}. "
                "Give dictionaries such as {'image': ..., 'label': ...}, or labels as `y`."
            )
        if extra := given - set(self.conditions):
            raise ValueError(f"data: the network takes no {sorted(extra)}; it takes {sorted(self.conditions)}")

    def size(self, shape: tuple) -> None:
        """The image must have the right shape."""
        if not fits(tuple(shape), (None, *self.shape)):
            raise ValueError(f"`image` must have the shape (batch, {words(self.shape)}); received: {tuple(shape)}")

    def image(self, image: Any) -> None:
        """The image must be finite and in range."""
        if "bool" in str(image.dtype):
            raise ValueError("`image` must be uint8, or floating-point numbers; received truth values")
        low, high = value_range(image)
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError("`image` must be finite; received a batch that holds NaN or infinity")
        if self.limit is None:
            return
        if is_integer(image):
            if low < 0 or high > 255:
                raise ValueError(f"`image` of whole numbers must be in 0..255; received {low} to {high}")
        elif max(-low, high) > self.limit + TOLERANCE:
            raise ValueError(
                f"`image` of floating-point numbers must be in [{-self.limit}, {self.limit}]; "
                f"received {low} to {high}. Scale it, x / 127.5 - 1 for 0..255, or give it as uint8."
            )

    def condition(self, name: str, condition: Any, batch: int) -> None:
        """A condition must belong to the same examples, and be finite."""
        if not len(condition.shape) or len(condition) != batch:
            raise ValueError(f"`{name}` must have {batch} rows, as `image` has; received the shape {condition.shape}")
        check_values(name, condition, self.layers.get(name))


def look(x: Any, y: Any = None) -> tuple[dict[str, tuple], Any]:
    """The shapes of a batch's inputs, {"image": (None, 32, 32, 3), ...}, and the data, none of it lost by the look.

    Raises:
        ValueError: if there is nothing in it.
        TypeError: if it is of no type that Keras trains on.
    """
    if backend.is_tf_dataset(x):
        count = int(x.cardinality())  # below 0 if it is endless (-1) or not known (-2)
        if count == 0 or (count == -2 and next(iter(x.take(1)), None) is None):
            raise ValueError("`x` is empty: the tf.data.Dataset has no batch")
        return _shapes(x.element_spec), x
    if isinstance(x, keras.utils.PyDataset):
        if x.num_batches == 0:
            raise ValueError("`x` is empty: the PyDataset has no batch")
        return _shapes(x[0]), x
    if isinstance(x, GeneratorType):
        first = next(x, None)
        if first is None:
            raise ValueError("`x` is empty: the generator yields no batch")
        return _shapes(first), _chained(first, x)
    if _is_array(x) or isinstance(x, dict):
        inputs, _ = unpack((x,) if y is None else (x, y))
        if len(inputs["image"]) == 0:
            raise ValueError("`x` is empty: it has no example")
        return _shapes(inputs), x
    if backend.is_data_loader(x):
        first = next(iter(copy.copy(x)), None)  # a copy: workers that persist would keep the loader's own collation
        if first is None:
            raise ValueError("`x` is empty: the DataLoader has no batch")
        return _shapes(first), x
    raise TypeError(
        "`x` must be an array, a dictionary of arrays, a tf.data.Dataset, a PyDataset, a PyTorch DataLoader or a "
        f"generator of batches; received: {type(x).__name__}"
    )


def _chained(first: Any, rest: Iterator) -> Iterator:
    """A generator again, as Keras tells generators by their type."""
    yield from itertools.chain([first], rest)


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype") and hasattr(x, "__getitem__")


def _shapes(data: Any) -> dict[str, tuple]:
    inputs, _ = unpack(tuple(data) if isinstance(data, list) else data)
    for name, array in inputs.items():
        if array.shape is None or len(array.shape) == 0 or (hasattr(array.shape, "rank") and array.shape.rank is None):
            raise ValueError(f"`{name}` must be a batch of known rank; received the shape {array.shape}")
    return {name: (None, *tuple(array.shape)[1:]) for name, array in inputs.items()}


def checked(x: Any, y: Any, sample_weight: Any, check: BatchCheck) -> Any:
    """The same data, with `check` called on every batch; arrays are checked as a whole.

    Labels and weights are put beside the images, in the dictionary: Keras calls the model on x alone.
    """
    if _is_array(x) or isinstance(x, dict):
        return packed(check((x, y, sample_weight)))[0]
    if y is not None or sample_weight is not None:
        raise ValueError(f"`y` and `sample_weight` must be part of the batches of a {type(x).__name__}")
    if backend.is_tf_dataset(x):
        return backend.checked_dataset(x, check).map(lambda *batch: packed(batch if len(batch) > 1 else batch[0]))
    if isinstance(x, keras.utils.PyDataset):
        return _MappedPyDataset(x, _Checked(check))
    if backend.is_data_loader(x):
        return _mapped_loader(x, _Checked(check))
    return (packed(check(batch)) for batch in x)


class _Checked:
    """`packed(check(batch))`; this and the next are classes, so that worker processes can receive them."""

    def __init__(self, check: BatchCheck):
        self.check = check

    def __call__(self, batch):
        return packed(self.check(batch))


class _MappedCollation:
    """A PyTorch collation, and a function of its batches."""

    def __init__(self, collate, function: Callable):
        self.collate, self.function = collate, function

    def __call__(self, samples):
        batch = self.collate(samples)
        return backend.loader_batch(self.function(tuple(batch) if isinstance(batch, list) else batch))


def _mapped_loader(loader: Any, function: Callable) -> Any:
    loader = copy.copy(loader)
    loader.collate_fn = _MappedCollation(loader.collate_fn, function)
    return loader


class _MappedPyDataset(keras.utils.PyDataset):
    """A PyDataset, and a function of its batches."""

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
