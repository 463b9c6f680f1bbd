"""Parametrisations: what the network predicts.

A network may predict the data, the noise, or any mixture of them. One pair of numbers says which,

    target = a x + b noise,

and since x_t = alpha x + sigma noise is the other linear equation in the same two unknowns, any output y gives

    x_hat = (b x_t - sigma y) / (b alpha - a sigma).

An error of the output is an error of x_hat multiplied by the gain, sigma / |b alpha - a sigma|, so a loss weight
stated for x_hat is a loss weight for the output times gain^2.

| class    | a             | b               | x_hat                                 | gain^2                          |
|----------|---------------|-----------------|---------------------------------------|---------------------------------|
| Data     | 1             | 0               | y                                     | 1                               |
| Noise    | 0             | 1               | (x_t - sigma y) / alpha               | sigma^2 / alpha^2               |
| Score    | 0             | -1 / sigma      | (x_t + sigma^2 y) / alpha             | sigma^4 / alpha^2               |
| Velocity | -sigma        | alpha           | alpha x_t - sigma y (VP)              | sigma^2 (VP)                    |
| Flow     | -1            | 1               | x_t - t y (rectified)                 | sigma^2 / (alpha + sigma)^2     |
| Karras   | sin(u) / sd   | -cos(u)         | c_skip x_t / alpha + c_out y          | c_out^2 = (sd sigma / r)^2      |
| TrigFlow | -sin(u) / sd  | cos(u)          | c_skip x_t / alpha - c_out y          | (sd sigma / r)^2                |

In the last two sd is the standard deviation of the data, r = sqrt(alpha^2 sd^2 + sigma^2) that of x_t, and
tan(u) = sigma / (alpha sd). Both also scale what the network sees by 1 / r (`input_scale`).

`LearnedVariance` wraps any of them for a network that predicts the variance of DDPM's steps as well.
"""

import numpy as np
from keras import ops

from kdiff.base import Value, check_integer, check_number
from kdiff.schedules import Marginal, NoiseSchedule, bridge


class Prediction(Value):
    """The base of all parametrisations. A new one defines `coefficients` alone.

    Attributes:
        factor: how many channels the network's output has for each channel of the data.
    """

    factor: int = 1

    def coefficients(self, m: Marginal):
        """(a, b) such that the network's target is a x + b noise; each broadcasts against the fields of `m`."""
        raise NotImplementedError

    def input_scale(self, m: Marginal):
        """The factor on x_t before the network sees it; the number 1.0, or of the shape of the fields of `m`."""
        return 1.0

    def value(self, output):
        """The part of the network's output that is compared with the target: all of it, unless overridden."""
        return output

    def share(self, output):
        """The part of the output that says how large the variance of a step is (`LearnedVariance`), or None."""
        return None

    def extra_loss(self, output, x, x_t, schedule: NoiseSchedule, m: Marginal):
        """What is added to the loss of each example, with shape `(batch,)`, or None."""
        return None

    def target(self, x, noise, m: Marginal):
        """What the network should answer, a x + b noise, with the shape of `x`."""
        x, noise = ops.convert_to_tensor(x, "float32"), ops.convert_to_tensor(noise, "float32")
        a, b = self.coefficients(m.like(x))
        return a * x + b * noise

    def denoise(self, output, x_t, m: Marginal):
        """The data that the network's output implies, x_hat = (b x_t - sigma y) / (b alpha - a sigma)."""
        output, x_t = ops.convert_to_tensor(output, "float32"), ops.convert_to_tensor(x_t, "float32")
        m = m.like(x_t)
        a, b = self.coefficients(m)
        return (b * x_t - m.sigma * self.value(output)) / (b * m.alpha - a * m.sigma)

    def gain(self, m: Marginal):
        """|d x_hat / d y| = sigma / |b alpha - a sigma|, with the shape of the fields of `m`."""
        a, b = self.coefficients(m)
        return m.sigma / ops.abs(b * m.alpha - a * m.sigma)


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

    That of q(x_t | x), -noise / sigma, has it as its mean, so it can be the target (Vincent 2011; Song et al. 2021,
    arXiv:2011.13456, eq. 7). Near t = 0 the target grows as 1 / sigma; the paper's weight, sigma^2, undoes it.
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

        a = sin(u) / sigma_data,   b = -cos(u),   tan(u) = sigma / (alpha sigma_data),

    which is x_hat = c_skip z + c_out y, z = x_t / alpha, where with s = sigma / alpha

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

    the paper's velocity cos(u) z - sin(u) x in units of sigma_data, where z = sigma_data noise. On its own schedule,
    alpha = cos(u), and with sigma_data = 1, it is `Velocity`.

    Args:
        sigma_data: the standard deviation of the data.
    """

    def coefficients(self, m: Marginal):
        a, b = super().coefficients(m)
        return -a, -b


class LearnedVariance(Prediction):
    """A prediction, and with it the variance of each step (Nichol and Dhariwal 2021, arXiv:2102.09672, section 3.1).

    The network's output has twice the channels of the data. The first half is the output of `prediction`; the second
    half, v in [-1, 1], says where between its bounds the variance of the step from t to t - 1/T lies (eq. 15):

        log variance = share log(beta) + (1 - share) log(beta_tilde),   share = (v + 1) / 2,
        beta = sigma_now^2 (1 - r),   beta_tilde = sigma_then^2 (1 - r),   r = SNR_now / SNR_then.

    `solvers.DDPM("learned")` samples with it. It is trained by `extra_loss`, the bound L_vlb of eq. 16.

    Args:
        prediction: a `Prediction` or its name.
        num_steps: T, at least 2. None: the schedule's own, or 1000 on a continuous one.
        weight: the factor on L_vlb, the paper's lambda.
    """

    factor = 2

    def __init__(self, prediction="noise", num_steps: int | None = None, weight: float = 0.001):
        if num_steps is not None:
            check_integer("LearnedVariance", "num_steps", num_steps, minimum=2)
        check_number("LearnedVariance", "weight", weight, 0.0)
        self.prediction, self.num_steps, self.weight = Prediction.get(prediction), num_steps, weight
        if self.prediction.factor != 1:
            raise ValueError(
                f"LearnedVariance: `prediction` must have one output a channel, as Noise or Velocity; received: "
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

    def extra_loss(self, output, x, x_t, schedule: NoiseSchedule, m: Marginal):
        """weight T L, where L, the term of the bound at this time, has its mean held fixed (eq. 16, section 3.2):

            L = KL(q(x_then | x_now, x) || N(mean, variance)),   then = now - 1/T;
            L = -log p(x | x_now), of data in 256 levels on [-1, 1], if then = 0,

        in nats a dimension. T L, with t uniform, estimates the whole bound. The authors' code counts bits; there the
        same weight is 1.44 times as much.

        Args:
            output: the network's output, with shape `(batch, ..., 2 channels)`.
            x: data, with shape `(batch, ..., channels)`.
            x_t: noisy data, of the same shape.
            schedule: the schedule.
            m: the marginal that x_t is at; fields of shape `(batch,)` or `()`.

        Returns:
            float32, with shape `(batch,)`.
        """
        output, x, x_t = (ops.convert_to_tensor(v, "float32") for v in (output, x, x_t))
        steps = self._steps(schedule)
        place = m.t * steps
        # Rounding may put the last step, place = 1, a hair higher; it goes to t = 0 all the same.
        now, then = m.like(x), schedule.at(ops.where(place > 1.001, place - 1.0, 0.0) / steps).like(x)
        kept, fresh = bridge(now, then)
        x_hat = ops.stop_gradient(self.denoise(output, x_t, m))
        log_small = _log_posterior_variance(schedule, place, steps, x)
        log_large = 2.0 * ops.log(now.sigma) + ops.log(fresh)
        log_variance = log_small + self.share(output) * (log_large - log_small)
        divergence = _divergence(then.alpha * fresh * (x - x_hat), log_small, log_variance)
        likelihood = _log_bin(x, kept * x_t + then.alpha * fresh * x_hat, ops.exp(0.5 * log_variance))
        term = ops.where(then.t > 0, divergence, -likelihood)
        return self.weight * steps * ops.mean(term, axis=tuple(range(1, len(x.shape))))

    def _channels(self, output) -> int:
        channels = output.shape[-1]
        if channels % 2:
            raise ValueError(f"LearnedVariance: the output must have an even number of channels; received: {channels}")
        return channels // 2

    def _steps(self, schedule: NoiseSchedule) -> int:
        steps = self.num_steps or schedule.num_steps or 1000
        if steps < 2:
            raise ValueError(f"LearnedVariance: the process must have at least 2 steps; {schedule!r} has {steps}")
        return steps


def _log_posterior_variance(schedule: NoiseSchedule, place, steps: int, x):
    """log beta_tilde; in the step to t = 0, where it would be log(0), that of the step before it (section 3.1)."""
    place = ops.maximum(place, 2.0)
    now, then = schedule.at(place / steps).like(x), schedule.at((place - 1.0) / steps).like(x)
    return 2.0 * ops.log(then.sigma) + ops.log(bridge(now, then)[1])


def _divergence(error, log_true, log_model):
    """KL(N(mean + error, true) || N(mean, model)) = (log(model / true) + true / model - 1 + error^2 / model) / 2."""
    difference = log_model - log_true
    return 0.5 * (difference + ops.expm1(-difference) + error**2 * ops.exp(-log_model))


def _log_bin(x, mean, std):
    """log of what N(mean, std^2) has within 1/255 of x, the first and last of 256 bins being open (Ho et al. 2020,
    eq. 13). The mass of a bin is taken on the lower side of the mean, where it is a difference of small numbers.
    """
    half, distance = 1.0 / 255.0, ops.abs(x - mean)
    high, low = _log_cdf((half - distance) / std), _log_cdf(-(half + distance) / std)
    inside = high + ops.log(-ops.expm1(ops.minimum(low - high, -1e-7)))
    first, last = _log_cdf((x - mean + half) / std), _log_cdf((mean - x + half) / std)
    return ops.where(x < -0.999, first, ops.where(x > 0.999, last, inside))


def _log_cdf(z):
    """log of the standard normal distribution function, exact in both tails."""
    below = _log_erfc(ops.maximum(-z, 0.0) / np.sqrt(2.0)) - np.log(2.0)
    above = ops.log1p(-0.5 * ops.erfc(ops.maximum(z, 0.0) / np.sqrt(2.0)))
    return ops.where(z < 0, below, above)


def _log_erfc(z):
    """log(erfc(z)) for z >= 0; above 5 by the asymptotic series, for erfc underflows at 9."""
    near = ops.log(ops.erfc(ops.minimum(z, 5.0)))
    z = ops.maximum(z, 5.0)
    u = 0.5 / z**2
    far = -(z**2) - ops.log(z * np.sqrt(np.pi)) + ops.log1p(-u + 3.0 * u**2 - 15.0 * u**3)
    return ops.where(z > 5.0, far, near)
