"""Augmentation inside `tf.data.map`, whatever the Keras backend."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from kdiff.data._tensorflow import tf

__all__ = ["apply", "steps"]


def steps(augment: Any) -> list[Callable]:
    """`augment` as a flat list: a layer, a callable, a `Sequential`, a `Pipeline`, or a list of these.

    Raises:
        ValueError: if a part is not callable.
    """
    if augment is None:
        return []
    if isinstance(augment, (keras.Sequential, keras.layers.Pipeline)):
        augment = augment.layers
    if isinstance(augment, (list, tuple)):
        return [step for part in augment for step in steps(part)]
    if not callable(augment):
        raise ValueError(f"images: `augment` takes Keras layers, callables, or a list of them; received: {augment!r}")
    return [augment]


def apply(step: Callable, image: tf.Tensor) -> tf.Tensor:
    """One step on one float32 image in [0, 255], with shape `(height, width, channels)`."""
    if not isinstance(step, keras.layers.Layer):
        return tf.cast(step(image), tf.float32)
    output = step(image, training=True) if _runs_in_tensorflow(step) else _apply_eagerly(step, image)
    return tf.cast(output, tf.float32)


def _runs_in_tensorflow(layer: keras.layers.Layer) -> bool:
    """Whether a layer uses TensorFlow inside tf.data on every backend.

    Preprocessing layers of Keras and keras-cv do, by switching their `backend` attribute.
    """
    return hasattr(layer, "backend") or any(c.__module__.startswith("keras_cv.") for c in type(layer).__mro__)


def _apply_eagerly(layer: keras.layers.Layer, image: tf.Tensor) -> tf.Tensor:
    """Runs any other layer outside the graph, on its own backend; it must keep the shape of the image."""

    def call(image: np.ndarray) -> np.ndarray:
        output = layer(keras.ops.convert_to_tensor(image[None]), training=True)
        return keras.ops.convert_to_numpy(output)[0].astype("float32")

    return tf.ensure_shape(tf.numpy_function(call, [image], tf.float32), image.shape)
