"""Losses between what a network answers and its target, beside Keras' own."""

import keras
from keras import ops

from kdiff.base import check_number

__all__ = ["PseudoHuber"]


@keras.saving.register_keras_serializable("kdiff.losses")
class PseudoHuber(keras.losses.Loss):
    """sqrt(|output - target|^2 + c^2) - c, of each example as a whole, for `compile(loss=PseudoHuber())`.

    Song and Dhariwal 2023, arXiv:2310.14189, section 3.3 (consistency training): it weights an example by about
    1 / |output - target|, so that a few that are far off do not decide.

    Args:
        c: where it turns from a square to a norm; None for the paper's 0.00054 sqrt(d), d the numbers of an example.
        whole: whether the norm is of the whole example; else it is of each number, and their mean is taken (latent
            consistency models, Luo et al. 2023, arXiv:2310.04378).
        kwargs: `name`, `reduction` and `dtype`.
    """

    def __init__(self, c: float | None = None, whole: bool = True, **kwargs):
        super().__init__(**{"name": "pseudo_huber", **kwargs})
        if c is not None:
            check_number("PseudoHuber", "c", c, 1e-12)
        self.c, self.whole = c, whole

    def call(self, y_true, y_pred):
        """The losses of a batch, `(batch, 1, ...)`, of one axis less than the outputs, as of Keras' losses."""
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
