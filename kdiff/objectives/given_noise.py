"""Reflow: a flow is straightened by training on pairs of its noise and data."""

from collections.abc import Iterator, Mapping
from typing import Any

from kdiff.objectives.denoising import Denoising

__all__ = ["Reflow"]


class Reflow(Denoising):
    """Denoising with given noise for each example (Liu et al. 2022, arXiv:2209.03003, algorithm 1):

        x_t = alpha x + sigma noise,    (noise, x) a pair, where a model generated x from this noise.

    The pairs are made by `reflow.pairs`: data with an entry "noise", with the shape of encoded data. The new flow is
    nearly straight between the two, so few steps suffice, or even one. For data without "noise" it is `Denoising`. To
    learn only the single step (the paper's distillation), use times near 1, such as `PowerLaw`.
    """

    inputs = ("noise",)

    def problem(self, model: Any, x, conditions: Mapping[str, Any], keys: Iterator, training: bool):
        conditions = dict(conditions)
        noise = conditions.pop("noise", None)
        if noise is not None and tuple(noise.shape[1:]) != tuple(x.shape[1:]):
            raise ValueError(
                f"Reflow: 'noise' must have the shape of encoded data, {tuple(x.shape)}; received: {tuple(noise.shape)}"
            )
        return self.problem_of(model, x, noise, conditions, keys, training)
