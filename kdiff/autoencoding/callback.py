"""Pictures of reconstructions during the training of an autoencoder."""

import os
import warnings
from pathlib import Path

import keras
import numpy as np

from kdiff import pictures
from kdiff.base import check_integer

__all__ = ["ReconstructionCallback"]


class ReconstructionCallback(keras.callbacks.Callback):
    """Writes `reconstructions-epoch-0001.png`, ... to `folder`: images above their reconstructions.

    A failure while drawing is a warning and does not stop training.

    Args:
        folder: the folder of the files, created if it does not exist.
        images: a batch, uint8 or in [-1, 1].
        every: the number of epochs between two pictures.
        columns: the number of pairs per row; None for all.
    """

    def __init__(self, folder: str | os.PathLike, images: np.ndarray, every: int = 1, columns: int | None = None):
        super().__init__()
        check_integer("ReconstructionCallback", "every", every)
        self.folder, self.images, self.every = Path(folder), np.asarray(images), every
        self.columns = columns or len(self.images)
        pictures.pillow()

    def on_epoch_end(self, epoch, logs=None):
        """Draws every `every` epochs."""
        if (epoch + 1) % self.every:
            return
        try:
            path = self.folder / f"reconstructions-epoch-{epoch + 1:04d}.png"
            pictures.save_png(path, self.pairs(), self.columns)
        except Exception as error:  # training goes on, whatever the error
            warnings.warn(f"ReconstructionCallback: no picture of epoch {epoch + 1}: {error}", stacklevel=2)

    def pairs(self) -> np.ndarray:
        """Rows of images, each followed by the row of their reconstructions."""
        made = pictures.to_uint8(self.model.reconstruct(self.images))
        given = pictures.to_uint8(self.images)
        rows = [slice(i, i + self.columns) for i in range(0, len(made), self.columns)]
        return np.concatenate([part for row in rows for part in (given[row], made[row])])
