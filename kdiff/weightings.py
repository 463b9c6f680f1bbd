"""Loss weights: how much each noise level counts.

A weighting is a function of the log-SNR that multiplies |x_hat - x|^2. The network's own loss is an error of its
output, so the model multiplies the weight by `prediction.gain(m)^2`: one class serves every parametrisation. No
weighting at all is the simple loss of DDPM: every output counts the same, whatever the network predicts.
"""

from keras import ops

from kdiff.base import Value, check_number


class Weighting(Value):
    """The base of all loss weights. A new one defines `__call__` alone."""

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
        """min(exp(log_snr), gamma)."""
        return ops.minimum(ops.exp(log_snr), self.gamma)
