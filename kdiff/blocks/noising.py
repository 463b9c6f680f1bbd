"""Noise conditioning augmentation: conditions with a noise level and noise, drawn in training and given otherwise."""

import keras
import numpy as np
from keras import ops

from kdiff import deprecated, random
from kdiff.base import check_number
from kdiff.blocks.conditions import Condition, Input

__all__ = ["AUGMENTING", "LEVELS", "Noising"]

LEVELS, AUGMENTING = 5, 6  # streams of random numbers, distinct from that of `Condition`


class Noising(Condition):
    """The base of noised conditions: noise conditioning augmentation (Ho et al., "Cascaded Diffusion Models",
    2021, section 4).

    Args:
        noise: the forward process, a layer called as `noise(x, noise, level)`, such as `kdiff.schedules.Cosine()`; None
            for no noise.
        max_level: the highest level in training, at most 1: levels are drawn from U(0, max_level), one per example, as
            a function of `seed` and the number of the call.
        level: the level where none is given.
        dropout, seed: as in `Condition`.
    """

    main = ""  # the key of the noised input, in the dictionary with which the layer is called

    @deprecated.arguments(highest="max_level")
    def __init__(
        self,
        noise: keras.layers.Layer | None = None,
        max_level: float = 1.0,
        level: float = 0.1,
        dropout: float = 0.0,
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(dropout, seed, **kwargs)
        owner = type(self).__name__
        check_number(owner, "max_level", max_level, 0, 1)
        check_number(owner, "level", level, 0, 1)
        if not (noise is None or isinstance(noise, keras.layers.Layer)):
            raise TypeError(
                f"{owner}: `noise` must be None or a layer, noise({self.main}, noise, level); received: {noise!r}"
            )
        self.noise = noise
        self.max_level = max_level
        self.level = level

    @property
    def by_row(self) -> bool:
        """Whether a row of the output depends on the same row of the inputs alone, and not on its number."""
        return self.noise is None

    def inputs_of(self, name: str) -> dict[str, Input]:
        """The noised input and, with `noise`, the optional level and noise."""
        if self.noise is None:
            return {name: Input(None, self)}
        others = {"level": _Level(type(self).__name__), "noise": None}
        others = {f"{name}_{key}": Input(key, part, True) for key, part in others.items()}
        return {name: Input(self.main, self), **others}

    def _key_of_call(self, training):
        """(seed, number of the call) in training, if anything is drawn; otherwise a constant."""
        drawn = training and (self.dropout > 0 or self.noise is not None)
        return self._next() if drawn else ops.convert_to_tensor([self.seed, 0], "int32")

    def _level_of(self, given, batch, key, training):
        if given.get("level") is not None:
            return ops.cast(given["level"], "float32")
        if training:
            return self.max_level * random.uniform(random.fold_in(random.on_device(key, batch), 0, LEVELS), (batch,))
        return ops.full((batch,), self.level, "float32")

    def _noised(self, given, x, level, key):
        noise = given.get("noise")
        if noise is None:
            key = random.on_device(key, ops.shape(x)[0])
            noise = random.normal(random.fold_in(key, 0, AUGMENTING), ops.shape(x))
        return self.noise(x, ops.cast(noise, "float32"), level)


class _Level:
    """The check of a level."""

    def __init__(self, owner: str):
        self.owner = owner

    def check(self, values) -> None:
        if not np.all((values >= 0) & (values <= 1)):
            raise ValueError(f"{self.owner}: a level must be a number in [0, 1]; received: {values}")
