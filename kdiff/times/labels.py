"""TimeLabel: the time input of a network."""

from keras import ops

from kdiff.base import Value, check_choice, check_number
from kdiff.schedules import Marginal, NoiseSchedule

__all__ = ["Index", "LogSNR", "RoundedLabel", "Scaled", "TimeLabel"]


class TimeLabel(Value):
    """The base class of time inputs of a network."""

    def __call__(self, schedule: NoiseSchedule, m: Marginal):
        """The label for the marginal `m` of `schedule`, float32, with the shape of `m.t`."""
        raise NotImplementedError


class Scaled(TimeLabel):
    """`scale` t: with 1000, the range for which sinusoidal embeddings were designed, on any schedule.

    Args:
        scale: the label at t = 1.
    """

    def __init__(self, scale: float = 1000.0):
        check_number("Scaled", "scale", scale, 1e-6)
        self.scale = scale

    def __call__(self, schedule: NoiseSchedule, m: Marginal):
        return self.scale * m.t


class Index(TimeLabel):
    """The index i = T t - 1 of a discrete process, as in DDPM."""

    def __call__(self, schedule: NoiseSchedule, m: Marginal):
        if schedule.num_steps is None:
            raise ValueError(f"Index: {schedule!r} is continuous and has no index; use Scaled or LogSNR")
        return schedule.num_steps * m.t - 1.0


class LogSNR(TimeLabel):
    """`scale` log_snr: a network with this input can be sampled on another schedule.

    Args:
        scale: the factor. -1/8 makes it EDM's c_noise = ln(sigma / alpha) / 4 (Karras et al. 2022,
            arXiv:2206.00364, table 1).
    """

    def __init__(self, scale: float = -0.125):
        self.scale = scale

    def __call__(self, schedule: NoiseSchedule, m: Marginal):
        return self.scale * m.log_snr


class RoundedLabel(TimeLabel):
    """A label rounded to an integer, for a network that was trained on integer labels.

    Args:
        label: a `TimeLabel` or its name.
        rounding: "nearest", with halves rounded to even, or "down", with a tolerance of 0.001 for the rounding errors
            of float32.
    """

    def __init__(self, label="index", rounding: str = "nearest"):
        check_choice("RoundedLabel", "rounding", rounding, ("nearest", "down"))
        self.label, self.rounding = TimeLabel.get(label), rounding

    def __call__(self, schedule: NoiseSchedule, m: Marginal):
        label = self.label(schedule, m)
        return ops.round(label) if self.rounding == "nearest" else ops.floor(label + 1e-3)
