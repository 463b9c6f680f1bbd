"""Encoding of text inside a `tf.data` pipeline, in batches."""

from collections.abc import Callable

import numpy as np

from kdiff.data._tensorflow import tf

__all__ = ["TEXTS", "encoded"]

TEXTS = 256  # encoded at once


def encoded(dataset: tf.data.Dataset, encoder: Callable[[list[str]], np.ndarray]) -> tf.data.Dataset:
    """Elements with the strings in "text" replaced by the rows of `encoder`.

    The encoder is called here for the first element, to find the shape of a row, and for all when they are read.

    Raises:
        ValueError: if it does not return one row of numbers per text.
    """
    first = next(dataset.take(1).as_numpy_iterator())["text"]
    row = _rows(encoder, [first])[0]

    def encode(texts: np.ndarray) -> np.ndarray:
        rows = _rows(encoder, texts)
        if rows.shape[1:] != row.shape or rows.dtype != row.dtype:
            raise ValueError(
                f"images: `text_encoder` must return rows of one shape; received {rows.dtype} of {rows.shape[1:]}, "
                f"after {row.dtype} of {row.shape}; a tokenizer must pad to one length"
            )
        return rows

    def encode_batch(batch: dict) -> dict:
        rows = tf.numpy_function(
            encode, [batch["text"]], row.dtype
        )  # not `stateful=False`, which would allow concurrent calls
        return {**batch, "text": tf.ensure_shape(rows, (None, *row.shape))}

    count = dataset.cardinality()  # which `unbatch` loses
    return dataset.batch(TEXTS).map(encode_batch).unbatch().apply(tf.data.experimental.assert_cardinality(count))


def _rows(encoder: Callable, texts: list[bytes] | np.ndarray) -> np.ndarray:
    """The output of the encoder for UTF-8 texts, as int32 or float32."""
    rows = np.asarray(encoder([text.decode() for text in texts]))
    if rows.ndim == 0 or len(rows) != len(texts) or rows.dtype.kind not in "iuf":
        raise ValueError(
            f"images: `text_encoder` must return an array with one row for each of {len(texts)} texts; "
            f"received: {rows.dtype} of the shape {rows.shape}"
        )
    return rows.astype("float32" if rows.dtype.kind == "f" else "int32")
