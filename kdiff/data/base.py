"""What all sources of images share: the dataset before resizing, and the parts of a split."""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from kdiff.data._tensorflow import tf

__all__ = ["Source", "split_rows", "utf8"]


class Source(NamedTuple):
    """Images, with labels and captions if requested.

    Attributes:
        dataset: yields dicts with "image", `(height, width, channels)`, uint8 or float32 in [-1, 1], and optionally
            "label" and "text", one string; its cardinality is known.
        class_names: the names of integer labels, if known.
        channels: the default number of channels of the images; `None` for their own.
        in_memory: whether the images are in memory, so that caching them would gain nothing.
        mixed: a function of a seed to the dataset in an order of that seed; `None` if reading has only one order.
        mixed_well: whether each order of `mixed` is as likely as any other, so that it needs no shuffling further on.
    """

    dataset: tf.data.Dataset
    class_names: list[str] | None = None
    channels: int | None = None
    in_memory: bool = False
    mixed: Callable[[Any], tf.data.Dataset] | None = None
    mixed_well: bool = False

    @property
    def shape(self) -> tuple[int | None, ...]:
        """The shape `(height, width, channels)` of the images, `None` where it varies."""
        return tuple(self.dataset.element_spec["image"].shape)


def split_rows(split: str, rows: dict[str, np.ndarray]) -> np.ndarray:
    """The rows of `split`: a name in `rows`, or a part of one such as "train[:90%]" or "train[100:]".

    Parts are taken from one fixed random order, so that disjoint parts share no image and each contains
    every class.
    """
    match = re.fullmatch(r"(\w+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split) if isinstance(split, str) else None
    if not match or match[1] not in rows:
        raise ValueError(
            f"images: `split` must be one of {list(rows)}, or a part such as '{next(iter(rows))}[:90%]'; "
            f"received: {split!r}"
        )
    whole = rows[match[1]]
    if "[" not in split:
        return whole
    start, stop = (_position(text, len(whole)) for text in match.groups()[1:])
    return np.sort(np.random.default_rng(0).permutation(whole)[start:stop])


def _position(text: str | None, count: int) -> int | None:
    if text is None:
        return None
    return round(count * int(text[:-1]) / 100) if text.endswith("%") else int(text)


def utf8(text: Iterable[str]) -> np.ndarray:
    """Strings as an array of UTF-8 bytes."""
    return np.array([caption.encode() for caption in text], dtype=object)
