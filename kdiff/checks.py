"""The check of input examples, which are arrays of any backend, before anything is computed from them."""

from typing import Any

import numpy as np
from keras import ops

__all__ = [
    "TOLERANCE",
    "as_numpy",
    "check_byte_order",
    "check_examples",
    "is_integer",
    "like_bytes",
    "value_range",
]

# Images that went through floating-point resizing may exceed 1 by a rounding error.
TOLERANCE = 1e-3


def as_numpy(array: Any) -> np.ndarray:
    """An array of any backend as a NumPy array."""
    return array if isinstance(array, np.ndarray) else ops.convert_to_numpy(array)


def is_integer(array: Any) -> bool:
    """Whether an array holds integers or booleans."""
    return any(kind in str(array.dtype) for kind in ("int", "bool"))


def value_range(array: Any) -> tuple[float, float]:
    """The smallest and the largest number; (0, 0) for text and for empty arrays."""
    if str(array.dtype) in ("object", "string") or str(array.dtype).startswith(("<U", ">U", "|S")):
        return 0.0, 0.0
    array = as_numpy(array)
    return (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)


def like_bytes(array: Any) -> bool:
    """Whether numbers look like images in 0 ... 255: none is below 0, and some are well above 1."""
    low, high = value_range(array)
    return low >= 0.0 and high > 1.5


def check_byte_order(name: str, value: Any) -> None:
    """Raises a ValueError for numbers whose bytes the backends would read in the wrong order."""
    if isinstance(value, np.ndarray) and not value.dtype.isnative:
        raise ValueError(
            f"`{name}` has the type {value.dtype}, in the byte order of another machine: "
            "x.astype(x.dtype.newbyteorder('='))"
        )


def check_examples(examples: Any, limit: float | None, name: str = "image") -> None:
    """Checks examples that a codec will encode.

    Args:
        examples: an array, with shape `(batch, ...)`.
        limit: the largest magnitude that floating-point examples may have; None: any.
        name: the name of the examples in messages.

    Raises:
        ValueError: if they are booleans, of another byte order, not finite, or out of range.
    """
    check_byte_order(name, examples)
    if "bool" in str(examples.dtype):
        raise ValueError(f"`{name}` must be uint8, or floating-point numbers; received {examples.dtype}")
    low, high = value_range(examples)
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"`{name}` must be finite; received a batch that holds NaN or infinity")
    if limit is None:
        return
    if is_integer(examples):
        if low < 0 or high > 255:
            raise ValueError(f"`{name}` of whole numbers must be in 0..255; received {low} to {high}")
    elif max(-low, high) > limit + TOLERANCE:
        raise ValueError(
            f"`{name}` of floating-point numbers must be in [-{limit}, {limit}]; received {low} to {high}. "
            "Scale it, x / 127.5 - 1 for 0..255, or give it as uint8."
        )
