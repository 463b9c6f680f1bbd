"""Data of TensorFlow and PyTorch, accepted on every backend."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from keras import tree

from kdiff.backend.running import BACKEND

__all__ = [
    "checked_dataset",
    "dataset_parts",
    "is_data_loader",
    "is_tf_dataset",
    "leave_accelerator",
    "loader_batch",
    "on_host",
    "torch_file",
]


def leave_accelerator(tf: Any) -> None:
    """Hides accelerators from TensorFlow if it only prepares batches for JAX or PyTorch."""
    if BACKEND != "tensorflow":
        with contextlib.suppress(RuntimeError):  # its devices are already initialised, by the user's choice
            tf.config.set_visible_devices([], "GPU")


def is_tf_dataset(data: Any) -> bool:
    """Whether `data` is a `tf.data.Dataset`; without importing TensorFlow."""
    tf = sys.modules.get("tensorflow")
    return tf is not None and hasattr(tf, "data") and isinstance(data, tf.data.Dataset)


def dataset_parts(dataset: Any) -> Iterator[Any]:
    """A `tf.data.Dataset` and the datasets from which it was built."""
    yield dataset
    for part in dataset._inputs():
        yield from dataset_parts(part)


def is_data_loader(data: Any) -> bool:
    """Whether `data` is a `torch.utils.data.DataLoader`; without importing PyTorch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(data, torch.utils.data.DataLoader)


def checked_dataset(dataset: Any, check: Callable[[Any], None]) -> Any:
    """A `tf.data.Dataset` that calls `check` on each element, as NumPy arrays, before yielding it."""
    import tensorflow as tf

    def checked(*element):
        element = element if len(element) > 1 else element[0]

        def run(*arrays):
            check(tree.pack_sequence_as(element, list(arrays)))
            return np.int32(0)

        done = tf.numpy_function(run, tree.flatten(element), tf.int32, stateful=True)
        with tf.control_dependencies([done]):
            return tree.map_structure(tf.identity, element)

    return dataset.map(checked)


def loader_batch(batch: Any) -> Any:
    """A batch of a PyTorch `DataLoader`, with tensors instead of NumPy arrays, as Keras requires."""
    import torch

    def tensor(value):
        return torch.from_numpy(value) if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" else value

    return tree.map_structure(tensor, batch)


def on_host(function: Callable[[np.ndarray], np.ndarray], tensor: Any, shape: tuple, dtype: Any) -> Any:
    """`function(tensor)`, on NumPy arrays, as a step of a `tf.data.Dataset`; its shape and type must be given."""
    import tensorflow as tf

    result = tf.numpy_function(function, [tensor], tf.as_dtype(dtype), stateful=False)
    return tf.ensure_shape(result, shape)


def torch_file(path: Any) -> Any:
    """What PyTorch reads of a file of its own, if that has only tensors in containers.

    Raises:
        ModuleNotFoundError: without PyTorch.
        pickle.UnpicklingError: if there is anything else in the file.
    """
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)
