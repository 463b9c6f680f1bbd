"""Classifier-free guidance and its variants: extrapolation from the unconditional estimate past the conditional one.

All evaluate two estimates in one batch, x_c under the conditions and x_u without them (or under negative conditions).
With scale w (1 is off, as in Imagen and diffusers; the w of Ho and Salimans is one less),

    ClassifierFree       x_hat = x_u + w (x_c - x_u)
    AdaptiveProjected    x_hat = x_c + (w - 1) d,        d = x_c - x_u with momentum, of bounded norm, projected off x_c
    CFGPlusPlus          x_hat = x_u + w(h) (x_c - x_u), w(h) = w / (1 - e^-h), h the step in log(alpha / sigma)
    CFGZeroStar          v     = s v_u + w (v_c - s v_u),  s = <v_c, v_u> / |v_u|^2

x_hat is an affine function of the score (alpha x_hat - x) / sigma^2, so the first is equivalent to the combination of
scores in the paper, (1 - w) score_u + w score_c.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from keras import ops

from kdiff.base import check_integer, check_number
from kdiff.denoisers import Denoiser, Estimate, only_if
from kdiff.guidance.base import Guidance, Here, Run, check_scale, over
from kdiff.predictions import Prediction
from kdiff.schedules import Marginal
from kdiff.solvers.base import half_step, noise_of

__all__ = ["AdaptiveProjected", "CFGPlusPlus", "CFGZeroStar", "ClassifierFree"]


class _TwoAnswers(Guidance):
    """Their common base class. A subclass defines `combine`.

    Guidance can be limited to an interval of noise levels (Kynkäänniemi et al. 2024, "Applying guidance in a limited
    interval", arXiv:2404.07724, eq. 4). Outside of it only x_c is computed, except with `Reuse`.
    """

    arrays = ("scale", "negative")
    remembers = False  # whether x_u matters outside of the interval too

    def __init__(
        self,
        scale: Any = 3.0,
        negative: Mapping[str, Any] | None = None,
        drop: Sequence[str] | None = None,
        lowest: float = 0.0,
        highest: float = float("inf"),
    ):
        name = type(self).__name__
        check_scale(name, scale)
        check_number(name, "lowest", lowest, 0.0)
        check_number(name, "highest", highest, lowest)
        if negative is not None and not isinstance(negative, Mapping):
            raise TypeError(
                f'{name}: `negative` must be conditions by name, such as {{"text": "blurry"}}; received: {negative!r}'
            )
        self.scale, self.negative, self.lowest, self.highest = scale, negative, lowest, highest
        self.drop = None if drop is None else tuple(drop)

    @property
    def active(self) -> bool:
        """Whether any scale differs from 1."""
        return bool(np.any(np.asarray(self.scale) != 1.0))

    def rows(self, run: Run):
        """The scale and the negative conditions of each sample."""
        rows = {"scale": run.rows(self, "scale", self.scale, ())}
        if self.negative is None:
            return rows
        if run.conditions is None:
            raise ValueError(f"{type(self).__name__}: `negative` needs a model that has conditions")
        return {**rows, "negative": run.conditions(self.negative)}

    def guide(self, denoise: Denoiser, x, m: Marginal, here: Here) -> Estimate:
        sets = denoise.conditions, denoise.unconditional(self.drop, here.rows.get("negative"))
        if self.lowest == 0 and self.highest == float("inf"):
            return self._guided(*denoise.batched(x, m, *sets), x, m, here)
        place = over(m.sigma / m.alpha, x)
        inside = ops.logical_and(place >= self.lowest, place <= self.highest)

        def both():
            given, none = denoise.batched(x, m, *sets)
            guided = self._guided(given, none, x, m, here)
            return guided._replace(x_hat=ops.where(inside, guided.x_hat, given.x_hat))

        def one():
            estimate = denoise(x, m)
            return estimate.guided(estimate.x_hat, here.memory)

        return both() if self.remembers else only_if(ops.any(inside), both, one)

    def _guided(self, given: Estimate, none: Estimate, x, m: Marginal, here: Here) -> Estimate:
        """The guided estimate, from the one under the conditions and the other."""
        return self.combine(given, none, over(here.rows["scale"], x), x, m.like(x), here)

    def combine(self, given: Estimate, none: Estimate, scale, x, m: Marginal, here: Here) -> Estimate:
        """The guided estimate, derived from `given`; `scale` and the fields of `m` broadcast against `x`."""
        raise NotImplementedError


class ClassifierFree(_TwoAnswers):
    """Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598, eq. 6):

        x_hat = x_u + scale (x_c - x_u),

    With `rescale` r, the output y of a network with this `prediction` is also rescaled towards the standard deviation
    of the conditional output (Lin et al. 2023, arXiv:2305.08891, eqs. 15 and 16):

        y <- (r std(y_c) / std(y) + 1 - r) y.

    Args:
        scale: one number, or one per sample; 1 is off.
        negative: negative conditions by name, used instead of the null condition, such as `{"text": "blurry"}`.
        drop: the names of the conditions to drop; None: all that have a null value.
        lowest: the lower end of the guidance interval in sigma / alpha.
        highest: the upper end of the interval. For ImageNet-512 the paper uses 0.28 to 2.9.
        rescale: the strength of the rescaling, in [0, 1]; 0 is off, and the paper uses 0.7.
        prediction: the `Prediction`, or its name, whose output is rescaled.

    Raises:
        ValueError: if a number is out of range; in a run, if no condition can be dropped.
    """

    def __init__(
        self,
        scale: Any = 3.0,
        negative: Mapping[str, Any] | None = None,
        drop: Sequence[str] | None = None,
        lowest: float = 0.0,
        highest: float = float("inf"),
        rescale: float = 0.0,
        prediction="velocity",
    ):
        super().__init__(scale, negative, drop, lowest, highest)
        check_number("ClassifierFree", "rescale", rescale, 0.0, 1.0)
        self.rescale, self.prediction = rescale, _plain("ClassifierFree", prediction)

    def combine(self, given: Estimate, none: Estimate, scale, x, m: Marginal, here: Here) -> Estimate:
        x_hat = given.x_hat + (scale - 1.0) * (given.x_hat - none.x_hat)  # exactly x_c if the scale is 1
        if self.rescale == 0:
            return given.guided(x_hat)
        y, y_given = (_output(self.prediction, x, answer, m) for answer in (x_hat, given.x_hat))
        factor = self.rescale * _std(y_given) / _std(y) + 1.0 - self.rescale
        return given.guided(self.prediction.denoise(factor * y, x, m))


class AdaptiveProjected(_TwoAnswers):
    """Adaptive projected guidance, APG (Sadat et al. 2024, arXiv:2410.02416, algorithm 1), which avoids oversaturation
    at high scales:

        d <- x_c - x_u + momentum d,    d <- d min(1, radius / |d|),
        x_hat = x_c + (scale - 1) (d_orthogonal + parallel d_parallel),

    with the components of d parallel and orthogonal to x_c.

    Args:
        scale, negative, drop, lowest, highest: as in `ClassifierFree`.
        parallel: the weight of the component parallel to x_c, which causes saturation; the paper's eta. 1 keeps it.
        radius: the largest |d|; inf for no limit.
        momentum: the momentum of d over the steps, usually negative; 0 is off.
    """

    def __init__(
        self,
        scale: Any = 3.0,
        negative: Mapping[str, Any] | None = None,
        drop: Sequence[str] | None = None,
        lowest: float = 0.0,
        highest: float = float("inf"),
        parallel: float = 0.0,
        radius: float = float("inf"),
        momentum: float = -0.5,
    ):
        super().__init__(scale, negative, drop, lowest, highest)
        check_number("AdaptiveProjected", "parallel", parallel, 0.0)
        check_number("AdaptiveProjected", "radius", radius, 0.0)
        check_number("AdaptiveProjected", "momentum", momentum, -1.0, 1.0)
        self.parallel, self.radius, self.momentum = parallel, radius, momentum

    @property
    def remembers(self) -> bool:
        """Whether there is momentum."""
        return self.momentum != 0

    def start(self, x):
        """d = 0."""
        return ops.zeros_like(x)

    def combine(self, given: Estimate, none: Estimate, scale, x, m: Marginal, here: Here) -> Estimate:
        x_c, d = given.x_hat, given.x_hat - none.x_hat + self.momentum * here.memory
        remember = d
        if self.radius < float("inf"):
            # The lower limit of 1e-24 keeps the derivative finite where d is 0.
            d = d * ops.minimum(1.0, self.radius * ops.rsqrt(ops.maximum(_dot(d, d), 1e-24)))
        along = _dot(d, x_c) / ops.maximum(_dot(x_c, x_c), 1e-12) * x_c
        return given.guided(x_c + (scale - 1.0) * (d - along + self.parallel * along), remember)


class CFGPlusPlus(_TwoAnswers):
    """CFG++ (Chung et al. 2024, arXiv:2406.08070, algorithm 2), which guides the data but keeps the noise of x_u:

        x_then = alpha_then (x_u + scale (x_c - x_u)) + sigma_then noise_u.

    This is the step of DDIM with the estimate x_u + scale / (1 - e^-h) (x_c - x_u), where h is the step size in
    log(alpha / sigma), that is, classifier-free guidance with a scale that grows as the steps get shorter. In this form
    it applies to any solver; with DDIM it is the paper's algorithm.

    Args:
        scale: the paper's lambda, usually in [0, 1]; one number, or one per sample.
        negative, drop, lowest, highest: as in `ClassifierFree`.
    """

    def __init__(
        self,
        scale: Any = 0.6,
        negative: Mapping[str, Any] | None = None,
        drop: Sequence[str] | None = None,
        lowest: float = 0.0,
        highest: float = float("inf"),
    ):
        super().__init__(scale, negative, drop, lowest, highest)

    @property
    def active(self) -> bool:
        """True, since a scale of 1 is not off."""
        return True

    def combine(self, given: Estimate, none: Estimate, scale, x, m: Marginal, here: Here) -> Estimate:
        step = here.step(self)
        scale = -scale / ops.expm1(-half_step(step.now, step.then))
        return given.guided(none.x_hat + scale * (given.x_hat - none.x_hat))


class CFGZeroStar(_TwoAnswers):
    """CFG-Zero* (Fan et al. 2025, arXiv:2503.18886, algorithm 1), for flow matching:

        v = s v_u + scale (v_c - s v_u),    s = <v_c, v_u> / |v_u|^2    for each example,

    and v = 0 in the first steps, where the velocity of an underfitted network is worse than zero.

    Args:
        scale, negative, drop, lowest, highest: as in `ClassifierFree`.
        zero_steps: the number of initial steps with v = 0.
        prediction: the `Prediction`, or its name, whose output is v.
    """

    def __init__(
        self,
        scale: Any = 3.0,
        negative: Mapping[str, Any] | None = None,
        drop: Sequence[str] | None = None,
        lowest: float = 0.0,
        highest: float = float("inf"),
        zero_steps: int = 1,
        prediction="flow",
    ):
        super().__init__(scale, negative, drop, lowest, highest)
        check_integer("CFGZeroStar", "zero_steps", zero_steps, 0)
        self.zero_steps, self.prediction = zero_steps, _plain("CFGZeroStar", prediction)

    @property
    def active(self) -> bool:
        """Whether a scale differs from 1, or there are steps with v = 0."""
        return self.zero_steps > 0 or super().active

    def combine(self, given: Estimate, none: Estimate, scale, x, m: Marginal, here: Here) -> Estimate:
        v, v_none = (_output(self.prediction, x, answer.x_hat, m) for answer in (given, none))
        v_none = _dot(v, v_none) / ops.maximum(_dot(v_none, v_none), 1e-12) * v_none
        v = v_none + scale * (v - v_none)
        if self.zero_steps:
            v = ops.where(here.step(self).index < self.zero_steps, 0.0, v)
        return given.guided(self.prediction.denoise(v, x, m))


def _plain(owner: str, prediction) -> Prediction:
    prediction = Prediction.get(prediction)
    if prediction.factor != 1:
        raise ValueError(f"{owner}: `prediction` must have one output per channel; received: {prediction!r}")
    return prediction


def _output(prediction: Prediction, x, x_hat, m: Marginal):
    """The output of a network with this prediction for the estimate x_hat."""
    return prediction.target(x_hat, noise_of(x, x_hat, m), m)


def _dot(a, b):
    """<a, b> for each example, with axes of length 1 for broadcasting."""
    return ops.sum(a * b, axis=tuple(range(1, len(a.shape))), keepdims=True)


def _std(x):
    return ops.std(x, axis=tuple(range(1, len(x.shape))), keepdims=True)
