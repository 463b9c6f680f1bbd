"""DiffusionModel: a schedule, a prediction and a network, trained with `fit` and sampled with `sample`."""

from kdiff.model.base import DiffusionModel

__all__ = ["DiffusionModel"]
