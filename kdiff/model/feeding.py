"""The input data of `fit` and `evaluate`: every batch is checked, and becomes one dictionary.

Examples come alone, as a pair with labels, or in a dictionary with named conditions; as arrays, `tf.data.Dataset`,
`keras.utils.PyDataset`, PyTorch `DataLoader` or generator. All become one dictionary, {"image": ..., "label": ...}, or
{"encoded": ..., ...} for examples that the codec has already encoded. Every batch is checked before the model sees it,
so that a bad batch raises an error instead of ruining the network.
"""

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import keras
import numpy as np

from kdiff import backend
from kdiff.checks import as_numpy, check_byte_order, check_examples, is_integer, value_range
from kdiff.codecs import Codec, Pixels
from kdiff.model.condition_inputs import (
    check_values,
    condition_layers,
    condition_names,
    derivations,
    fits,
    optional_names,
    words,
)
from kdiff.text import is_text

__all__ = [
    "ENDLESS",
    "LOOKED_AT",
    "BatchCheck",
    "Orders",
    "check_axes",
    "check_end",
    "data_shape",
    "packed",
    "unpack",
]

ENDLESS = -1  # the cardinality of an endless `tf.data.Dataset`
LOOKED_AT = 8  # batches on an accelerator whose numbers are looked at, the first


def unpack(data: Any) -> tuple[dict[str, Any], Any]:
    """(inputs, sample_weight) from x, (x,), (x, y) or (x, y, sample_weight), where x is an image or a dictionary.

    Labels in second place become the condition "label". "sample_weight" may also be in the dictionary.

    Raises:
        ValueError: if there is neither "image" nor "encoded", or both, or if labels are given twice.
    """
    x, label, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    inputs = dict(x) if isinstance(x, dict) else {"image": x}
    sample_weight = inputs.pop("sample_weight", sample_weight)
    if absent := sorted(name for name, value in inputs.items() if value is None):
        raise ValueError(f"data: {absent} must be arrays; received None")
    if ("image" in inputs) == ("encoded" in inputs):
        raise ValueError(
            "data: a dictionary must have an 'image', or 'encoded' data in its place, and not both; received the keys "
            f"{sorted(inputs)}"
        )
    if label is not None and "label" in inputs:
        raise ValueError("data: labels are given twice, as `y` and as 'label' in the dictionary")
    return inputs if label is None else {**inputs, "label": label}, sample_weight


def packed(data: Any) -> dict[str, Any]:
    """The batch in one dictionary, including sample weights, which Keras drops if there is no `y`."""
    inputs, sample_weight = unpack(data)
    return inputs if sample_weight is None else {**inputs, "sample_weight": sample_weight}


def data_shape(shapes: dict[str, tuple], codec: Codec) -> tuple:
    """The shape of one example of encoded data, from the shapes of the inputs.

    Raises:
        ValueError: if the codec does not take such an image.
    """
    return tuple(shapes["encoded"][1:]) if "encoded" in shapes else tuple(codec.data_shape(tuple(shapes["image"][1:])))


def check_end(data: Any, argument: str, options: Mapping[str, Any]) -> None:
    """Raises a ValueError for an endless `tf.data.Dataset`, unless the options set this number of steps."""
    if backend.is_tf_dataset(data) and int(data.cardinality()) == ENDLESS and options.get(argument) is None:
        raise ValueError(
            f"data: the tf.data.Dataset is endless, as after `repeat()`; say when to stop: `{argument}=...`"
        )


def check_axes(image: Any, codec: Codec) -> None:
    """Raises a ValueError for what looks like images with channels first, or like one image instead of a batch.

    A model that is already built for such shapes accepts them.
    """
    shape = tuple(image.shape)
    if not isinstance(codec, Pixels) or None in shape[1:]:
        return
    few = (1, 3, 4)
    if len(shape) == 4 and shape[1] in few and min(shape[2:]) > 4:
        raise ValueError(
            f"`image` of the shape {shape} looks like pictures with channels first; kdiff's are (batch, height, width, "
            "channels): `numpy.moveaxis(x, 1, -1)`. If it is right, call `model.build(shape)` before"
        )
    if len(shape) == 3 and shape[2] not in few and (is_integer(image) or shape[1] == shape[2]):
        raise ValueError(
            f"`image` of the shape {shape} looks like grey pictures without an axis of channels; kdiff's are (batch, "
            "height, width, channels): `x[..., None]`. If it is right, call `model.build(shape)` before"
        )
    if len(shape) == 3 and shape[0] == shape[1] and shape[2] in few:
        raise ValueError(
            f"`image` of the shape {shape} looks like one picture; batches are (batch, height, width, channels): "
            "`dataset.batch(32)`. If it is right, call `model.build(shape)` before"
        )


class Orders:
    """The orders of the `kdiff.data` pipelines of which the data consists."""

    def __init__(self, *data: Any):
        parts = [part for one in data if backend.is_tf_dataset(one) for part in backend.dataset_parts(one)]
        self.orders = [part.order for part in parts if hasattr(part, "order")]

    @property
    def passes(self) -> list[int]:
        """The number of passes begun over each. Set it to that of another process to continue where it stopped."""
        return [order.passes for order in self.orders]

    @passes.setter
    def passes(self, passes: Sequence[int]) -> None:
        for order, count in zip(self.orders, passes, strict=False):
            order.passes = int(count)


class BatchCheck:
    """Checks a batch, and raises a ValueError that says what is wrong with it.

    Of batches that lie on an accelerator, the numbers of the first `LOOKED_AT` alone are looked at, and then names and
    sizes.

    Args:
        codec: the codec of the images.
        shape: the shape of one encoded example, with None for an axis of any length.
        network: the network whose conditions the batch must hold.
        weighted: whether examples may have weights.
        others: the names of other inputs that it may hold.

    Attributes:
        error: the last error that was raised; tf.data hides it in an error of its own.
        devices: how many devices must be able to share a batch equally.
    """

    def __init__(
        self,
        codec: Codec,
        shape: tuple,
        network: keras.layers.Layer,
        weighted: bool = True,
        others: Sequence[str] = (),
    ):
        self.codec, self.shape, self.weighted = codec, tuple(shape), weighted
        self.conditions, self.layers = condition_names(network), condition_layers(network)
        self.optional, self.derived = {*optional_names(network), *others}, set(derivations(network))
        self.error: ValueError | None = None
        self.devices = 1
        self.warned = False
        self.looked = 0  # how many batches' numbers were looked at

    def again(self) -> Self:
        """The same check, of other data."""
        other = copy.copy(self)
        other.looked = 0
        return other

    def __call__(self, data: Any) -> dict[str, Any]:
        """Checks a batch and returns it in one dictionary."""
        try:
            inputs, weight = unpack(data)
            self.names(inputs)
            for name, value in {**inputs, "sample_weight": weight}.items():
                check_byte_order(name, value)
            self.size({name: tuple(value.shape) for name, value in inputs.items()})
            name = "image" if "image" in inputs else "encoded"
            examples = inputs[name]
            backend.check_shares(len(examples), self.devices)
            if self.looked >= LOOKED_AT and any(map(backend.is_away, inputs.values())):
                return packed(data)  # the accelerator would wait for the host
            self.looked += 1
            self.numbers(name, examples)
            for name, condition in inputs.items():
                self.condition(name, condition, len(examples))
            if weight is not None:
                encoded = examples.shape[1:] if name == "encoded" else self.codec.data_shape(tuple(examples.shape[1:]))
                self.weight(weight, len(examples), tuple(encoded[:-1]))
        except ValueError as error:
            self.error = error
            raise
        return packed(data)

    @contextlib.contextmanager
    def reported(self) -> Iterator[None]:
        """Raises the error of the check if tf.data has hidden it in an error of its own."""
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
        given = set(inputs) - {"image", "encoded"}
        if missing := set(self.conditions) - given - self.derived:
            extra = sorted(given - set(self.conditions) - self.optional)
            instead = f"; received {extra} in their place" if extra else ""
            raise ValueError(
                f"data: the network takes the conditions {sorted(self.conditions)}; missing: {sorted(missing)}{instead}"
                ". Give dictionaries such as {'image': ..., 'label': ...}, or labels as `y`."
            )
        if extra := given - set(self.conditions) - self.optional:
            raise ValueError(f"data: the network takes no {sorted(extra)}; it takes {sorted(self.conditions)}")

    def size(self, shapes: dict[str, tuple]) -> None:
        """The image, or encoded data, must have the right shape."""
        name = "image" if "image" in shapes else "encoded"
        if len(shapes[name]) and fits(data_shape(shapes, self.codec), self.shape):
            return
        encoded = (
            " when it is encoded" if name == "image" and type(self.codec).data_shape is not Codec.data_shape else ""
        )
        raise ValueError(
            f"`{name}` must have the shape (batch, {words(self.shape)}){encoded}; received: {tuple(shapes[name])}"
        )

    def numbers(self, name: str, examples: Any) -> None:
        """The image, or encoded data, must be finite and in range."""
        if not len(examples):
            raise ValueError(f"`{name}` is a batch without examples, of the shape {tuple(examples.shape)}")
        if name == "encoded" and is_integer(examples):
            raise ValueError(f"`encoded` must be floating-point numbers; received {examples.dtype}")
        check_examples(examples, None if name == "encoded" else self.codec.limit, name)
        if name == "image" and isinstance(self.codec, Pixels) and not is_integer(examples) and not self.warned:
            low, high = value_range(examples)
            if low >= 0 and 0 < high <= 1:
                warnings.warn(
                    f"The pixels of `image` are all in [{low:.3g}, {high:.3g}]; black is -1 here. If they are in "
                    "[0, 1], scale them, 2 * x - 1, or give uint8.",
                    stacklevel=2,
                )
                self.warned = True

    def weight(self, weight: Any, batch: int, positions: tuple[int, ...]) -> None:
        """The sample weights must be one number per example, or per position of it, finite and not negative."""
        if not self.weighted:
            raise ValueError(
                "`sample_weight`: the loss of this model is of a batch as a whole; examples have no weights"
            )
        shapes = dict.fromkeys([(batch,), (batch, *positions)])
        if not all(hasattr(weight, name) for name in ("shape", "dtype")) or tuple(weight.shape) not in shapes:
            received = getattr(weight, "shape", type(weight).__name__)
            position = f", or {(batch, *positions)}, a number a position" if positions else ""
            raise ValueError(
                f"`sample_weight` must have the shape ({batch},), a number an example{position}; received: {received}"
            )
        if is_text(weight) or not all(np.isfinite(value_range(weight))) or value_range(weight)[0] < 0:
            raise ValueError("`sample_weight` must be finite numbers that are not negative")

    def condition(self, name: str, condition: Any, batch: int) -> None:
        """A condition must belong to the same examples, be finite, and not hold the class of the null condition."""
        if not len(condition.shape) or len(condition) != batch:
            raise ValueError(f"`{name}` must have {batch} rows, as `image` has; received the shape {condition.shape}")
        layer = self.layers.get(name)
        check_values(name, condition, layer)
        null = getattr(layer, "null", None)
        if null is not None and np.ndim(null) == 0 and np.any(as_numpy(condition) == null):
            raise ValueError(
                f"`{name}` holds {null}, which stands for none; classes are 0..{null - 1}: subtract 1 if yours begin "
                "at 1"
            )
