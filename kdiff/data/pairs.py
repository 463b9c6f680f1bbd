"""Arrays of examples in files of `tf.data`, such as the pairs of `kdiff.reflow`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from kdiff.base import check_integer
from kdiff.data._tensorflow import tf

__all__ = ["load_pairs", "save_pairs"]


def save_pairs(pairs: Mapping[str, Any], folder: Any) -> None:
    """Writes arrays of examples, {"encoded": ..., "noise": ..., ...}, as a folder of `tf.data.Dataset.save`.

    Args:
        pairs: arrays by name, with one row per example.
        folder: the folder, which is replaced if it exists.

    Raises:
        ValueError: if the arrays differ in the number of rows.
    """
    arrays = {name: np.asarray(value) for name, value in pairs.items()}
    if len({len(value) for value in arrays.values()}) != 1:
        shapes = {name: value.shape for name, value in arrays.items()}
        raise ValueError(f"save_pairs: all arrays must have the same number of rows; received: {shapes}")
    tf.data.Dataset.from_tensor_slices(arrays).save(str(folder))


def load_pairs(folder: Any, batch_size: int = 64, shuffle: int | None = 10_000, seed: int = 0) -> tf.data.Dataset:
    """The batches of a folder written by `save_pairs`, for `fit`.

    Args:
        folder: the folder.
        batch_size: the number of examples per batch; a smaller last batch is dropped.
        shuffle: the size of the shuffle buffer, with a new order in each pass; None for the order of the file.
        seed: for the order.

    Raises:
        ValueError: if there are fewer examples than a batch has.
    """
    check_integer("load_pairs", "batch_size", batch_size)
    dataset = tf.data.Dataset.load(str(folder))
    if 0 <= (count := int(dataset.cardinality())) < batch_size:
        raise ValueError(
            f"load_pairs: `batch_size` is {batch_size}, but there are only {count} examples, less than one batch"
        )
    if shuffle is not None:
        check_integer("load_pairs", "shuffle", shuffle)
        dataset = dataset.shuffle(shuffle, seed=seed)
    return dataset.batch(batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
