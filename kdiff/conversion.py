"""Conversions: what a network learned under one prediction and one schedule, used under another.

All that a network can tell is an estimate of the data at a signal-to-noise ratio. Two schedules that differ in their
times and in their normalisation meet at the same log-SNR, where their x_t differ by a factor,

    x_t / alpha = x'_t / alpha' = x + (sigma / alpha) noise,

and two predictions are two mixtures of the same x and noise. So no retraining is needed: a denoiser trained on one
schedule is sampled on another (`transfer`), and an output is rewritten for another prediction (`convert`).

Karras et al. 2022 (EDM), arXiv:2206.00364, section 2 and appendix C; Kingma et al. 2021, arXiv:2107.00630, section 5.
"""

from collections.abc import Callable
from typing import Any

from keras import ops

from kdiff.predictions import Prediction
from kdiff.schedules import Marginal, NoiseSchedule

__all__ = ["convert", "moved", "transfer"]


def convert(output, x_t, m: Marginal, source, target, schedule=None):
    """The output of a network with the prediction `source`, as that of one with the prediction `target`.

    With (a, b) of `source` and (alpha, sigma) of `m`, the output y and x_t fix x_hat and noise_hat:

        x_hat = (b x_t - sigma y) / (b alpha - a sigma),   noise_hat = (alpha y - a x_t) / (b alpha - a sigma).

    The result is a' x_hat + b' noise_hat, with (a', b') of `target`,

        y' = ((a' b - b' a) x_t + (b' alpha - a' sigma) y) / (b alpha - a sigma).

    With a `schedule`, (a', b') are taken there at the log-SNR of `m`. The result is then what the network of the
    other prediction and schedule would answer for the x_t rescaled to it, x'_t = x_t alpha' / alpha, if both networks
    had learned the same: `target.denoise(y', x'_t, schedule.at_log_snr(m.log_snr))` is
    `source.denoise(y, x_t, m)`.

    Args:
        output: what the network answered, with shape `(batch, ..., channels)`.
        x_t: the noisy batch that it was asked about.
        m: the marginal that `x_t` is at; fields of shape `(batch,)` or `()`.
        source: the network's `Prediction` or its name.
        target: the `Prediction` to go to, or its name.
        schedule: the `NoiseSchedule` to go to, or its name; None stays on that of `m`.

    Returns:
        y', float32, with the shape of `output`; without the channels of a learned variance, if `target` has none.

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
    """The denoiser of a model that was trained under one schedule, for a run under another.

        x_hat = denoise(x_t alpha_trained / alpha_sampled, trained at the same log-SNR)

    The run may ask for log-SNRs that the trained schedule does not reach. They are passed on as they are, with t cut
    to [0, 1]: past the noisy end x_t is as good as noise on either schedule. A network with `times.LogSNR` as its
    label then sees numbers that it was not trained on; a grid that stays within its range avoids it.

    Args:
        denoise: x_hat = denoise(x_t, m, **conditions) under `trained`.
        trained: the `NoiseSchedule` that it was trained under, or its name.
        sampled: the `NoiseSchedule` of the run, or its name.

    Returns:
        x_hat = denoiser(x_t, m, **conditions) under `sampled`.
    """
    trained, sampled = NoiseSchedule.get(trained), NoiseSchedule.get(sampled)
    return lambda x_t, m, **conditions: denoise(*moved(x_t, m, sampled, trained), **conditions)


def moved(x_t, m: Marginal, source: NoiseSchedule, target: NoiseSchedule) -> tuple[Any, Marginal]:
    """x_t at the marginal m of one schedule, as it is at the same log-SNR under another: (x_t alpha' / alpha, m')."""
    if source == target:  # times stay as they are: read back from the log-SNR they would lose a digit
        return x_t, m
    x_t = ops.convert_to_tensor(x_t, "float32")
    here, there = source.at_log_snr(m.log_snr), target.at_log_snr(m.log_snr)
    scale = there.like(x_t).alpha / here.like(x_t).alpha
    return scale * x_t, there._replace(t=ops.clip(there.t, 0.0, 1.0))
