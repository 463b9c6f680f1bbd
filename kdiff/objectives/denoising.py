"""Denoising: noise is added to data, and the network learns the target of `prediction`.

    t ~ times,   noise ~ N(0, I),   x_t = alpha x + sigma noise
    loss = w(log_snr) gain^2 |network(x_t, t) - (a x + b noise)|^2,   or without the factors, the simple loss

(Ho et al. 2020, arXiv:2006.11239, eqs. 4 and 14; `predictions` defines a, b and gain, `weightings` defines w.)
"""

from collections.abc import Iterator, Mapping
from typing import Any

from keras import ops

from kdiff import random
from kdiff.gaussian import kl_divergence, log_bin
from kdiff.objectives.base import Drawn, Objective, Problem
from kdiff.objectives.effective_weight import loss_weight
from kdiff.predictions import LearnedVariance
from kdiff.schedules import Marginal, NoiseSchedule, bridge
from kdiff.times import TimeSampler, Uniform

__all__ = ["Denoising", "VariationalBound", "variance_bound"]


class Denoising(Objective):
    """The network's output is compared with its target (see the module); a learned variance adds `variance_bound`."""

    held = True  # whether the bound trains only the variance

    def problem(self, model: Any, x, conditions: Mapping[str, Any], keys: Iterator, training: bool) -> Problem:
        return self.problem_of(model, x, None, conditions, keys, training)

    def problem_of(self, model: Any, x, noise, conditions, keys: Iterator, training: bool) -> Problem:
        """As `problem`, for a batch with given noise, with the shape of x; None draws the noise."""
        schedule, prediction = model.schedule, model.prediction
        # A custom sampler may draw times below the first step of a discrete process.
        times = self.density(model)
        t = ops.maximum(self.times(model)(schedule, ops.shape(x)[0], next(keys)), schedule.first_time)
        drawn, m = random.normal(next(keys), ops.shape(x)) if noise is None else None, schedule.at(t)
        noise = drawn if noise is None else ops.cast(noise, "float32")
        x_t = schedule(x, noise, t)
        output = model.output(x_t, m, conditions, training, ema=not training)
        learned = prediction.share(output) is not None
        known = (times.density(schedule, t), m, schedule.slope(t)) if times.has_density else (None, m)
        return Problem(
            prediction.value(output),
            prediction.target(x, noise, m),
            loss_weight(schedule, prediction, model.weighting, self.density(model), m),
            variance_bound(prediction, output, x, x_t, schedule, m, self.held) if learned else None,
            drawn=Drawn(x, t, *known),
        )

    def times(self, model: Any) -> Any:
        """The sampler of training times, `t = times(schedule, batch, key)`."""
        return model.times

    def density(self, model: Any) -> TimeSampler:
        """The times by whose density a weight per log-SNR is divided."""
        return model.times

    def check(self, model: Any) -> None:
        """Raises a ValueError if the weighting needs the density of the times, and it is not defined."""
        times = self.density(model)
        if getattr(model.weighting, "per_log_snr", False) and not times.has_density:
            raise ValueError(
                f"DiffusionModel: {model.weighting!r} is a weight per log-SNR, which needs the `density` of `times`; "
                f"{times!r} has none. Define `density(schedule, t)`, or use {Uniform()!r}"
            )


class VariationalBound(Denoising):
    """L_vlb of improved DDPM alone: T times the term of the variational bound at this time (Nichol and Dhariwal 2021,
    arXiv:2102.09672, section 3.3), in nats per dimension. It trains both the mean and the variance, which needs
    `predictions.LearnedVariance`; the hybrid with the simple loss is `Denoising`.

    Its gradients are noisy: the paper uses importance sampling of the times, `LossAwareBound`.
    """

    held = False

    def problem(self, model: Any, x, conditions: Mapping[str, Any], keys: Iterator, training: bool) -> Problem:
        made = super().problem(model, x, conditions, keys, training)
        return made._replace(weight=ops.zeros_like(made.extra), extra=made.extra / model.prediction.weight)

    def check(self, model: Any) -> None:
        """Raises a ValueError if the network does not learn the variance, or gives its bound the weight 0."""
        super().check(model)
        if not isinstance(model.prediction, LearnedVariance) or model.prediction.weight == 0:
            raise ValueError(
                "VariationalBound: the prediction must be a LearnedVariance with a weight above 0; received: "
                f"{model.prediction!r}. For a fixed variance the bound is the weighting `Variational`"
            )


def variance_bound(
    prediction: LearnedVariance, output, x, x_t, schedule: NoiseSchedule, m: Marginal, held: bool = True
):
    """weight T L, where L is the term of the bound at this time, with its mean held fixed (eq. 16, section 3.2):

        L = KL(q(x_then | x_now, x) || N(mean, variance)),   then = now - 1/T;
        L = -log p(x | x_now), for data with 256 levels on [-1, 1], if then = 0,

    in nats per dimension. T L for uniform t estimates the whole bound. The authors' code uses bits, so there the same
    weight is 1.44 times as large.

    Args:
        prediction: the prediction, which defines T, `num_steps`, and the weight.
        output: the network's output, with shape `(batch, ..., 2 channels)`.
        x: data, with shape `(batch, ..., channels)`.
        x_t: noisy data, with the same shape.
        schedule: the schedule.
        m: the marginal of x_t, with fields of shape `(batch,)` or `()`.
        held: whether the mean is held fixed.

    Returns:
        float32, with shape `(batch,)`.
    """
    output, x, x_t = (ops.convert_to_tensor(v, "float32") for v in (output, x, x_t))
    steps = _steps(prediction, schedule)
    place = m.t * steps
    # The place of the last step, 1, may be slightly larger by rounding; the step still goes to t = 0.
    now, then = m.like(x), schedule.at(ops.where(place > 1.001, place - 1.0, 0.0) / steps).like(x)
    kept, fresh = bridge(now, then)
    x_hat = prediction.denoise(output, x_t, m)
    x_hat = ops.stop_gradient(x_hat) if held else x_hat
    log_small = _log_posterior_variance(schedule, place, steps, x)
    log_large = 2.0 * ops.log(now.sigma) + ops.log(fresh)
    log_variance = log_small + prediction.share(output) * (log_large - log_small)
    divergence = kl_divergence(then.alpha * fresh * (x - x_hat), log_small, log_variance)
    likelihood = log_bin(x, kept * x_t + then.alpha * fresh * x_hat, ops.exp(0.5 * log_variance))
    term = ops.where(then.t > 0, divergence, -likelihood)
    return prediction.weight * steps * ops.mean(term, axis=tuple(range(1, len(x.shape))))


def _steps(prediction: LearnedVariance, schedule: NoiseSchedule) -> int:
    steps = prediction.num_steps or schedule.num_steps or 1000
    if steps < 2:
        raise ValueError(f"LearnedVariance: the process must have at least 2 steps; {schedule!r} has {steps}")
    return steps


def _log_posterior_variance(schedule: NoiseSchedule, place, steps: int, x):
    """log beta_tilde; in the step to t = 0, where it would be log(0), that of the preceding step (section 3.1)."""
    place = ops.maximum(place, 2.0)
    now, then = schedule.at(place / steps).like(x), schedule.at((place - 1.0) / steps).like(x)
    return 2.0 * ops.log(then.sigma) + ops.log(bridge(now, then)[1])
