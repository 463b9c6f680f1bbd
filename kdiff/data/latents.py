"""Encoding of images by a codec, once, inside a `tf.data` pipeline, with latents sampled in every epoch.

image -> (mean, std), and again of its mirror image, in float16 -> cache -> mean + std noise, from one of the two
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from kdiff import backend
from kdiff.data._tensorflow import tf

__all__ = ["IMAGES", "check_codec", "drawn", "encoded"]

IMAGES = 32  # encoded at once


def check_codec(codec: Any, augment: Any, flips: bool) -> None:
    """Raises a TypeError if `codec` is not a codec, a ValueError for arguments that do not fit it."""
    if codec is None and flips:
        raise ValueError(
            "images: `flips` needs a `codec`; without one use `augment=keras.layers.RandomFlip('horizontal')`"
        )
    if codec is not None and not (hasattr(codec, "encode") and hasattr(codec, "freeze")):
        raise TypeError(f"images: `codec` must be a codec of `kdiff.codecs`; received: {codec!r}")
    if codec is not None and augment:
        raise ValueError(
            "images: with a `codec` images are encoded once, before `augment`; use `flips=True` to mirror some"
        )


def encoded(dataset: tf.data.Dataset, codec: Any, flips: bool) -> tf.data.Dataset:
    """Elements with "image" replaced by "latents": float16, (copies, moments, ...).

    There are two copies with `flips`, and two moments, mean and standard deviation, if the codec is stochastic.
    """
    codec.freeze()
    moments = backend.without_gradients(_moments(codec, flips))
    first = moments(_filled(next(dataset.take(1).batch(1).as_numpy_iterator())["image"]))
    shape = tuple(first.shape)[1:]

    def encode(images: np.ndarray) -> np.ndarray:
        made = keras.ops.convert_to_numpy(moments(_filled(images)))[: len(images)]
        with np.errstate(over="ignore"):
            made = made.astype("float16")
        if not np.isfinite(made).all():
            raise ValueError("images: `codec` returns values that overflow float16; use a smaller scale")
        return made

    def encode_batch(batch: dict) -> dict:
        images = tf.cast(batch["image"], tf.float32) / 127.5 - 1
        latents = tf.numpy_function(encode, [images], tf.float16)
        others = {name: value for name, value in batch.items() if name != "image"}
        return {**others, "latents": tf.ensure_shape(latents, (None, *shape))}

    count = dataset.cardinality()  # which `unbatch` loses
    return dataset.batch(IMAGES).map(encode_batch).unbatch().apply(tf.data.experimental.assert_cardinality(count))


def _moments(codec, flips: bool) -> Callable:
    """A function of images to (images, copies, moments, ...)."""

    def moments(images):
        mean, std = codec.moments(images) if hasattr(codec, "moments") else (codec.encode(images), None)
        return keras.ops.stack([mean] if std is None else [mean, std], axis=1)

    def both(images):
        copies = [images, keras.ops.flip(images, axis=-2)] if flips else [images]
        return keras.ops.stack([moments(one) for one in copies], axis=1)

    return both


def _filled(images: np.ndarray) -> np.ndarray:
    """Pads to a fixed number of images, as each other number would be recompiled."""
    return np.asarray(images, "float32")[np.minimum(np.arange(IMAGES), len(images) - 1)]


def drawn(seed: int | None) -> Callable[[dict], dict]:
    """A function of batches: "latents" replaced by "encoded", sampled anew in each call."""
    generator = tf.random.Generator.from_non_deterministic_state() if seed is None else _generator(seed)

    def draw(batch: dict) -> dict:
        latents = tf.cast(batch["latents"], tf.float32)
        rows, copies, _, *shape = tf.unstack(tf.shape(latents), latents.shape.rank)
        copy = generator.uniform((rows,), 0, copies, tf.int32)
        latents = tf.gather(latents, copy, axis=1, batch_dims=1)
        x = latents[:, 0]
        if latents.shape[1] == 2:
            x = x + latents[:, 1] * generator.normal(tf.stack([rows, *shape]))
        return {**{name: value for name, value in batch.items() if name != "latents"}, "encoded": x}

    return draw


def _generator(seed: int) -> tf.random.Generator:
    return tf.random.Generator.from_seed(int(np.random.SeedSequence([seed, 1]).generate_state(1)[0]))
