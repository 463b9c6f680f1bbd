"""Arrays of examples in a file of `tf.data`, such as the pairs of `kdiff.reflow`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from kdiff.base import check_integer
from kdiff.data._tensorflow import tf

__all__ = ["load_pairs", "save_pairs"]


def save_pairs(pairs: Mapping[str, Any], folder: Any) -> None:
    """Writes arrays of examples, {"encoded": ..., "noise": ..., ...}, as a folder of `tf.data.Dataset.save`.

    Args:
        pairs: arrays by name, with one row an example.
        folder: where; what stands there is replaced.

    Raises:
        ValueError: if the arrays have not one number of rows.
    """
    arrays = {name: np.asarray(value) for name, value in pairs.items()}
    if len({len(value) for value in arrays.values()}) != 1:
        shapes = {name: value.shape for name, value in arrays.items()}
        raise ValueError(f"save_pairs: all arrays must have as many rows; received: {shapes}")
    tf.data.Dataset.from_tensor_slices(arrays).save(str(folder))


def load_pairs(folder: Any, batch_size: int = 64, shuffle: int | None = 10_000, seed: int = 0) -> tf.data.Dataset:
    """The batches of what `save_pairs` wrote, for `fit`.

    Args:
        folder: where it is.
        batch_size: of the batches; a last one of fewer examples is left out.
        shuffle: how many examples the order is drawn among, anew in each pass; None for the order of the file.
        seed: of the order.
    """
    check_integer("load_pairs", "batch_size", batch_size)
    dataset = tf.data.Dataset.load(str(folder))
    if shuffle is not None:
        check_integer("load_pairs", "shuffle", shuffle)
        dataset = dataset.shuffle(shuffle, seed=seed)
    return dataset.batch(batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
