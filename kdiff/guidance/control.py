"""The scale of a ControlNet, limited to a part of the run."""

from typing import Any

import numpy as np
from keras import ops

from kdiff.denoisers import Denoiser, Estimate
from kdiff.guidance.base import Guidance, Here, Run, check_scale
from kdiff.schedules import Marginal

__all__ = ["Control"]


class Control(Guidance):
    """Applies the control image `name` with this scale at times end < t <= begin, and not at other times:

        model.sample(4, text="a hat", edges=drawing, guidance=[Control("edges", 0.8, end=0.4), ClassifierFree(7.5)])

    It multiplies the input `<name>_scale` of `networks.Controlled`. For several control images, give one each. The
    `control_guidance_start` a and `control_guidance_end` b of diffusers, which are fractions of the steps, correspond
    to `begin=1 - a` and `end=1 - b` on a uniform grid.

    Args:
        name: the name of the control image.
        scale: a number, or one per sample.
        begin, end: times in [0, 1], where 1 is noise and 0 is data; each a number, or one per sample.

    Raises:
        ValueError: if a number is out of range.
    """

    arrays = ("scale", "begin", "end")

    def __init__(self, name: str, scale: Any = 1.0, begin: Any = 1.0, end: Any = 0.0):
        check_scale("Control", scale)
        for argument, value in {"begin": begin, "end": end}.items():
            numbers = np.asarray(value, "float64")
            if numbers.ndim > 1 or not np.all((numbers >= 0) & (numbers <= 1)):
                raise ValueError(f"Control: `{argument}` must be in [0, 1], or one per sample; received: {value!r}")
        self.name, self.scale, self.begin, self.end = name, scale, begin, end

    def rows(self, run: Run):
        """The scale, begin and end of each sample."""
        return {name: run.rows(self, name, getattr(self, name), ()) for name in self.arrays}

    def guide(self, denoise: Denoiser, x, m: Marginal, here: Here) -> Estimate:
        rows, name = here.rows, f"{self.name}_scale"
        t = ops.minimum(m.t, 1.0)  # churn goes beyond 1
        inside = ops.logical_and(t > rows["end"], t <= rows["begin"])
        scale = rows["scale"] * ops.cast(inside, "float32")
        given = denoise.conditions.get(name)
        if given is not None:
            scale = given * ops.reshape(scale, (-1, *[1] * (len(given.shape) - 1)))
        conditions = {**denoise.conditions, name: scale}
        estimate = Denoiser(denoise.answer, denoise.given._replace(conditions=conditions), denoise.nulls)(x, m)
        return estimate.guided(estimate.x_hat)
