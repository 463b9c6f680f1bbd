"""Continuous-time consistency models: the derivative of the estimate along a trajectory vanishes."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from keras import ops

from kdiff import deprecated, random
from kdiff.base import check_integer, check_number
from kdiff.denoisers import leading
from kdiff.objectives.base import Problem
from kdiff.objectives.taught import Taught, check_continuous, check_tangent, noised, rows
from kdiff.predictions import TrigFlow
from kdiff.tangents import Tangent

__all__ = ["SCM"]


class SCM(Taught):
    """sCM, the continuous-time consistency model (Lu and Song 2024, arXiv:2410.11081, algorithm 1), on any continuous
    schedule, with the prediction TrigFlow(sd). In its angle, tan(u) = sigma / (alpha sd), and

        z = cos(u) x + sin(u) sd noise = x_t cos(u) / alpha,     dz/du = cos(u) sd noise - sin(u) x,
        f = cos(u) z - sin(u) sd F,      F the network's output,

    with F^- equal to F but constant, the output is moved along the tangent of f:

        g    = -cos(u)^2 (sd F^- - dz/du) - r (cos(u) sin(u) z + sd cos(u) sin(u) dF^-/du),    r = min(1, step / warmup)
        g    = g / (|g| + c)
        loss = e^w(u) |F - (F^- + g)|^2 / dimension - w(u),

    where w is a learned cosine series in 2 u. The derivative is taken with respect to log tan(u), since cos(u) sin(u)
    d/du = d / d log tan(u). With a teacher dz/du is its velocity (sCD), without one that of data and noise (sCT). The
    paper's times are LogNormalSigma(-1.0, 1.4) for sd = 0.5, and training starts from a diffusion model
    (`students.student`). The model is sampled by `solvers.Consistency` in 1 or 2 steps. Compile it with the loss "mse".
    The derivative is computed without dropout.

    The time input of the network, and of the diffusion model it starts from, must have a small scale and should be the
    angle: `time_label=Scaled(10.0)` on `Cosine()`, where t is linear in u. With a log-SNR as time input the noisy end,
    where sampling begins and few times are drawn, is far from all other inputs of training (on eight Gaussians the
    energy distance of one step is then 16 instead of 3.6).

    Args:
        teacher: a `DiffusionModel` that defines the trajectories; None: those of data and noise.
        tangent: a `Tangent` or its name, for the derivative; `tangents.FiniteDifference` needs a float32 network.
        warmup: the number of steps until the tangent has its full weight, 10,000 of 400,000 in the paper; 0 for
            none. Until then the network learns little that it does not know as a diffusion model.
        c: the constant in the normalisation of g; None: g is not normalised. In a few dimensions use 1: |g| varies with
            the noise there, so that the mean of g / (|g| + c) is not 0 where that of g is.
        terms: the number of terms of w; 0 for w = 0.
        guidance, guidance_input: as in `Taught`.
    """

    sampled_by = MappingProxyType({"solver": "consistency", "steps": 2})

    formerly = ("kdiff.objectives>TangentConsistency",)

    @deprecated.arguments(steering="guidance_input")
    def __init__(
        self,
        teacher: Any = None,
        tangent="finite_difference",
        warmup: int = 10000,
        c: float | None = 0.1,
        terms: int = 8,
        guidance: Any = None,
        guidance_input: str = "timestep_cond",
    ):
        super().__init__(teacher, guidance, guidance_input)
        check_integer("SCM", "warmup", warmup, 0)
        check_integer("SCM", "terms", terms, 0)
        if c is not None:
            check_number("SCM", "c", c, 0.0)
        self.tangent, self.warmup, self.c, self.terms = Tangent.get(tangent), warmup, c, terms
        if terms:
            self.series = self.add_weight(shape=(terms,), initializer="zeros", name="series")

    def problem(self, model: Any, x, conditions: Mapping[str, Any], keys: Iterator, training: bool) -> Problem:
        schedule, sd = model.schedule, model.prediction.sigma_data
        m = schedule.at(model.times(schedule, ops.shape(x)[0], next(keys)))
        noise = random.normal(next(keys), ops.shape(x))
        x_t, scale = noised(x, noise, m), self.scales(x, next(keys))
        data, fresh = self.ends(model, x, noise, x_t, m, conditions, scale)
        conditions = self.told(conditions, scale)
        output = model.output(x_t, m, leading(conditions, m), training, ema=not training)
        velocity = model.prediction.target(data, fresh, m)  # dz/du / sd
        cos, sin, z = _angle(x_t, m, sd)
        slope = self._slope(model, z, cos * sin * sd * velocity, m, conditions, training)
        held = ops.stop_gradient(output)
        g = -(cos**2) * sd * (held - velocity) - self._warm(model) * (cos * sin * z + sd * slope)
        if self.c is not None:
            axes = tuple(range(1, len(x.shape)))
            g = g / (ops.sqrt(ops.sum(ops.square(g), axis=axes, keepdims=True)) + self.c)
        w = self.log_weight(m, sd)
        weight, extra = (None, None) if w is None else (ops.exp(w), -w)
        return Problem(output, ops.stop_gradient(held + g), weight, extra)

    def _slope(self, model, z, direction, m, conditions, training):
        """dF / d log tan(u), with dz / d log tan(u) = `direction`."""
        sd = model.prediction.sigma_data

        def curve(e):
            here = model.schedule.at_log_snr(m.log_snr - 2.0 * e)
            wide = here.like(z)
            x_t = (z + rows(e, z) * direction) * ops.sqrt(wide.alpha**2 + (wide.sigma / sd) ** 2)  # alpha / cos(u)
            return model.output(x_t, here, leading(conditions, here), False, ema=not training)

        return self.tangent(curve, ops.zeros_like(m.t))

    def _warm(self, model):
        """r."""
        return ops.minimum(ops.cast(model.step.value, "float32") / self.warmup, 1.0) if self.warmup else 1.0

    def log_weight(self, m, sd: float):
        """w(u) = sum_k a_k cos(2 k u), `(batch,)`; None for 0."""
        if not self.terms:
            return None
        u = ops.arctan2(m.sigma, sd * m.alpha)
        waves = ops.cos(2.0 * u[:, None] * ops.arange(self.terms, dtype="float32"))
        return ops.sum(waves * ops.convert_to_tensor(self.series), axis=-1)

    def check(self, model: Any) -> None:
        """Raises a ValueError for another prediction, a discrete schedule, a weighting, or a network not in float32."""
        super().check(model)
        check_continuous("SCM", model)
        if not isinstance(model.prediction, TrigFlow):
            raise ValueError(f"SCM: the prediction must be TrigFlow(), on any schedule; received: {model.prediction!r}")
        if model.weighting is not None:
            raise ValueError(f"SCM: it learns its weight; received: weighting={model.weighting!r}")
        check_tangent("SCM", self.tangent, model)


def _angle(x_t, m, sd: float):
    """(cos(u), sin(u), z), the first two shaped to broadcast against x_t."""
    m = m.like(x_t)
    size = ops.sqrt((sd * m.alpha) ** 2 + m.sigma**2)
    return sd * m.alpha / size, m.sigma / size, sd / size * x_t
