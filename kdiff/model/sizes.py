"""Shapes: those of the network's inputs, from the data, and that of a sample, from the arguments of `sample`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kdiff.base import check_integer
from kdiff.codecs import Codec
from kdiff.model import feeding
from kdiff.model.condition_inputs import derivations, fits, words

__all__ = ["Sizes"]


class Sizes:
    """The part of `DiffusionModel` that determines shapes; it needs `shapes`, `codec`, `network` and `objective`."""

    def _known_shapes(self, shapes) -> tuple[dict[str, tuple], tuple | None]:
        """The shapes of encoded data, as "image", and of the conditions; and that of an example, if it is known."""
        shapes = dict(shapes) if isinstance(shapes, dict) else {"image": shapes}
        shapes = {n: (None, *tuple(shape)[1:]) for n, shape in shapes.items() if n not in self.objective.inputs}
        self._check_names(set(shapes) - {"image", "encoded"})
        data = (None, *feeding.data_shape(shapes, self.codec))
        made = {name: of for name, of in derivations(self.network).items() if name not in shapes}
        if made and None in data[1:]:
            raise ValueError(
                f"DiffusionModel: {sorted(made)} are derived from the data, whose shape must be known; received: "
                f"{data}. Give them in the data, or build the model for one size"
            )
        conditions = {n: shape for n, shape in shapes.items() if n not in ("image", "encoded")}
        conditions |= {name: (None, *of.output_shape(data[1:])) for name, of in made.items()}
        plain = data[1:] if type(self.codec).data_shape is Codec.data_shape else None
        return {"image": data, **conditions}, shapes["image"][1:] if "image" in shapes else plain

    def _sample_shape(self, given: dict[str, Any]) -> tuple[int, ...]:
        """The shape of one encoded sample; free axes are determined by the given arguments."""
        if not self.built:
            raise ValueError("sample: the model has no weights yet; train it, load it, or call `build`")
        shape = self.shapes["image"][1:]
        if given and getattr(self.network, "any_size", False):
            shape = (*[None] * (len(shape) - 1), shape[-1])
        if None in shape or "size" in given:
            for name, value in given.items():
                shape = self._sized(name, value, shape)
        if None in shape:
            raise ValueError(
                f"sample: the model was built for data of any size, ({words(shape)}): give `height` and `width`, or "
                "`size`, or an initial `image`, `x` or `noise`"
            )
        return shape

    def _sized(self, name: str, value: Any, shape: tuple) -> tuple:
        """The shape of one sample, with its free axes determined by this argument."""
        if name == "size":
            known = [self._size_of_data(value)]
        elif name in ("x", "noise"):
            known = [np.shape(value)[-len(shape) :]]
        else:  # examples, one or several
            known = [self._data_shape(np.shape(value)[first:]) for first in (0, 1)]
        fitting = [one for one in known if one is not None and fits(one, shape)]
        if not fitting:
            raise ValueError(
                f"sample: this model is for data of the shape ({words(shape)}), and `{name}` cannot be "
                f"{value if name == 'size' else f'of the shape {np.shape(value)}'}"
            )
        return fitting[0]

    def _data_shape(self, shape: tuple) -> tuple | None:
        """The shape of the encoded data; None if examples cannot have this shape."""
        try:
            return tuple(self.codec.data_shape(tuple(shape)))
        except ValueError:
            return None

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether the model takes examples of this shape, where some networks take any size."""
        wanted = self.shapes["image"][1:]
        if getattr(self.network, "any_size", False):
            wanted = (*[None] * (len(wanted) - 1), wanted[-1])
        data = self._data_shape(tuple(shape))
        return data is not None and fits(data, wanted)

    def _size_of_data(self, size: Sequence[int]) -> tuple | None:
        """The shape of encoded data for examples of this size."""
        size = tuple(size) if isinstance(size, (list, tuple, np.ndarray)) else (size,)
        for one in size:
            check_integer("sample", "size", one)
        if self.example is None:
            raise ValueError(
                f"sample: the model was built for encoded data, and its codec, {self.codec!r}, changes the size: "
                "instead of `size` give a `noise` with the shape of encoded data"
            )
        return self._data_shape((*size, self.example[-1]))
