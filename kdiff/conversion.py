"""Conversions: a network trained with one prediction and schedule, used with another.

A network provides an estimate of the data at a given signal-to-noise ratio. At the same log-SNR, the x_t of two
schedules with different times and normalisations differ only by a factor,

    x_t / alpha = x'_t / alpha' = x + (sigma / alpha) noise,

and two predictions are two linear combinations of the same x and noise. So no retraining is needed: a denoiser trained
on one schedule can be sampled on another (`transfer`), and its output can be converted to another prediction
(`convert`).

Karras et al. 2022 (EDM), arXiv:2206.00364, section 2 and appendix C; Kingma et al. 2021, arXiv:2107.00630, section 5.
"""

from collections.abc import Callable
from typing import Any

from keras import ops

from kdiff.predictions import Prediction
from kdiff.schedules import Marginal, NoiseSchedule

__all__ = ["convert", "moved", "transfer"]


def convert(output, x_t, m: Marginal, source, target, schedule=None):
    """Converts the output of a network from the prediction `source` to the prediction `target`.

    With (a, b) of `source` and (alpha, sigma) of `m`, the output y and x_t determine x_hat and noise_hat:

        x_hat = (b x_t - sigma y) / (b alpha - a sigma),   noise_hat = (alpha y - a x_t) / (b alpha - a sigma).

    The result is a' x_hat + b' noise_hat, with (a', b') of `target`,

        y' = ((a' b - b' a) x_t + (b' alpha - a' sigma) y) / (b alpha - a sigma).

    If a `schedule` is given, (a', b') are those of that schedule at the log-SNR of `m`. The result is then the output
    that an equivalent network with the other prediction and schedule would give for x_t rescaled to that schedule,
    x'_t = x_t alpha' / alpha: `target.denoise(y', x'_t, schedule.at_log_snr(m.log_snr))` equals
    `source.denoise(y, x_t, m)`.

    Args:
        output: the output of the network, with shape `(batch, ..., channels)`.
        x_t: the noisy batch for which it was computed.
        m: the marginal of `x_t`, with fields of shape `(batch,)` or `()`.
        source: the network's `Prediction` or its name.
        target: the `Prediction` to convert to, or its name.
        schedule: the `NoiseSchedule` to convert to, or its name; None keeps that of `m`.

    Returns:
        y', float32, with the shape of `output`, but without the channels of a learned variance if `target` has none.

    Raises:
        ValueError: if `target` has a learned variance and `source` has none.
    """
    source, target = Prediction.get(source), Prediction.get(target)
    if target.factor > source.factor:
        raise ValueError(f"convert: {source!r} has no learned variance, which {target!r} needs; use one that has")
    output, x_t = ops.convert_to_tensor(output, "float32"), ops.convert_to_tensor(x_t, "float32")
    y = source.value(output)
    other = m if schedule is None else NoiseSchedule.get(schedule).at_log_snr(m.log_snr)
    m, other = m.like(x_t), other.like(x_t)
    (a, b), (a_new, b_new) = source.coefficients(m), target.coefficients(other)
    y_new = ((a_new * b - b_new * a) * x_t + (b_new * m.alpha - a_new * m.sigma) * y) / (b * m.alpha - a * m.sigma)
    if target.factor == 1:
        return y_new
    return ops.concatenate([y_new, output[..., y.shape[-1] :]], axis=-1)


def transfer(denoise: Callable[[Any, Marginal], Any], trained, sampled) -> Callable[[Any, Marginal], Any]:
    """Converts a denoiser that was trained on one schedule to a denoiser for sampling on another,

        x_hat = denoise(x_t alpha_trained / alpha_sampled, m'),    m' the marginal of `trained` at the same log-SNR.

    Log-SNRs outside the range of the trained schedule are passed on unchanged, with t clipped to [0, 1]: beyond the
    noisy end, x_t is essentially noise on either schedule. A network with `times.LogSNR` as its time label then
    receives values that it was not trained on, which a grid within the trained range avoids.

    Args:
        denoise: the denoiser x_hat = denoise(x_t, m, **conditions) on `trained`.
        trained: the `NoiseSchedule` that it was trained on, or its name.
        sampled: the `NoiseSchedule` of the run, or its name.

    Returns:
        The denoiser x_hat = denoiser(x_t, m, **conditions) on `sampled`.
    """
    trained, sampled = NoiseSchedule.get(trained), NoiseSchedule.get(sampled)
    return lambda x_t, m, **conditions: denoise(*moved(x_t, m, sampled, trained), **conditions)


def moved(x_t, m: Marginal, source: NoiseSchedule, target: NoiseSchedule) -> tuple[Any, Marginal]:
    """Moves x_t from a marginal m of one schedule to that of another at the same log-SNR: (x_t alpha' / alpha, m')."""
    if source == target:  # times stay exact: recomputed from the log-SNR they would lose a digit
        return x_t, m
    x_t = ops.convert_to_tensor(x_t, "float32")
    here, there = source.at_log_snr(m.log_snr), target.at_log_snr(m.log_snr)
    scale = there.like(x_t).alpha / here.like(x_t).alpha
    return scale * x_t, there._replace(t=ops.clip(there.t, 0.0, 1.0))
