"""Loss weights: the weight of each noise level in training.

A weighting is a function of the log-SNR l that multiplies |x_hat - x|^2. The training loss is an error of the network's
output, so the model multiplies the weight by `prediction.gain(m)^2`: one class serves every parametrisation. Without a
weighting the loss is the simple loss of DDPM, the unweighted error of the output.

Some weightings, such as the variational bound, are defined for an integral over l rather than for random times. If
`per_log_snr` is true, the loss is divided by the density of l, so that it depends neither on the schedule nor on the
distribution of times (`kdiff.objectives`). In terms of SNR = exp(l) = alpha^2 / sigma^2,

| class              | weight of abs(x_hat - x)^2          | of abs(noise_hat - noise)^2          | per unit of l |
|--------------------|-------------------------------------|--------------------------------------|---------------|
| MinSNR(g)          | min(SNR, g)                         | min(SNR, g) / SNR                    | no            |
| SoftMinSNR(g)      | SNR g / (SNR + g)                   | g / (SNR + g)                        | no            |
| P2(k, g)           | SNR / (k + SNR)^g                   | 1 / (k + SNR)^g                      | no            |
| TruncatedSNR       | max(SNR, 1)                         | max(1, 1 / SNR)                      | no            |
| EDM(s)             | SNR + 1 / s^2                       | 1 + 1 / (s^2 SNR)                    | no            |
| Velocity           | SNR + 1                             | 1 + 1 / SNR                          | no            |
| Uniform(p)         | 1 / gain^2                          | 1 / (SNR gain^2)                     | no            |
| SigmaSqrt          | 1 / r^4, r = sigmoid(-l / 2)        | 1 / (SNR r^4)                        | no            |
| CosMap             | 2 / (pi (1 - 2 r + 2 r^2) r^2)      | the same / SNR                       | no            |
| Variational        | SNR / 2                             | 1 / 2                                | yes           |
| Likelihood         | SNR / 2                             | 1 / 2                                | yes           |
| Sigmoid(b)         | SNR sigmoid(b - l) / 2              | sigmoid(b - l) / 2                   | yes           |
"""

import math

from keras import ops

from kdiff.base import Value, check_number
from kdiff.predictions import Prediction
from kdiff.schedules import Marginal

__all__ = [
    "EDM",
    "P2",
    "CosMap",
    "Likelihood",
    "MinSNR",
    "SigmaSqrt",
    "Sigmoid",
    "SoftMinSNR",
    "TruncatedSNR",
    "Uniform",
    "Variational",
    "Velocity",
    "Weighting",
]


class Weighting(Value):
    """The base class of all loss weights. A new one defines only `__call__`.

    Attributes:
        per_log_snr: whether the weight is that of an integral over log-SNR, so that the loss at random times is divided
            by the density of log-SNR.
    """

    per_log_snr: bool = False

    def __call__(self, log_snr):
        """The weight of |x_hat - x|^2 at this log-SNR, float32, with the same shape."""
        raise NotImplementedError


class MinSNR(Weighting):
    """min(SNR, gamma) (Hang et al. 2023, arXiv:2303.09556, eq. 6).

    For a network that predicts the noise this is min(SNR, gamma) / SNR; for one that predicts the velocity it is
    min(SNR, gamma) / (SNR + 1).

    Args:
        gamma: the SNR above which the weight of x_hat is constant.
    """

    def __init__(self, gamma: float = 5.0):
        check_number("MinSNR", "gamma", gamma, 0.0)
        self.gamma = gamma

    def __call__(self, log_snr):
        return ops.minimum(_snr(log_snr), self.gamma)


class SoftMinSNR(Weighting):
    """SNR gamma / (SNR + gamma), a smooth variant of min-SNR (Crowson et al. 2024, "Hourglass diffusion transformers",
    arXiv:2401.11605).

    Args:
        gamma: the weight at high SNR, above 0.
    """

    def __init__(self, gamma: float = 4.0):
        check_number("SoftMinSNR", "gamma", gamma, 1e-6)
        self.gamma = gamma

    def __call__(self, log_snr):
        """SNR gamma / (SNR + gamma), computed as gamma sigmoid(log_snr - log(gamma))."""
        return self.gamma * ops.sigmoid(_tensor(log_snr) - math.log(self.gamma))


class P2(Weighting):
    """SNR / (k + SNR)^gamma, perception prioritised (P2) weighting: 1 / (k + SNR)^gamma on the error of the noise
    (Choi et al. 2022, arXiv:2204.00227, eq. 8).

    Args:
        k: bounds the weight at low SNR; above 0.
        gamma: the strength; 0 gives the simple loss of a network that predicts the noise.
    """

    def __init__(self, k: float = 1.0, gamma: float = 1.0):
        check_number("P2", "k", k, 1e-6)
        check_number("P2", "gamma", gamma, 0.0)
        self.k, self.gamma = k, gamma

    def __call__(self, log_snr):
        snr = _snr(log_snr)
        return snr / (self.k + snr) ** self.gamma


class TruncatedSNR(Weighting):
    """max(SNR, 1) (Salimans and Ho 2022, "Progressive distillation", arXiv:2202.00512, section 4)."""

    def __call__(self, log_snr):
        return ops.maximum(_snr(log_snr), 1.0)


class EDM(Weighting):
    """(s^2 + sd^2) / (s sd)^2 = SNR + 1 / sd^2, s = sigma / alpha (Karras et al. 2022, arXiv:2206.00364, table 1).

    With EDM's parametrisation, `predictions.Karras`, it is the unweighted squared error of the network.

    Args:
        sigma_data: sd, the standard deviation of the data.
    """

    def __init__(self, sigma_data: float = 0.5):
        check_number("EDM", "sigma_data", sigma_data, 1e-3)
        self.sigma_data = sigma_data

    def __call__(self, log_snr):
        return _snr(log_snr) + 1.0 / self.sigma_data**2


class Velocity(Weighting):
    """SNR + 1: the unweighted squared error of the velocity (Salimans and Ho 2022, arXiv:2202.00512, section 4)."""

    def __call__(self, log_snr):
        return _snr(log_snr) + 1.0


class Uniform(Weighting):
    """1 / gain^2: the unweighted squared error of one parametrisation, whatever the network predicts (Kingma and Gao
    2023, arXiv:2303.00848, table 1, state the losses of the noise, the velocity and the flow as weights in this way).

    Args:
        prediction: a `Prediction` or its name, on a variance preserving schedule. The normalisation matters only for
            `Velocity` and `Score`.
    """

    def __init__(self, prediction="noise"):
        self.prediction = Prediction.get(prediction)

    def __call__(self, log_snr):
        log_snr = _tensor(log_snr)
        alpha, sigma = ops.sqrt(ops.sigmoid(log_snr)), ops.sqrt(ops.sigmoid(-log_snr))
        return 1.0 / self.prediction.gain(Marginal(None, alpha, sigma, log_snr)) ** 2


class SigmaSqrt(Weighting):
    """1 / r^2 on the loss of rectified flow, r = sigma / (alpha + sigma) = sigmoid(-log_snr / 2): 1 / r^4 on x_hat.

    It is "sigma_sqrt" in the training scripts of diffusers for Stable Diffusion 3 (2024). Those that convert the output
    to x_hat first apply the same 1 / r^2 to its error, which is the unweighted loss of rectified flow,
    `Uniform("flow")`.

    The weight grows as SNR^2, so it requires a schedule, or training times, that avoid t = 0.
    """

    def __call__(self, log_snr):
        return _sigma(log_snr) ** -4


class CosMap(Weighting):
    """2 / (pi (1 - 2 r + 2 r^2)) on the loss of rectified flow, and 1 / r^2 times that on x_hat, with r = sigma /
    (alpha + sigma): it gives the noise levels of rectified flow the density that they have under a cosine schedule
    (Esser et al. 2024, arXiv:2403.03206, eq. 21, stated there as a density of times).
    """

    def __call__(self, log_snr):
        r = _sigma(log_snr)
        return 2.0 / (math.pi * (1.0 - 2.0 * r + 2.0 * r**2) * r**2)


class Variational(Weighting):
    """SNR / 2 per unit of log-SNR: the diffusion loss of the variational bound, in nats, summed over all coordinates
    (Kingma et al. 2021, arXiv:2107.00630, eq. 18):

        L = 1/2 integral of SNR |x_hat - x|^2 dl = 1/2 integral of |noise_hat - noise|^2 dl,        l = log_snr
    """

    per_log_snr = True

    def __call__(self, log_snr):
        return 0.5 * _snr(log_snr)


class Likelihood(Variational):
    """g(t)^2 / 2 on the error of the score (Song et al. 2021, "Maximum likelihood training", arXiv:2101.09258, eq. 7).

    It is equivalent to `Variational`: on any schedule g^2 = -sigma^2 dl/dt, and the error of the score is alpha /
    sigma^2 times that of x_hat, so that

        g^2 |score_hat - score|^2 dt = sigma^2 (alpha / sigma^2)^2 |x_hat - x|^2 |dl| = SNR |x_hat - x|^2 |dl|.
    """


class Sigmoid(Weighting):
    """SNR sigmoid(bias - log_snr) / 2 per unit of log-SNR (Kingma and Gao 2023, arXiv:2303.00848; Hoogeboom et al.
    2024, "Simpler diffusion", arXiv:2410.19324): the variational bound with less weight on imperceptible detail.

    Args:
        bias: the log-SNR above which the weight of x_hat is constant; in the limit of a large bias it is `Variational`.
    """

    per_log_snr = True

    def __init__(self, bias: float = 0.0):
        check_number("Sigmoid", "bias", bias, -40.0, 40.0)
        self.bias = bias

    def __call__(self, log_snr):
        """SNR sigmoid(bias - log_snr) / 2, computed as exp(bias) sigmoid(log_snr - bias) / 2."""
        return 0.5 * math.exp(self.bias) * ops.sigmoid(_tensor(log_snr) - self.bias)


def _tensor(log_snr):
    return ops.convert_to_tensor(log_snr, "float32")


def _snr(log_snr):
    return ops.exp(_tensor(log_snr))


def _sigma(log_snr):
    """The sigma of the rectified schedule: sigmoid(-log_snr / 2)."""
    return ops.sigmoid(-0.5 * _tensor(log_snr))
