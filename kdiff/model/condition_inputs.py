"""The conditions of a network, as `fit` and `sample` are given them: which there are, and their rows of numbers.

A network says which conditions it takes by an attribute `conditions`, names or, as kdiff's own, layers by name. A layer
makes numbers of text (`prepare`), says what stands for no condition (`null`), and refuses what it does not take
(`check`).
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from kdiff.checks import as_numpy, is_integer, value_range
from kdiff.text import is_text

__all__ = [
    "Preparation",
    "check_values",
    "condition_layers",
    "condition_names",
    "condition_nulls",
    "condition_rows",
    "derivations",
    "fits",
    "optional_names",
    "words",
]


def condition_names(network: keras.layers.Layer) -> tuple[str, ...] | None:
    """The conditions that the network takes; None if it does not say."""
    if isinstance(network, keras.Model) and isinstance(getattr(network, "input", None), dict):
        return tuple(name for name in network.input if name not in ("image", "time"))
    inputs = getattr(network, "condition_inputs", None)
    if inputs is not None:
        return tuple(name for name, one in inputs.items() if not one.optional)
    names = getattr(network, "conditions", None)
    return None if names is None else tuple(names)


def optional_names(network: keras.layers.Layer) -> tuple[str, ...]:
    """The inputs that the network takes and can do without, such as the level of an image that is noised."""
    return tuple(name for name, one in getattr(network, "condition_inputs", {}).items() if one.optional)


def derivations(network: keras.layers.Layer) -> dict[str, Any]:
    """What makes an input of the clean batch, where training is not given it, by its name: `of(x, key)`."""
    inputs = getattr(network, "condition_inputs", {})
    return {name: one.of for name, one in inputs.items() if one.of is not None}


def condition_layers(network: keras.layers.Layer) -> dict[str, Any]:
    """What knows the null of each condition, and how to prepare and check it, by the condition's name in the input.

    It is the layer in the network's dictionary `conditions`, unless the network says more by `condition_inputs`.
    """
    inputs = getattr(network, "condition_inputs", None)
    if inputs is not None:
        return {name: one.part for name, one in inputs.items()}
    layers = getattr(network, "conditions", None)
    return dict(layers) if isinstance(layers, Mapping) else {}


def condition_nulls(network: keras.layers.Layer) -> dict[str, np.ndarray]:
    """The row that stands for no condition, by the name of each condition whose layer has one."""
    nulls = {name: getattr(layer, "null", None) for name, layer in condition_layers(network).items()}
    return {name: null for name, null in nulls.items() if null is not None}


def condition_rows(
    conditions: dict[str, Any],
    shapes: dict[str, tuple],
    network: keras.layers.Layer,
    num_samples: int,
    partial: bool = False,
    arguments: Sequence[str] = (),
    sizes: tuple[int, ...] | None = None,
) -> dict[str, np.ndarray]:
    """Each condition as numbers, one row a sample; one value for all is repeated, and None is no condition.

    Args:
        conditions: the values by name.
        shapes: the shape of one row of each condition that there must be.
        network: what the conditions are for.
        num_samples: the number of rows.
        partial: whether some may be missing.
        arguments: what else the caller takes by name, of which an unknown condition may be a misspelling.
        sizes: of a sample, from which layers with a method `default` make a condition that is missing.

    Raises:
        ValueError: if a condition is missing, unknown, of another shape, or holds what its layer does not take; if it
            is None, and nothing stands for no condition.
    """
    optional, layers = optional_names(network), condition_layers(network)
    for name in set(shapes) - set(conditions) if sizes is not None else ():
        if hasattr(layers.get(name), "default"):
            conditions = {**conditions, name: layers[name].default(sizes)}
    if (missing := set(shapes) - set(conditions) - set(optional)) and not partial:
        raise ValueError(f"sample: the model needs the conditions {sorted(shapes)}; missing: {sorted(missing)}")
    shapes = {**dict.fromkeys(optional), **shapes}
    if extra := set(conditions) - set(shapes):
        wanted = [_ELSEWHERE.get(name, name) for name in sorted(extra)]
        known = [name for name in (*shapes, *arguments) if name not in extra]
        close = [near for name in wanted for near in difflib.get_close_matches(name, known, 1)]
        hint = f". Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"sample: the model takes the conditions {sorted(shapes)}; received: {sorted(extra)}{hint}")
    preparation, nulls = Preparation(network), condition_nulls(network)
    rows = {}
    for name, shape in shapes.items():
        if name not in conditions:
            continue
        value = _known(name, conditions[name], nulls, preparation)
        if shape is None:  # of an optional input: one number, or a row a sample
            shape = value.shape[1:]
        if getattr(layers.get(name), "any_size", False):
            shape = (*[None] * (len(shape) - 1), *shape[-1:])
        if value.ndim == len(shape):
            value = np.broadcast_to(value, (num_samples, *value.shape))
        if not fits(value.shape, (num_samples, *shape)):
            wanted = words((num_samples, *shape))
            raise ValueError(f"sample: `{name}` must have {num_samples} rows, ({wanted}); received: {value.shape}")
        check_values(name, value, preparation.layers.get(name))
        rows[name] = value.astype("int32") if value.dtype.kind in "iu" else value.astype("float32")
    return rows


# What other libraries call the arguments of `sample`.
_ELSEWHERE = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "cfg_scale": "guidance",
    "generator": "seed",
    "scheduler": "sampler",
    "solver": "sampler",
    "mask_image": "mask",
    "prompt": "text",
    "class_labels": "label",
}


def _known(name: str, value: Any, nulls: dict[str, np.ndarray], preparation: "Preparation") -> np.ndarray:
    """A condition of `sample` as an array: None is the null, and one string is one row, not a batch of one."""
    if value is None and name not in nulls:
        raise ValueError(
            f"sample: `{name}` cannot be None, for nothing stands for no condition: give its layer a `dropout` above "
            f"0, such as LabelEmbedding(10, dropout=0.1). Those that can: {sorted(nulls)}"
        )
    if value is None:
        return np.asarray(nulls[name])
    if is_text(value) and np.ndim(value) == 0:
        return np.asarray(preparation.value(name, np.atleast_1d(value)))[0]
    return np.asarray(preparation.value(name, value))


def check_values(name: str, values: Any, layer: Any) -> None:
    """Raises a ValueError for rows of a condition that are not finite, or that its layer does not take.

    Rows of NaN are absent where the layer's null is NaN.
    """
    if not is_integer(values) and not np.all(np.isfinite(value_range(values))):
        null = getattr(layer, "null", None)
        values = as_numpy(values)
        present = values[~np.isnan(values.reshape(len(values), -1)).all(axis=1)]
        if null is None or not np.isnan(null).all() or not np.isfinite(present).all():
            raise ValueError(f"`{name}` must be finite; received a batch that holds NaN or infinity")
    if hasattr(layer, "check"):
        layer.check(as_numpy(values))


class Preparation:
    """Makes numbers of the text in data, by the method `prepare` of the layer that is to take it.

    Args:
        network: whose layers these are. What it has no such layer for is left as it is.

    Attributes:
        layers: the layers of the conditions by name.
    """

    def __init__(self, network: keras.layers.Layer):
        self.layers = condition_layers(network)

    def __call__(self, data: Any) -> Any:
        """A batch without text."""
        return self.mapped(data, self.value)

    def value(self, name: str, value: Any) -> Any:
        """The values of one condition as an array, if they are text.

        Raises:
            ValueError: if its layer takes no text.
        """
        layer = self.layers.get(name)
        if isinstance(value, (list, tuple)) and not is_text(value):
            value = np.asarray(value)
        if not is_text(value):
            return layer.rows(value) if hasattr(layer, "rows") and hasattr(value, "shape") else value
        if not hasattr(layer, "prepare"):
            return np.asarray(value) if isinstance(value, (list, tuple)) else value
        value = layer.prepare(value)
        if is_text(value):
            raise ValueError(
                f"`{name}` is text, and its layer, {type(layer).__name__}, takes numbers; text is for a layer such as "
                "TextEncoder. Of the names of classes take `numpy.unique(names, return_inverse=True)[1]`"
            )
        return value

    @staticmethod
    def mapped(data: Any, function: Callable[[str, Any], Any]) -> Any:
        """`function(name, value)` of each part of a batch, and of labels in second place, by the name "label"."""
        if isinstance(data, dict):
            return {name: function(name, value) for name, value in data.items()}
        if not isinstance(data, (tuple, list)) or not data:
            return data
        x, *rest = data
        label = [function("label", y) for y in rest[:1]]
        return (Preparation.mapped(x, function), *label, *rest[1:])


def fits(shape: tuple, wanted: tuple) -> bool:
    """Whether the shapes agree; None is any length."""
    return len(shape) == len(wanted) and all(
        None in pair or pair[0] == pair[1] for pair in zip(shape, wanted, strict=True)
    )


def words(shape: tuple) -> str:
    """A shape for a message."""
    return ", ".join("any" if size is None else str(size) for size in shape)
