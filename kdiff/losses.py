"""Losses between the output of a network and its target, in addition to those of Keras."""

import keras
from keras import ops

from kdiff.base import check_number

__all__ = ["PseudoHuber"]


@keras.saving.register_keras_serializable("kdiff.losses")
class PseudoHuber(keras.losses.Loss):
    """The pseudo-Huber loss sqrt(|output - target|^2 + c^2) - c per example, for `compile(loss=PseudoHuber())`.

    Song and Dhariwal 2023, arXiv:2310.14189, section 3.3 (consistency training): it weights an example by about
    1 / |output - target|, and so is less sensitive to outliers.

    Args:
        c: the transition from quadratic to linear; None: the paper's 0.00054 sqrt(d), for d elements per example.
        whole: whether the norm is that of the whole example; otherwise the loss is computed per element and averaged
            (latent consistency models, Luo et al. 2023, arXiv:2310.04378).
        kwargs: `name`, `reduction` and `dtype`.
    """

    def __init__(self, c: float | None = None, whole: bool = True, **kwargs):
        super().__init__(**{"name": "pseudo_huber", **kwargs})
        if c is not None:
            check_number("PseudoHuber", "c", c, 1e-12)
        self.c, self.whole = c, whole

    def call(self, y_true, y_pred):
        """The losses of a batch, `(batch, 1, ...)`, with one axis less than the outputs, as for losses of Keras."""
        axes, dimension = tuple(range(1, len(y_pred.shape))), 1
        for size in ops.shape(y_pred)[1:]:
            dimension = dimension * size
        c = 0.00054 * ops.sqrt(ops.cast(dimension, "float32")) if self.c is None else self.c
        if not self.whole:
            return ops.mean(ops.sqrt(ops.square(y_pred - y_true) + c**2) - c, axis=-1)
        size = ops.sum(ops.square(y_pred - y_true), axis=axes)
        return ops.reshape(ops.sqrt(size + c**2) - c, (-1, *[1] * (len(axes) - 1)))

    def get_config(self):
        """The constructor's arguments."""
        return {**super().get_config(), "c": self.c, "whole": self.whole}
