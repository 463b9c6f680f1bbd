"""The conditions of a network, as passed to `fit` and `sample`: their names, and their conversion to numbers.

The attribute `conditions` of a network lists the conditions that it takes: names or, as in kdiff's networks, layers by
name. A layer converts text to numbers (`prepare`), defines the null condition (`null`), and rejects invalid values
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
    """The conditions that the network takes; None if it does not list them."""
    if isinstance(network, keras.Model) and isinstance(getattr(network, "input", None), dict):
        return tuple(name for name in network.input if name not in ("image", "time"))
    inputs = getattr(network, "condition_inputs", None)
    if inputs is not None:
        return tuple(name for name, one in inputs.items() if not one.optional)
    names = getattr(network, "conditions", None)
    return None if names is None else tuple(names)


def optional_names(network: keras.layers.Layer) -> tuple[str, ...]:
    """The optional inputs of the network, such as the noise level of a noised image."""
    return tuple(name for name, one in getattr(network, "condition_inputs", {}).items() if one.optional)


def derivations(network: keras.layers.Layer) -> dict[str, Any]:
    """The functions `of(x, key)`, by name, that derive inputs from the clean batch if training is not given them."""
    inputs = getattr(network, "condition_inputs", {})
    return {name: one.of for name, one in inputs.items() if one.of is not None}


def condition_layers(network: keras.layers.Layer) -> dict[str, Any]:
    """The objects that prepare and check each condition and define its null, by the condition's name in the input.

    These are the layers in the network's dictionary `conditions`, unless the network defines `condition_inputs`.
    """
    inputs = getattr(network, "condition_inputs", None)
    if inputs is not None:
        return {name: one.part for name, one in inputs.items()}
    layers = getattr(network, "conditions", None)
    return dict(layers) if isinstance(layers, Mapping) else {}


def condition_nulls(network: keras.layers.Layer) -> dict[str, np.ndarray]:
    """The row of the null condition, by the name of each condition whose layer defines one."""
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
    """Each condition as numbers, one row per sample; one value for all is repeated, and None is the null condition.

    Args:
        conditions: the values by name.
        shapes: the shape of one row of each required condition.
        network: the network that takes the conditions.
        num_samples: the number of rows.
        partial: whether conditions may be missing.
        arguments: the names of the caller's other arguments, of which an unknown condition may be a misspelling.
        sizes: the size of a sample, from which layers with a method `default` derive a missing condition.

    Raises:
        ValueError: if a condition is missing, unknown, of another shape, or invalid for its layer; if it is None and
            its layer defines no null.
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
        if shape is None:  # an optional input: one number, or one row per sample
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


# The names in other libraries of the arguments of `sample`.
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
    """Raises a ValueError for rows of a condition that are not finite, or that its layer rejects.

    A row of NaN is the null condition if the layer's null is NaN.
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
    """Converts the text in data to numbers, by the method `prepare` of the layer that takes it.

    Args:
        network: the network with these layers. Data without such a layer is left unchanged.

    Attributes:
        layers: the layers of the conditions by name.
    """

    def __init__(self, network: keras.layers.Layer):
        self.layers = condition_layers(network)

    def __call__(self, data: Any) -> Any:
        """The batch, with its text converted to numbers."""
        return self.mapped(data, self.value)

    def value(self, name: str, value: Any) -> Any:
        """The values of one condition; text is converted to an array of numbers.

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
        """Applies `function(name, value)` to each part of a batch; labels, in second place, have the name "label"."""
        if isinstance(data, dict):
            return {name: function(name, value) for name, value in data.items()}
        if not isinstance(data, (tuple, list)) or not data:
            return data
        x, *rest = data
        label = [function("label", y) for y in rest[:1]]
        return (Preparation.mapped(x, function), *label, *rest[1:])


def fits(shape: tuple, wanted: tuple) -> bool:
    """Whether the shapes agree, where None is any length."""
    return len(shape) == len(wanted) and all(
        None in pair or pair[0] == pair[1] for pair in zip(shape, wanted, strict=True)
    )


def words(shape: tuple) -> str:
    """A shape, formatted for a message."""
    return ", ".join("any" if size is None else str(size) for size in shape)
