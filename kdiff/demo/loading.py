"""The models that the page shows."""

import zipfile
from pathlib import Path

import keras

from kdiff.interop import diffusers
from kdiff.model import DiffusionModel

__all__ = ["check_model", "load"]


def load(path: str | Path) -> DiffusionModel:
    """The model in a file that `model.save` wrote, or in a folder that diffusers wrote.

    Raises:
        ValueError: if there is no such file, it cannot be read, or holds no model of pictures.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder")
    try:
        model = diffusers.load(path) if path.is_dir() else keras.saving.load_model(path)
    except (KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: this model cannot be loaded: {error}") from error
    check_model(str(path), model)
    return model


def check_model(name: str, model: object) -> None:
    """Raises a ValueError unless this is a built `DiffusionModel` of pictures."""
    if not isinstance(model, DiffusionModel):
        raise ValueError(f"{name}: the page shows a DiffusionModel; this is of the type {type(model).__name__}")
    shape = model.example if model.built else None
    if shape is None or len(shape) != 3 or shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"{name}: the page shows built models of pictures, (height, width, channels); this has: {shape}"
        )
