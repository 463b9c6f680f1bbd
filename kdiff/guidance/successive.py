"""Guidance by several conditions, each with its own scale, which are dropped one after the other."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from kdiff.denoisers import Denoiser, Estimate
from kdiff.guidance.base import Guidance, Here, Run, check_scale, over
from kdiff.schedules import Marginal

__all__ = ["Successive"]


class Successive(Guidance):
    """Classifier-free guidance by several conditions (Brooks et al. 2022, "InstructPix2Pix", arXiv:2211.09800, eq. 3):

        x_hat = x_n + scale_n (x_{n-1} - x_n) + ... + scale_1 (x_0 - x_1),

    where x_0 is the estimate under all conditions, x_1 without the first of `scales`, x_2 without the first two, and so
    on, all evaluated in one batch. InstructPix2Pix uses `Successive({"text": 7.5, "source": 1.5})`. With a single name
    it is `ClassifierFree(scale, drop=(name,))`.

    Args:
        scales: the scales by the names of the conditions, in the order in which these are dropped; 1 is off. Each is
            one number, or one per sample.
        negative: negative conditions by name, used instead of the null condition, such as `{"text": "blurry"}`.

    Raises:
        ValueError: if there is no scale, or one is not finite; if `negative` has a condition without a scale; in a run,
            if a condition cannot be dropped.
    """

    arrays = ("scales", "negative")

    def __init__(self, scales: Mapping[str, Any], negative: Mapping[str, Any] | None = None):
        if not isinstance(scales, Mapping) or not scales:
            raise ValueError(
                f'Successive: `scales` must be numbers by name, such as {{"text": 7.5, "source": 1.5}}; '
                f"received: {scales!r}"
            )
        for scale in scales.values():
            check_scale("Successive", scale)
        if negative is not None and (not isinstance(negative, Mapping) or set(negative) - set(scales)):
            raise ValueError(
                f"Successive: `negative` must be conditions by name, of {list(scales)}; received: {negative!r}"
            )
        self.scales = dict(scales)
        self.negative = negative

    @property
    def active(self) -> bool:
        """Whether any scale differs from 1."""
        return any(np.any(np.asarray(scale) != 1.0) for scale in self.scales.values())

    def key(self) -> tuple:
        """The class and the order of the names."""
        return (type(self), *self.scales)

    def rows(self, run: Run):
        """The scales and the negative conditions of each sample."""
        scales = {name: run.rows(self, f"scales[{name!r}]", scale, ()) for name, scale in self.scales.items()}
        if self.negative is None:
            return {"scales": scales}
        if run.conditions is None:
            raise ValueError("Successive: `negative` needs a model that has conditions")
        return {"scales": scales, "negative": run.conditions(self.negative)}

    def guide(self, denoise: Denoiser, x, m: Marginal, here: Here) -> Estimate:
        negative, names = here.rows.get("negative", {}), tuple(self.scales)
        left_out = [names[: count + 1] for count in range(len(names))]
        asked = [
            denoise.unconditional(
                [n for n in some if n not in negative], {n: negative[n] for n in some if n in negative}
            )
            for some in left_out
        ]
        answers = denoise.batched(x, m, denoise.conditions, *asked)
        x_hat = answers[-1].x_hat
        for name, more, less in zip(names, answers[:-1], answers[1:], strict=True):
            x_hat = x_hat + over(here.rows["scales"][name], x) * (more.x_hat - less.x_hat)
        return answers[0].guided(x_hat)
