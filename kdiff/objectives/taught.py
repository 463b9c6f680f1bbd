"""Objectives with an optional teacher, a trained model, and their common functions.

A teacher is a part of the objective: it is frozen, not averaged, and saved once with the model; a loaded model has it
again. `model.objective = "denoising"` releases it, and the model is then saved without it. A student that becomes a
teacher releases its own.

A step of a network from `now` to `then` is also expressed by an x_hat, the one with which the step of DDIM,

    x_then = (sigma_then / sigma_now) x_now + alpha_then (1 - e^{-h}) x_hat,     h = l_then - l_now,   l = log_snr / 2,

ends there (`solvers.base.flow_to`). Two such steps, now -> mid -> then, with x_hat_1 and x_hat_2, equal one with

    x_hat = (e^{-h_2} (1 - e^{-h_1}) x_hat_1 + (1 - e^{-h_2}) x_hat_2) / (1 - e^{-h_1 - h_2}),

a mean whose weights sum to 1, so that even short steps are accurate.
"""

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from kdiff import backend, deprecated, random
from kdiff.base import check_number
from kdiff.objectives.base import Objective
from kdiff.predictions import Prediction
from kdiff.schedules import Marginal
from kdiff.solvers.base import half_step
from kdiff.tangents import Tangent

__all__ = [
    "Taught",
    "check_continuous",
    "check_noisy_end",
    "check_simple",
    "check_tangent",
    "condition_inputs",
    "implied_output",
    "joined_jumps",
    "noised",
    "rows",
    "still",
]


def noised(x, noise, m: Marginal):
    """alpha x + sigma noise, for m with fields `(batch,)`."""
    m = m.like(x)
    return m.alpha * x + m.sigma * noise


def rows(values, x):
    """One number per example, `(batch,)`, reshaped to broadcast against `x`."""
    return ops.reshape(values, (-1, *[1] * (len(x.shape) - 1)))


def still(function: Callable[[], Any]) -> Any:
    """The result of a function as a constant: no gradient flows through it, and PyTorch records none."""
    return keras.tree.map_structure(ops.stop_gradient, backend.without_gradients(function)())


def joined_jumps(first, second, now: Marginal, mid: Marginal, then: Marginal):
    """The x_hat of one step from `now` to `then`, from those of two steps via `mid` (see the module)."""
    h_1, h_2 = (half_step(*pair) for pair in ((now.like(first), mid.like(first)), (mid.like(first), then.like(first))))
    total = ops.expm1(-h_1 - h_2)
    return ops.exp(-h_2) * ops.expm1(-h_1) / total * first + ops.expm1(-h_2) / total * second


def implied_output(prediction: Prediction, x_hat, x_t, m: Marginal):
    """The output of a network with this prediction for the estimate `x_hat`: the inverse of `denoise`."""
    wide = m.like(x_t)
    return prediction.target(x_hat, (x_t - wide.alpha * x_hat) / wide.sigma, m)


def condition_inputs(model: Any) -> Mapping[str, Any]:
    """What the network of a model takes beside image and time, by name."""
    return getattr(model.network, "condition_inputs", {})


def check_simple(owner: str, model: Any) -> None:
    """Raises a ValueError for a learned variance, or a weighting that needs the density of the model's times."""
    if model.prediction.factor != 1:
        raise ValueError(
            f"{owner}: the prediction must have one output per channel, as Velocity or Flow do, since there is no "
            f"variance to learn; received: {model.prediction!r}"
        )
    if getattr(model.weighting, "per_log_snr", False):
        raise ValueError(
            f"{owner}: it draws its own noise levels, so `weighting` must not be one per log-SNR; received: "
            f"{model.weighting!r}. Use 'truncated_snr', 'min_snr' or None"
        )


def check_noisy_end(owner: str, model: Any) -> None:
    """Raises a ValueError if the output at t = 1, where sampling begins, says next to nothing of x_hat."""
    gain = float(ops.convert_to_numpy(model.prediction.gain(model.schedule.at(np.float32(1.0)))))
    if abs(gain) > 100.0:
        raise ValueError(
            f"{owner}: with {model.prediction!r} on {model.schedule!r} x_hat changes by {gain:.3g} times as much as "
            "the output at t = 1, where sampling begins, so it is not learned there. Use Velocity(), Flow() or Data()"
        )


def check_continuous(owner: str, model: Any) -> None:
    """Raises a ValueError for a discrete schedule."""
    if model.schedule.num_steps is not None:
        raise ValueError(
            f"{owner}: the schedule must be continuous, such as Rectified(), Cosine() or VarianceExploding(), since "
            f"the network is called at arbitrary times; received: {model.schedule!r}"
        )


def check_tangent(owner: str, tangent: Tangent, model: Any) -> None:
    """Raises a ValueError for a finite difference with a network not in float32, or a time input of large scale.

    A network that learns from its own derivative needs a time input of small scale: that of 1000 t, which changes by
    hundreds when sigma / alpha grows by a factor of e, is dominated by the fast waves of the time embedding.
    """
    m = model.schedule.at(np.linspace(0.02, 0.98, 65, dtype="float32"))
    label, log_snr = (
        ops.convert_to_numpy(v).astype("float64") for v in (model.time_label(model.schedule, m), m.log_snr)
    )
    fastest = np.abs(np.diff(label) / np.diff(0.5 * log_snr)).max()
    if fastest > 50.0:
        raise ValueError(
            f"{owner}: the network learns from its own derivative, so its time input must change slowly; received: "
            f"{model.time_label!r}, which changes by {fastest:.0f} when sigma / alpha grows by a factor of e. Use "
            "time_label=Scaled(10.0), also for the model that training starts from"
        )
    if tangent.precise and model.network.compute_dtype != "float32":
        raise ValueError(
            f"{owner}: {tangent!r} needs a network that computes in float32, not {model.network.compute_dtype}: use "
            "tangent='forward_mode'"
        )


def _same_codec(one: Any, other: Any) -> bool:
    """Whether these encode alike, as far as arguments tell: the weights are not compared."""
    return one == other or (bool(one.weights) and type(one) is type(other) and one.get_config() == other.get_config())


class Taught(Objective):
    """The base class of objectives with an optional or required teacher. A new one defines `problem`.

    Args:
        teacher: a built `DiffusionModel` on any schedule, whose averaged weights are used. Its weights are frozen from
            when a model has this objective, until `teacher.trainable = True`. One that was taught itself then has the
            objective "denoising", so that its own teacher is not saved with the model. None for no teacher.
        guidance: the classifier-free guidance scale that is distilled: a number, where 1 or None is no guidance; or a
            pair `(low, high)`, in which it is drawn for each example and passed to the student, whose `sample` then
            needs it, as `timestep_cond=low`.
        guidance_input: the input of the student for the scale, as in `blocks.GuidanceEmbedding`.

    Attributes:
        teacher_told: whether the scale is passed to the teacher too, in place of guiding the teacher.
        guides_itself: whether, without a teacher, `guidance` is of the network itself.
    """

    named = False
    teacher_told = False
    guides_itself = False

    @deprecated.arguments(steering="guidance_input")
    def __init__(self, teacher: Any = None, guidance: Any = None, guidance_input: str = "timestep_cond"):
        super().__init__()
        name = type(self).__name__
        if teacher is not None and not hasattr(teacher, "denoiser_in_step"):
            raise TypeError(f"{name}: `teacher` must be a DiffusionModel; received: {teacher!r}")
        if teacher is not None and not teacher.built:
            raise ValueError(f"{name}: the teacher has no weights yet; train it, load it, or call `build`")
        several = isinstance(guidance, (list, tuple))
        if several and len(guidance) != 2:
            raise ValueError(f"{name}: `guidance` must be a number, or (low, high); received: {guidance!r}")
        for one in guidance if several else () if guidance is None else (guidance,):
            check_number(name, "guidance", one, 0.0, 1e6)
        if several and guidance[0] > guidance[1]:
            raise ValueError(f"{name}: `guidance` must be (low, high) in this order; received: {guidance!r}")
        if guidance is not None and teacher is None and not self.guides_itself:
            raise ValueError(f"{name}: `guidance` needs a teacher; received: {guidance!r}, and no teacher")
        self.teacher, self.guidance_input = teacher, guidance_input
        self.guidance = tuple(guidance) if several else guidance

    def taken(self) -> None:
        """Freezes the teacher, and releases the one by which it was taught itself."""
        if getattr(getattr(self.teacher, "objective", None), "teacher", None) is not None:
            self.teacher.objective = "denoising"
        for variable in () if self.teacher is None else self.teacher.variables:
            variable.trainable = False  # not its layers, which a student copies

    def check(self, model: Any) -> None:
        """Raises a ValueError if the teacher has another codec or cannot be guided, or the student has no input."""
        name, teacher = type(self).__name__, self.teacher
        if teacher is not None and not _same_codec(teacher.codec, model.codec):
            raise ValueError(f"{name}: the codec must be the teacher's, {teacher.codec!r}; received: {model.codec!r}")
        guided = model if teacher is None else teacher
        if self._guided and not self.teacher_told and not guided.denoiser_in_step().nulls:
            raise ValueError(
                f"{name}: the {'network' if teacher is None else 'teacher'} cannot be guided, since none of its "
                f"conditions can be left out; received: guidance={self.guidance!r}"
            )
        if isinstance(self.guidance, tuple) and self.guidance_input not in condition_inputs(model):
            raise ValueError(
                f"{name}: a random scale must be passed to the network as an input {self.guidance_input!r}, as "
                f"in blocks.GuidanceEmbedding; it has: {sorted(condition_inputs(model))}"
            )

    @property
    def _guided(self) -> bool:
        return self.guidance is not None and self.guidance != 1

    @property
    def drawn_inputs(self) -> dict[str, tuple[float, float]]:
        """The guidance scale, if it is random."""
        return {self.guidance_input: self.guidance} if isinstance(self.guidance, tuple) else {}

    def scales(self, x, key) -> Any:
        """The guidance scale of each example, `(batch,)`; None for no guidance."""
        if not self._guided:
            return None
        batch = ops.shape(x)[0]
        if not isinstance(self.guidance, tuple):
            return ops.full((batch,), float(self.guidance), "float32")
        low, high = self.guidance
        return low + (high - low) * random.uniform(key, (batch,))

    def told(self, conditions: Mapping[str, Any], scale) -> dict[str, Any]:
        """The inputs of the student: the conditions, and the scale if it is random."""
        return {**conditions, self.guidance_input: scale} if isinstance(self.guidance, tuple) else dict(conditions)

    def taught(self, model: Any, conditions: Mapping[str, Any], scale=None) -> Callable[[Any, Marginal], Any]:
        """x_hat = taught(x_t, m): the guided estimate of the teacher, for m on the schedule of `model`."""
        names = {*self.teacher.shapes, *condition_inputs(self.teacher)}
        known = {name: value for name, value in conditions.items() if name in names}
        denoise = self.teacher.denoiser_in_step(schedule=model.schedule, **known)

        def answer(x_t, m):
            if scale is None:
                return denoise(x_t, m).x_hat
            given, none = denoise.batched(x_t, m, denoise.conditions, denoise.unconditional())
            return none.x_hat + rows(scale, x_t) * (given.x_hat - none.x_hat)

        return lambda x_t, m: still(lambda: answer(x_t, m))

    def ends(self, model: Any, x, noise, x_t, m: Marginal, conditions: Mapping[str, Any], scale=None) -> tuple:
        """(data, noise) that define the direction of the flow at x_t: x and the noise, whose posterior means give the
        flow; or, with a teacher, these means, x_hat and noise_hat = (x_t - alpha x_hat) / sigma.
        """
        if self.teacher is None:
            return x, noise
        x_hat, wide = self.taught(model, conditions, scale)(x_t, m), m.like(x_t)
        return x_hat, (x_t - wide.alpha * x_hat) / wide.sigma
