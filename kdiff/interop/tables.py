"""Schedules as diffusers has them, where kdiff's own differ; they have no names to `get` them by."""

import numpy as np

from kdiff.schedules import AlphaBarTable, NoiseSchedule

__all__ = ["NearlyZeroSNR"]


class NearlyZeroSNR(AlphaBarTable):
    """`ZeroTerminalSNR` of a table, as the schedulers of diffusers that divide by alpha have it: alpha^2 = 2^-24 at T.

    Steps before it that would have less are raised to a hair more; in diffusers they stay.

    Args:
        schedule: a discrete schedule, by a table, or its name.
    """

    named = False

    def __init__(self, schedule):
        schedule = NoiseSchedule.get(schedule)
        alpha = np.exp(-0.5 * np.logaddexp(0.0, -schedule.log_snrs[1:]))  # sqrt(sigmoid(log-SNR))
        with np.errstate(invalid="ignore"):  # of one step nothing is left
            alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        super().__init__(np.maximum(alpha**2, 2.0**-24 * (1.0 + 1e-4 * np.arange(len(alpha))[::-1])))
        self.schedule = schedule
