"""Text to numbers inside a `tf.data` pipeline, many texts at a time."""

from collections.abc import Callable

import numpy as np

from kdiff.data._tensorflow import tf

__all__ = ["TEXTS", "encoded"]

TEXTS = 256  # that are encoded at once


def encoded(dataset: tf.data.Dataset, encoder: Callable[[list[str]], np.ndarray]) -> tf.data.Dataset:
    """Elements with the rows of `encoder` in place of the strings in "text".

    The encoder is called for the first element here, for the shape of a row, and for all when they are read.

    Raises:
        ValueError: if it does not give one row of numbers a text.
    """
    first = next(dataset.take(1).as_numpy_iterator())["text"]
    row = _rows(encoder, [first])[0]

    def encode(texts: np.ndarray) -> np.ndarray:
        rows = _rows(encoder, texts)
        if rows.shape[1:] != row.shape or rows.dtype != row.dtype:
            raise ValueError(
                f"images: `text_encoder` must give rows alike; received {rows.dtype} of the shape {rows.shape[1:]}, "
                f"and before {row.dtype} of the shape {row.shape}; a tokenizer must fill up to one length"
            )
        return rows

    def encode_batch(batch: dict) -> dict:
        rows = tf.numpy_function(encode, [batch["text"]], row.dtype)  # not `stateful=False`: calls would run at once
        return {**batch, "text": tf.ensure_shape(rows, (None, *row.shape))}

    count = dataset.cardinality()  # which unbatch forgets
    return dataset.batch(TEXTS).map(encode_batch).unbatch().apply(tf.data.experimental.assert_cardinality(count))


def _rows(encoder: Callable, texts: list[bytes] | np.ndarray) -> np.ndarray:
    """What the encoder makes of UTF-8 texts, as int32 or float32."""
    rows = np.asarray(encoder([text.decode() for text in texts]))
    if rows.ndim == 0 or len(rows) != len(texts) or rows.dtype.kind not in "iuf":
        raise ValueError(
            f"images: `text_encoder` must give an array of numbers with one row for each of {len(texts)} texts; "
            f"received: {rows.dtype} of the shape {rows.shape}"
        )
    return rows.astype("float32" if rows.dtype.kind == "f" else "int32")
