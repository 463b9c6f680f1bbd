"""Reconstructions that show how an autoencoder learns."""

import os
import warnings
from pathlib import Path

import keras
import numpy as np

from kdiff import pictures
from kdiff.base import check_integer

__all__ = ["ReconstructionCallback"]


class ReconstructionCallback(keras.callbacks.Callback):
    """Leaves `reconstructions-epoch-0001.png`, ... in `folder`: images above what the autoencoder makes of them.

    A failure while it draws is a warning; it never stops training.

    Args:
        folder: where the files go; made if it is not there.
        images: a batch, uint8 or in [-1, 1].
        every: how many epochs lie between two pictures.
        columns: pairs in a row; None for all of them.
    """

    def __init__(self, folder: str | os.PathLike, images: np.ndarray, every: int = 1, columns: int | None = None):
        super().__init__()
        check_integer("ReconstructionCallback", "every", every)
        self.folder, self.images, self.every = Path(folder), np.asarray(images), every
        self.columns = columns or len(self.images)
        pictures.pillow()

    def on_epoch_end(self, epoch, logs=None):
        """Draws, if it is time."""
        if (epoch + 1) % self.every:
            return
        try:
            path = self.folder / f"reconstructions-epoch-{epoch + 1:04d}.png"
            pictures.save_png(path, self.pairs(), self.columns)
        except Exception as error:  # whatever it is, training is worth more
            warnings.warn(f"ReconstructionCallback: no picture of epoch {epoch + 1}: {error}", stacklevel=2)

    def pairs(self) -> np.ndarray:
        """Rows of images, each followed by the row of what is made of them."""
        made = pictures.to_uint8(self.model.reconstruct(self.images))
        given = pictures.to_uint8(self.images)
        rows = [slice(i, i + self.columns) for i in range(0, len(made), self.columns)]
        return np.concatenate([part for row in rows for part in (given[row], made[row])])
