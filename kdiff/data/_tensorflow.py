"""The one import of TensorFlow, for `tf.data` and TensorBoard on every backend."""

from kdiff import backend

try:
    import tensorflow as tf
except ImportError as error:
    raise ImportError(
        'TensorFlow makes the tf.data pipelines and TensorBoard logs of every backend: pip install "kdiff[data]"'
    ) from error

backend.leave_accelerator(tf)

__all__ = ["tf"]
