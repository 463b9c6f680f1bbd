"""Reflow: a flow is straightened by learning anew from where it led."""

from collections.abc import Iterator, Mapping
from typing import Any

from kdiff.objectives.denoising import Denoising

__all__ = ["Reflow"]


class Reflow(Denoising):
    """Denoising where each example has noise of its own (Liu et al. 2022, arXiv:2209.03003, algorithm 1):

        x_t = alpha x + sigma noise,    (noise, x) a pair, x where a model led from this noise.

    The pairs are made by `reflow.pairs`: data with a part "noise", of the shape of encoded data. Between the two of a
    pair the new flow goes nearly straight, so few steps will do, one even. With data that has no "noise" it is
    `Denoising`. To learn the one step alone (the paper's distillation), take times near 1, such as `PowerLaw`.
    """

    inputs = ("noise",)

    def problem(self, model: Any, x, conditions: Mapping[str, Any], keys: Iterator, training: bool):
        conditions = dict(conditions)
        return self.problem_of(model, x, conditions.pop("noise", None), conditions, keys, training)
