"""Keras' serialisation, which imports TensorFlow where it is installed, on every backend.

It asks of anything but numbers, texts and nests of them whether it is of TensorFlow, by its own lazy module. On another
backend, and where nobody has imported TensorFlow, nothing is; and its import takes seconds, and memory.
"""

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import keras

__all__ = ["serialized", "without_tensorflow"]

_LIBRARY = sys.modules.get("keras.src.saving.serialization_lib")
_LAZY = getattr(_LIBRARY, "tf", None)  # looked up once: two threads may be in such blocks


@contextlib.contextmanager
def without_tensorflow() -> Iterator[None]:
    """Has Keras' serialisation in the block do without TensorFlow, unless it was imported already."""
    if "tensorflow" in sys.modules or _LAZY is None:
        yield
        return
    _LIBRARY.tf = SimpleNamespace(available=False)
    try:
        yield
    finally:
        _LIBRARY.tf = _LAZY


def serialized(value: Any) -> Any:
    """`keras.saving.serialize_keras_object(value)`."""
    with without_tensorflow():
        return keras.saving.serialize_keras_object(value)
