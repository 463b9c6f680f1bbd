"""A schedule that is learned in training (Kingma et al. 2021, "VDM", arXiv:2107.00630, section 5.1 and appendix I).

In continuous time the variational bound depends on the schedule only through its endpoints, but the variance of its
Monte Carlo estimate depends on the whole schedule. For a loss h(l) per unit of l = log_snr and uniform t, the estimate
is h(l) / p(l), where p(l) = |dt / dl|. Its mean is the integral of h for any p, and its second moment, the integral of
E[h^2] / p, is smallest if

    p(l)  is proportional to  sqrt(E[h(l)^2]).

VDM uses a monotone network for l(t) and descends the gradient of that moment. Here t(l) is piecewise linear, and the
probability of each piece follows from the moments of h, so no gradient is needed. The moments are running means. They
are weights of the schedule: saved with the model, but not averaged and not updated by an optimizer.
"""

import keras
from keras import ops

from kdiff.base import check_integer, check_number
from kdiff.schedules.base import NoiseSchedule
from kdiff.schedules.continuous import check_range

__all__ = ["Learned"]


class Learned(NoiseSchedule):
    """A piecewise linear, variance preserving schedule, learned by the objective `LearnedSchedule` (VDM):

        log_snr = l_k - width (t - c_k) / p_k   in part k,    l_k = max_log_snr - k width,    c_k = p_0 + ... + p_(k-1).

    All parts have the same width in log-SNR. Before training p_k = 1 / parts, and log_snr is linear in t. Any other
    objective leaves the schedule unchanged. The schedule is equal only to itself, since a copy has other weights.

    Args:
        min_log_snr: the log-SNR at t = 1, which is fixed, as is that at t = 0. The defaults are VDM's initial values.
        max_log_snr: the log-SNR at t = 0.
        parts: the number of parts.
        floor: the fraction of the probability that is spread evenly over the parts, in (0, 1]: p_k is at least
            floor / parts, so log_snr always decreases, and no loss is weighted by more than parts / floor.
        rate: the update rate of the running means, in (0, 1]; they average over about 1 / rate losses.
    """

    def __init__(
        self,
        min_log_snr: float = -5.0,
        max_log_snr: float = 13.3,
        parts: int = 32,
        floor: float = 0.05,
        rate: float = 0.002,
    ):
        super().__init__()
        check_range("Learned", min_log_snr, max_log_snr)
        check_integer("Learned", "parts", parts, minimum=2)
        check_number("Learned", "floor", floor, 1e-3, 1.0)
        check_number("Learned", "rate", rate, 1e-6, 1.0)
        self.min_log_snr, self.max_log_snr = min_log_snr, max_log_snr
        self.parts, self.floor, self.rate = parts, floor, rate
        self.width = (max_log_snr - min_log_snr) / parts
        self.moments = self._state("moments", 0.0)  # running means of squares, initially 0
        self.known = self._state("known", 0.0)  # the same running means of 1, which correct the bias of these
        self.p = self._state("p", 1.0 / parts)

    def _state(self, name: str, value: float):
        initializer = keras.initializers.Constant(value)
        return self.add_weight(name=name, shape=(self.parts,), initializer=initializer, trainable=False)

    def best(self):
        """The optimal p_k for the losses so far, `(parts,)`; a part without losses uses the mean of the others."""
        moments, known = self.moments.value, self.known.value
        mean = ops.sum(moments) / ops.maximum(ops.sum(known), 1e-30)
        size = ops.sqrt(ops.where(known > 0.0, moments / ops.maximum(known, 1e-30), mean))
        total = ops.sum(size)
        learned = ops.where(total > 0.0, size / ops.where(total > 0.0, total, 1.0), 1.0 / self.parts)
        return (1.0 - self.floor) * learned + self.floor / self.parts

    def learn(self, t, losses) -> None:
        """Updates the running means by losses at uniform times; the schedule changes when `settle` is called.

        Args:
            t: the times, with shape `(batch,)`.
            losses: h(log_snr) / p(log_snr) at these times, with shape `(batch,)`; values that are not finite are
                ignored.
        """
        p, begins = self._steps()
        k = self._part(ops.convert_to_tensor(t, "float32"), begins)
        squares = (ops.stop_gradient(ops.convert_to_tensor(losses, "float32")) * ops.take(p, k)) ** 2
        finite = ops.isfinite(squares)
        here = ops.one_hot(k, self.parts, dtype="float32") * ops.cast(finite, "float32")[:, None]
        count = ops.sum(here, axis=0)
        mean = ops.sum(here * ops.where(finite, squares, 0.0)[:, None], axis=0) / ops.maximum(count, 1.0)
        kept = (1.0 - self.rate) ** count
        self.moments.assign(kept * self.moments.value + (1.0 - kept) * mean)
        self.known.assign(kept * self.known.value + (1.0 - kept))

    def settle(self) -> None:
        """Sets p_k to the optimum for the losses so far."""
        self.p.assign(self.best())

    def log_snr(self, t):
        t = ops.convert_to_tensor(t, "float32")
        p, begins = self._steps()
        k = self._part(t, begins)
        inside = (t - ops.take(begins, k)) / ops.take(p, k)
        return self.max_log_snr - self.width * (ops.cast(k, "float32") + inside)

    def time(self, log_snr):
        """c_k + p_k (l_k - log_snr) / width."""
        place = (self.max_log_snr - ops.convert_to_tensor(log_snr, "float32")) / self.width
        p, begins = self._steps()
        k = ops.clip(ops.cast(ops.floor(place), "int32"), 0, self.parts - 1)
        return ops.take(begins, k) + ops.take(p, k) * (place - ops.cast(k, "float32"))

    def slope(self, t):
        """-width / p_k."""
        p, begins = self._steps()
        return -self.width / ops.take(p, self._part(ops.convert_to_tensor(t, "float32"), begins))

    def _steps(self):
        """(p_k, c_k), normalised so that the last part ends at exactly 1 in float32."""
        p = self.p.value
        until = ops.cumsum(p)
        return p / until[-1], ops.concatenate([ops.zeros((1,)), until[:-1] / until[-1]])

    @staticmethod
    def _part(t, begins):
        """The k of each t, int32."""
        return ops.sum(ops.cast(t[..., None] >= begins[1:], "int32"), axis=-1)
