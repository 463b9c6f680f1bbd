"""The one import of TensorFlow, for `tf.data` and TensorBoard on every backend."""

import contextlib

import keras

try:
    import tensorflow as tf
except ImportError as error:
    raise ImportError(
        'TensorFlow makes the tf.data pipelines and TensorBoard logs of every backend: pip install "kdiff[data]"'
    ) from error

if keras.backend.backend() != "tensorflow":
    # Beside JAX or PyTorch, TensorFlow only prepares batches on the CPU: it must not reserve the accelerator's memory.
    with contextlib.suppress(RuntimeError):  # the user started TensorFlow's devices before, and keeps the choice
        tf.config.set_visible_devices([], "GPU")

__all__ = ["tf"]
