"""Loss weights: how much each noise level counts.

A weighting is a function of the log-SNR l that multiplies |x_hat - x|^2. The network's own loss is an error of its
output, so the model multiplies the weight by `prediction.gain(m)^2`: one class serves every parametrisation. No
weighting at all is the simple loss of DDPM: every output counts the same, whatever the network predicts.

Some weightings are stated for an integral over l, as the variational bound is, and not for random times. With
`per_log_snr` the loss is divided by the density of l, so that neither the schedule nor the times change it
(`kdiff.objectives`). In terms of SNR = exp(l) = alpha^2 / sigma^2,

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
    """The base of all loss weights. A new one defines `__call__` alone.

    Attributes:
        per_log_snr: whether the loss is an integral over log-SNR, and is divided by its density for random times.
    """

    per_log_snr: bool = False

    def __call__(self, log_snr):
        """The weight of |x_hat - x|^2 at this log-SNR; float32, of the same shape."""
        raise NotImplementedError


class MinSNR(Weighting):
    """min(SNR, gamma) (Hang et al. 2023, arXiv:2303.09556, eq. 6).

    For a network that predicts the noise this is min(SNR, gamma) / SNR; for one that predicts the velocity it is
    min(SNR, gamma) / (SNR + 1).

    Args:
        gamma: the SNR from which on all levels count the same.
    """

    def __init__(self, gamma: float = 5.0):
        check_number("MinSNR", "gamma", gamma, 0.0)
        self.gamma = gamma

    def __call__(self, log_snr):
        return ops.minimum(_snr(log_snr), self.gamma)


class SoftMinSNR(Weighting):
    """SNR gamma / (SNR + gamma): half the harmonic mean of the two, min-SNR without its corner (Crowson et al. 2024,
    "Hourglass diffusion transformers", arXiv:2401.11605).

    Args:
        gamma: the weight at high SNR, above 0.
    """

    def __init__(self, gamma: float = 4.0):
        check_number("SoftMinSNR", "gamma", gamma, 1e-6)
        self.gamma = gamma

    def __call__(self, log_snr):
        """SNR gamma / (SNR + gamma), written gamma sigmoid(log_snr - log(gamma))."""
        return self.gamma * ops.sigmoid(_tensor(log_snr) - math.log(self.gamma))


class P2(Weighting):
    """SNR / (k + SNR)^gamma: perception prioritised training, where the noise error has 1 / (k + SNR)^gamma (Choi et
    al. 2022, arXiv:2204.00227, eq. 8).

    Args:
        k: above 0; bounds the weight at low SNR.
        gamma: 0 is the simple loss of a network that predicts the noise.
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

    With EDM's own parametrisation it is the plain squared error of the network.

    Args:
        sigma_data: sd, the standard deviation of the data.
    """

    def __init__(self, sigma_data: float = 0.5):
        check_number("EDM", "sigma_data", sigma_data, 1e-3)
        self.sigma_data = sigma_data

    def __call__(self, log_snr):
        return _snr(log_snr) + 1.0 / self.sigma_data**2


class Velocity(Weighting):
    """SNR + 1: the plain squared error of the velocity (Salimans and Ho 2022, arXiv:2202.00512, section 4)."""

    def __call__(self, log_snr):
        return _snr(log_snr) + 1.0


class Uniform(Weighting):
    """1 / gain^2: the plain squared error of one parametrisation, whatever the network predicts (Kingma and Gao 2023,
    arXiv:2303.00848, table 1, states the plain losses of the noise, the velocity and the flow as weights in this way).

    Args:
        prediction: a `Prediction` or its name, as of a variance preserving schedule. Only of `Velocity` and `Score`
            does the normalisation matter.
    """

    def __init__(self, prediction="noise"):
        self.prediction = Prediction.get(prediction)

    def __call__(self, log_snr):
        log_snr = _tensor(log_snr)
        alpha, sigma = ops.sqrt(ops.sigmoid(log_snr)), ops.sqrt(ops.sigmoid(-log_snr))
        return 1.0 / self.prediction.gain(Marginal(None, alpha, sigma, log_snr)) ** 2


class SigmaSqrt(Weighting):
    """1 / r^2 on the loss of rectified flow, r = sigma / (alpha + sigma) = sigmoid(-log_snr / 2), so 1 / r^4 on x_hat.

    It is "sigma_sqrt" of diffusers' training scripts for Stable Diffusion 3 (2024). Where these turn the output into
    x_hat first, they apply the same 1 / r^2 to its error: the plain loss of rectified flow, `Uniform("flow")`.

    The weight grows as SNR^2, so that it wants a schedule, or times, that keep away from t = 0.
    """

    def __call__(self, log_snr):
        return _sigma(log_snr) ** -4


class CosMap(Weighting):
    """2 / (pi (1 - 2 r + 2 r^2)) on the loss of rectified flow, and 1 / r^2 times that on x_hat, r = sigma / (alpha +
    sigma): gives rectified flow's noise levels the share that a cosine schedule has of them (Esser et al. 2024,
    arXiv:2403.03206, eq. 21, there a density of times).
    """

    def __call__(self, log_snr):
        r = _sigma(log_snr)
        return 2.0 / (math.pi * (1.0 - 2.0 * r + 2.0 * r**2) * r**2)


class Variational(Weighting):
    """SNR / 2 per unit of log-SNR: the diffusion loss of the variational bound, in nats (Kingma et al. 2021,
    arXiv:2107.00630, eq. 18, for a sum over all coordinates):

        L = 1/2 integral of SNR |x_hat - x|^2 dl = 1/2 integral of |noise_hat - noise|^2 dl,        l = log_snr
    """

    per_log_snr = True

    def __call__(self, log_snr):
        return 0.5 * _snr(log_snr)


class Likelihood(Variational):
    """g(t)^2 / 2 on the error of the score (Song et al. 2021, "Maximum likelihood training", arXiv:2101.09258, eq. 7).

    It is `Variational` in other words. On any schedule g^2 = -sigma^2 dl/dt, and an error of the score is alpha /
    sigma^2 times one of x_hat, so that

        g^2 |score_hat - score|^2 dt = sigma^2 (alpha / sigma^2)^2 |x_hat - x|^2 |dl| = SNR |x_hat - x|^2 |dl|.
    """


class Sigmoid(Weighting):
    """SNR sigmoid(bias - log_snr) / 2 per unit of log-SNR (Kingma and Gao 2023, arXiv:2303.00848; Hoogeboom et al.
    2024, "Simpler diffusion", arXiv:2410.19324): the variational bound, without what the eye does not see.

    Args:
        bias: the log-SNR from which on the weight of x_hat stays constant; without end it is `Variational`.
    """

    per_log_snr = True

    def __init__(self, bias: float = 0.0):
        check_number("Sigmoid", "bias", bias, -40.0, 40.0)
        self.bias = bias

    def __call__(self, log_snr):
        """SNR sigmoid(bias - log_snr) / 2, written exp(bias) sigmoid(log_snr - bias) / 2."""
        return 0.5 * math.exp(self.bias) * ops.sigmoid(_tensor(log_snr) - self.bias)


def _tensor(log_snr):
    return ops.convert_to_tensor(log_snr, "float32")


def _snr(log_snr):
    return ops.exp(_tensor(log_snr))


def _sigma(log_snr):
    """sigma of the rectified schedule, t: sigmoid(-log_snr / 2)."""
    return ops.sigmoid(-0.5 * _tensor(log_snr))
