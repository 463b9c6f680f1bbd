"""Times: which t a network is trained at, which it is sampled at, and how it is told.

TimeSampler   (schedule, batch, key) -> t        random times for a training batch, float32, shape `(batch,)`
TimeGrid      (schedule, steps) -> t             the times of a sampling run, float64, decreasing, from noise to 0
TimeLabel     (schedule, marginal) -> label      what the network sees as time
"""

import numpy as np
from keras import ops

from kdiff import random
from kdiff.base import Value, check_integer, check_number
from kdiff.schedules import Marginal, NoiseSchedule


class TimeSampler(Value):
    """The base of the training times' distributions."""

    def __call__(self, schedule: NoiseSchedule, batch, key):
        """Random times.

        Args:
            schedule: the schedule that they are for.
            batch: how many; a number or a tensor.
            key: the stream to draw from (`kdiff.random`), int32, shape `(2,)`.

        Returns:
            float32 times in [0, 1], with shape `(batch,)`.
        """
        raise NotImplementedError


class Uniform(TimeSampler):
    """Independent t, uniform in [0, 1)."""

    def __call__(self, schedule: NoiseSchedule, batch, key):
        """u."""
        return random.uniform(key, (batch,))


class Discrete(TimeSampler):
    """Independent t, uniform among the steps of a discrete process: t = (i + 1) / T, i = 0 ... T - 1 (DDPM, alg. 1).

    Args:
        num_steps: T. None takes the schedule's own; a continuous schedule has none.
    """

    def __init__(self, num_steps: int | None = None):
        if num_steps is not None:
            check_integer("Discrete", "num_steps", num_steps)
        self.num_steps = num_steps

    def __call__(self, schedule: NoiseSchedule, batch, key):
        """(floor(T u) + 1) / T."""
        num_steps = self.num_steps or schedule.num_steps
        if num_steps is None:
            raise ValueError(f"Discrete: {schedule!r} is continuous; give `num_steps`, or use Uniform or Stratified")
        return (ops.floor(random.uniform(key, (batch,)) * num_steps) + 1.0) / num_steps


class Stratified(TimeSampler):
    """One t in each of `batch` equal parts of [0, 1): a batch covers all noise levels evenly.

        t_n = (k_n + u_n) / batch,    k_n = (n + offset) mod batch

    Each t alone is still uniform, and the variance of the loss falls (Kingma et al. 2021, appendix I.1). The random
    offset keeps the place in the batch and the noise level independent.
    """

    def __call__(self, schedule: NoiseSchedule, batch, key):
        """(k + u) / batch."""
        u = random.uniform(key, (batch + 1,))
        size = ops.cast(batch, "float32")
        part = (ops.cast(ops.arange(batch, dtype="int32"), "float32") + ops.floor(u[0] * size)) % size
        return (part + u[1:]) / size


class TimeGrid(Value):
    """The base of the sampling times.

    Most grids are defined on the T steps of a discrete process, at t = (i + 1) / T. On a continuous schedule they are
    read with T = `resolution`.
    """

    resolution = 1000

    def default_steps(self, schedule: NoiseSchedule) -> int:
        """The number of steps of a run that names none: 50, or all that the schedule has if they are fewer."""
        return min(50, schedule.num_steps or 50)

    def __call__(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        """The times of a run of `steps` steps.

        Returns:
            float64 times, strictly decreasing, that end at 0, with shape `(steps + 1,)`.

        Raises:
            ValueError: if `steps` is not a whole number of at least 1, or exceeds the schedule's own.
        """
        check_integer(type(self).__name__, "steps", steps)
        if schedule.num_steps is not None and steps > schedule.num_steps:
            raise ValueError(
                f"{type(self).__name__}: `steps` must be at most {schedule.num_steps}, the number that "
                f"{schedule!r} has; received: {steps}"
            )
        num_steps = schedule.num_steps or max(self.resolution, steps)
        return np.append((self.indices(num_steps, steps) + 1.0) / num_steps, 0.0)

    def indices(self, num_steps: int, steps: int) -> np.ndarray:
        """Which of the steps 0 ... `num_steps` - 1 are taken, decreasing, with shape `(steps,)`."""
        raise NotImplementedError


class All(TimeGrid):
    """Every step of a discrete process: i = T - 1 ... 0, as DDPM samples. `steps` must be T."""

    def default_steps(self, schedule: NoiseSchedule) -> int:
        """T."""
        return schedule.num_steps or self.resolution

    def indices(self, num_steps: int, steps: int) -> np.ndarray:
        """T - 1 ... 0."""
        if steps != num_steps:
            raise ValueError(f"All: `steps` must be {num_steps}, every step that there is; received: {steps}")
        return np.arange(num_steps)[::-1]


class Leading(TimeGrid):
    """i = (steps - 1 ... 0) floor(T / steps) + offset: begins below the last step, as DDIM's code does.

    Lin et al. 2024, arXiv:2305.08891, table 2, names the three spacings and shows what this one loses.

    Args:
        offset: is added to each i. Stable Diffusion uses 1.
    """

    def __init__(self, offset: int = 0):
        check_integer("Leading", "offset", offset, minimum=0)
        self.offset = offset

    def indices(self, num_steps: int, steps: int) -> np.ndarray:
        """(steps - 1 ... 0) floor(T / steps) + offset."""
        indices = np.arange(steps)[::-1] * (num_steps // steps) + self.offset
        if indices[0] >= num_steps:
            raise ValueError(
                f"Leading: `offset` must be at most {num_steps - 1 - indices[0] + self.offset} with {steps} steps "
                f"of {num_steps}; received: {self.offset}"
            )
        return indices


class Trailing(TimeGrid):
    """i = round(T - k T / steps) - 1, k = 0 ... steps - 1: begins at the last step (Lin et al. 2024, table 2).

    On a continuous schedule, without rounding: t = 1 - k / steps.
    """

    def __call__(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        """t = 1 ... 0 in equal steps, to the nearest step of a discrete process."""
        if schedule.num_steps is None:
            check_integer("Trailing", "steps", steps)
            return np.arange(steps, -1, -1) / steps
        return super().__call__(schedule, steps)

    def indices(self, num_steps: int, steps: int) -> np.ndarray:
        """round(T - k T / steps) - 1."""
        return np.round(num_steps - np.arange(steps) * (num_steps / steps)) - 1


class Linspace(TimeGrid):
    """i = round of `steps` equal spaces from T - 1 to 0: takes both ends (Lin et al. 2024, table 2)."""

    def indices(self, num_steps: int, steps: int) -> np.ndarray:
        """round(linspace(T - 1, 0, steps))."""
        return np.round(np.linspace(num_steps - 1, 0, steps))


class TimeLabel(Value):
    """The base of what a network sees as time."""

    def __call__(self, schedule: NoiseSchedule, m: Marginal):
        """The label of the marginal `m` of `schedule`; float32, of the shape of `m.t`."""
        raise NotImplementedError


class Scaled(TimeLabel):
    """`scale` t: with 1000, in the range that sinusoidal embeddings were made for, whatever the schedule.

    Args:
        scale: the label at t = 1.
    """

    def __init__(self, scale: float = 1000.0):
        check_number("Scaled", "scale", scale, 1e-6)
        self.scale = scale

    def __call__(self, schedule: NoiseSchedule, m: Marginal):
        """scale t."""
        return self.scale * m.t


class Index(TimeLabel):
    """The index i = T t - 1 of a discrete process, as DDPM's network sees it."""

    def __call__(self, schedule: NoiseSchedule, m: Marginal):
        """T t - 1."""
        if schedule.num_steps is None:
            raise ValueError(f"Index: {schedule!r} is continuous and has no index; use Scaled or LogSNR")
        return schedule.num_steps * m.t - 1.0


class LogSNR(TimeLabel):
    """`scale` log_snr: a network labelled so can be sampled under another schedule.

    Args:
        scale: the factor. -1/8 makes it EDM's c_noise = ln(sigma / alpha) / 4 (Karras et al. 2022,
            arXiv:2206.00364, table 1).
    """

    def __init__(self, scale: float = -0.125):
        self.scale = scale

    def __call__(self, schedule: NoiseSchedule, m: Marginal):
        """scale log_snr."""
        return self.scale * m.log_snr
