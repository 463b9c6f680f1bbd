"""Keras' serialisation without the import of TensorFlow on other backends.

For anything but numbers, strings and nests of them it asks, through a lazy module, whether the object is from
TensorFlow. On another backend, if TensorFlow was not imported, nothing is; and its import takes seconds, and memory.
"""

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import keras

__all__ = ["serialized", "without_tensorflow"]

_LIBRARY = sys.modules.get("keras.src.saving.serialization_lib")
_LAZY = getattr(_LIBRARY, "tf", None)  # looked up once, as several threads may use it


@contextlib.contextmanager
def without_tensorflow() -> Iterator[None]:
    """A context in which Keras' serialisation does not import TensorFlow, unless it is already imported."""
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
