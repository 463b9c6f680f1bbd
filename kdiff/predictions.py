"""Parametrisations: what the network predicts.

A network may predict the data, the noise, or any linear combination of the two, given by a pair (a, b):

    target = a x + b noise.

Since x_t = alpha x + sigma noise is a second linear equation in the same two unknowns, any output y implies

    x_hat = (b x_t - sigma y) / (b alpha - a sigma).

The error of x_hat is the error of the output times the gain, sigma / |b alpha - a sigma|. A loss weight for x_hat,
times gain^2, is therefore the loss weight for the output.

| class    | a             | b               | x_hat                                 | gain^2                          |
|----------|---------------|-----------------|---------------------------------------|---------------------------------|
| Data     | 1             | 0               | y                                     | 1                               |
| Noise    | 0             | 1               | (x_t - sigma y) / alpha               | sigma^2 / alpha^2               |
| Score    | 0             | -1 / sigma      | (x_t + sigma^2 y) / alpha             | sigma^4 / alpha^2               |
| Velocity | -sigma        | alpha           | alpha x_t - sigma y (VP)              | sigma^2 (VP)                    |
| Flow     | -1            | 1               | x_t - t y (rectified)                 | sigma^2 / (alpha + sigma)^2     |
| Karras   | sin(u) / sd   | -cos(u)         | c_skip x_t / alpha + c_out y          | c_out^2 = (sd sigma / r)^2      |
| TrigFlow | -sin(u) / sd  | cos(u)          | c_skip x_t / alpha - c_out y          | (sd sigma / r)^2                |

In the last two rows, sd is the standard deviation of the data, r = sqrt(alpha^2 sd^2 + sigma^2) is that of x_t, and
tan(u) = sigma / (alpha sd). Both also scale the input of the network by 1 / r (`input_scale`).

`LearnedVariance` wraps any of them for a network that also predicts the variance of the DDPM steps.
"""

from typing import ClassVar

import numpy as np
from keras import ops

from kdiff.base import Value, check_integer, check_number
from kdiff.schedules import Marginal, NoiseSchedule

__all__ = [
    "Data",
    "Flow",
    "Karras",
    "LearnedVariance",
    "Noise",
    "Prediction",
    "Score",
    "TrigFlow",
    "Velocity",
    "check_beginning",
    "check_invertible",
]


class Prediction(Value):
    """The base class of all parametrisations. A new one defines only `coefficients`.

    Attributes:
        factor: the number of output channels of the network per channel of the data.
    """

    aliases: ClassVar = {
        "epsilon": "noise",
        "eps": "noise",
        "vprediction": "velocity",
        "v": "velocity",
        "x0": "data",
        "xstart": "data",
        "sample": "data",
        "flowprediction": "flow",
    }
    factor: int = 1

    def coefficients(self, m: Marginal):
        """(a, b) such that the network's target is a x + b noise; each broadcasts against the fields of `m`."""
        raise NotImplementedError

    def input_scale(self, m: Marginal):
        """The factor by which x_t is scaled for the network; 1.0, or a tensor with the shape of the fields of `m`."""
        return 1.0

    def value(self, output):
        """The part of the network's output that is compared with the target: all of it, unless overridden."""
        return output

    def share(self, output):
        """The part of the output that parametrises the variance of a step (`LearnedVariance`), or None."""
        return None

    def target(self, x, noise, m: Marginal):
        """The network's target, a x + b noise, with the shape of `x`."""
        x, noise = ops.convert_to_tensor(x, "float32"), ops.convert_to_tensor(noise, "float32")
        a, b = self.coefficients(m.like(x))
        return a * x + b * noise

    def denoise(self, output, x_t, m: Marginal):
        """The estimate of the data for an output y: x_hat = (b x_t - sigma y) / (b alpha - a sigma)."""
        output, x_t = ops.convert_to_tensor(output, "float32"), ops.convert_to_tensor(x_t, "float32")
        m = m.like(x_t)
        a, b = self.coefficients(m)
        return (b * x_t - m.sigma * self.value(output)) / (b * m.alpha - a * m.sigma)

    def gain(self, m: Marginal):
        """|d x_hat / d y| = sigma / |b alpha - a sigma|, with the shape of the fields of `m`."""
        a, b = self.coefficients(m)
        return m.sigma / ops.abs(b * m.alpha - a * m.sigma)


def check_invertible(prediction: Prediction, schedule: NoiseSchedule) -> None:
    """Raises a ValueError if the two equations of this module do not determine x at some time of the schedule.

    b alpha - a sigma must be finite, nonzero and of constant sign. It is evaluated at 1000 times, from the first step
    of the schedule, or t = 0, to t = 1.
    """
    t = np.linspace(1.0 / schedule.num_steps if schedule.num_steps else 0.0, 1.0, 1000, dtype="float32")
    m = schedule.at(t)
    a, b = prediction.coefficients(m)
    determinant = ops.convert_to_numpy(b * m.alpha - a * m.sigma) * np.ones_like(t)
    wrong = ~np.isfinite(determinant) | (np.sign(determinant) != np.sign(determinant[len(t) // 2])) | (determinant == 0)
    if wrong.any():
        raise ValueError(
            f"{prediction!r} does not determine the data on {schedule!r}: b alpha - a sigma is "
            f"{determinant[wrong][0]:.3g} at t = {t[wrong][0]:.4g}, and must be finite and of one sign. Use another, "
            "such as `Velocity()`"
        )


_HIGHEST_GAIN = 1e6


def check_beginning(prediction: Prediction, schedule: NoiseSchedule, log_snr) -> None:
    """Raises a ValueError if x_hat is dominated by the network's error at this initial log-SNR of a run.

    If x and noise have unit size, the target has size sqrt(a^2 + b^2), and a relative error e of the output becomes
    an error e gain sqrt(a^2 + b^2) of x_hat. That factor may be at most 1e6. For a network that predicts the noise or
    the score, it diverges as the SNR goes to 0, because x_hat is divided by alpha. If alpha is 1 the factor is sigma
    for both, 1348 for NCSN++: the gain of the score is sigma^2, and its size is 1 / sigma.
    """
    m = schedule.at_log_snr(log_snr)
    a, b = (ops.cast(value, "float32") for value in prediction.coefficients(m))
    gain = float(ops.convert_to_numpy(prediction.gain(m) * ops.sqrt(a**2 + b**2)))
    if not gain <= _HIGHEST_GAIN:
        raise ValueError(
            f"{prediction!r} and {schedule!r} do not go together where the run begins: at a log-SNR of "
            f"{float(ops.convert_to_numpy(log_snr)):.4g} the network's relative error is multiplied by {gain:.1e} in "
            "the estimate of the data. Use a prediction that determines the data there, such as `Velocity()`, or a "
            "grid that begins at less noise, such as `UniformLogSNR(min_log_snr=-10.0)`"
        )


class Data(Prediction):
    """The network predicts the data x: a = 1, b = 0 (Ho et al. 2020, section 3.2)."""

    def coefficients(self, m: Marginal):
        return 1.0, 0.0


class Noise(Prediction):
    """The network predicts the noise: a = 0, b = 1 (Ho et al. 2020, eq. 14)."""

    def coefficients(self, m: Marginal):
        return 0.0, 1.0


class Score(Prediction):
    """The network predicts the score, the gradient of log q(x_t): a = 0, b = -1 / sigma.

    The target is the score of q(x_t | x), -noise / sigma, whose conditional mean is the score of q(x_t) (Vincent 2011;
    Song et al. 2021, arXiv:2011.13456, eq. 7). It grows as 1 / sigma near t = 0, which the paper's weight sigma^2
    compensates.
    """

    def coefficients(self, m: Marginal):
        return 0.0, -1.0 / m.sigma


class Velocity(Prediction):
    """The network predicts v = alpha noise - sigma x: a = -sigma, b = alpha.

    Salimans and Ho 2022, "Progressive distillation", arXiv:2202.00512, appendix D.
    """

    def coefficients(self, m: Marginal):
        return -m.sigma, m.alpha


class Flow(Prediction):
    """The network predicts noise - x, the velocity of rectified flow: a = -1, b = 1.

    Liu et al. 2022, arXiv:2209.03003, eq. 1, with time running from data to noise.
    """

    def coefficients(self, m: Marginal):
        return -1.0, 1.0


class Karras(Prediction):
    """The preconditioning of EDM (Karras et al. 2022, arXiv:2206.00364, table 1 and appendix B.6), on any schedule:

        a = sin(u) / sigma_data,   b = -cos(u),   tan(u) = sigma / (alpha sigma_data).

    It is equivalent to x_hat = c_skip z + c_out y with z = x_t / alpha, where for s = sigma / alpha

        c_skip = sigma_data^2 / (s^2 + sigma_data^2),   c_out = s sigma_data / sqrt(s^2 + sigma_data^2).

    The network's input c_in z = x_t / sqrt(alpha^2 sigma_data^2 + sigma^2) and its target have unit variance.

    Args:
        sigma_data: the standard deviation of the data.
    """

    def __init__(self, sigma_data: float = 0.5):
        check_number(type(self).__name__, "sigma_data", sigma_data, 1e-6)
        self.sigma_data = sigma_data

    def coefficients(self, m: Marginal):
        """(sin(u) / sigma_data, -cos(u))."""
        scale = self.input_scale(m)
        return m.sigma * scale / self.sigma_data, -m.alpha * self.sigma_data * scale

    def input_scale(self, m: Marginal):
        """1 / sqrt(alpha^2 sigma_data^2 + sigma^2)."""
        return ops.rsqrt(m.alpha**2 * self.sigma_data**2 + m.sigma**2)


class TrigFlow(Karras):
    """The parametrisation of sCM (Lu and Song 2024, arXiv:2410.11081, section 3), the negative of `Karras`:

        a = -sin(u) / sigma_data,   b = cos(u),   tan(u) = sigma / (alpha sigma_data),

    the paper's velocity cos(u) z - sin(u) x in units of sigma_data, where z = sigma_data noise. On the paper's
    schedule, alpha = cos(u), and with sigma_data = 1, it is `Velocity`.

    Args:
        sigma_data: the standard deviation of the data.
    """

    def coefficients(self, m: Marginal):
        a, b = super().coefficients(m)
        return -a, -b


class LearnedVariance(Prediction):
    """A prediction with a learned variance of each step (Nichol and Dhariwal 2021, arXiv:2102.09672, section 3.1).

    The network's output has twice the channels of the data. The first half is the output of `prediction`; the second
    half, v in [-1, 1], interpolates the variance of the step from t to t - 1/T between its bounds (eq. 15):

        log variance = share log(beta) + (1 - share) log(beta_tilde),   share = (v + 1) / 2,
        beta = sigma_now^2 (1 - r),   beta_tilde = sigma_then^2 (1 - r),   r = SNR_now / SNR_then.

    `solvers.DDPM("learned")` samples with this variance. `objectives.Denoising` trains it by L_vlb (eq. 16).

    Args:
        prediction: a `Prediction` or its name.
        num_steps: T, at least 2. None: that of the schedule, or 1000 for a continuous one.
        weight: the weight of L_vlb, the paper's lambda.
    """

    factor = 2

    def __init__(self, prediction="noise", num_steps: int | None = None, weight: float = 0.001):
        if num_steps is not None:
            check_integer("LearnedVariance", "num_steps", num_steps, minimum=2)
        check_number("LearnedVariance", "weight", weight, 0.0)
        self.prediction, self.num_steps, self.weight = Prediction.get(prediction), num_steps, weight
        if self.prediction.factor != 1:
            raise ValueError(
                f"LearnedVariance: `prediction` must have one output per channel, as Noise or Velocity do; received: "
                f"{self.prediction!r}"
            )

    def coefficients(self, m: Marginal):
        return self.prediction.coefficients(m)

    def input_scale(self, m: Marginal):
        return self.prediction.input_scale(m)

    def value(self, output):
        """The first half of the channels."""
        return output[..., : self._channels(output)]

    def share(self, output):
        """(v + 1) / 2, v the second half of the channels."""
        return (output[..., self._channels(output) :] + 1.0) / 2.0

    def _channels(self, output) -> int:
        channels = output.shape[-1]
        if channels % 2:
            raise ValueError(f"LearnedVariance: the output must have an even number of channels; received: {channels}")
        return channels // 2
