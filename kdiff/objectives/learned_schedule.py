"""Training with a learned schedule, `schedules.Learned` (Kingma et al. 2021, "VDM", arXiv:2107.00630, appendix I)."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from keras import ops

from kdiff import backend
from kdiff.objectives.base import Problem
from kdiff.objectives.denoising import Denoising
from kdiff.schedules import Learned
from kdiff.times import Stratified, Uniform

__all__ = ["LearnedSchedule"]


class LearnedSchedule(Denoising):
    """Denoising that passes the losses to a `schedules.Learned`, which minimises the variance of their estimate.

        DiffusionModel(network, schedules.Learned(), "noise", weighting="variational", time_label="log_snr",
                       objective="learned_schedule")

    With a weight per log-SNR the expected loss does not depend on the schedule: with `Variational` it is the
    variational bound, in nats per dimension. The schedule may be wrapped, as in `Shifted(Learned(), 1.0)`.
    """

    def problem(self, model: Any, x, conditions: Mapping[str, Any], keys: Iterator, training: bool) -> Problem:
        if training and backend.has_numbers(x):
            # Not in `learn`: the metrics of a step belong to the schedule at its beginning.
            _learned(model.schedule).settle()
        return super().problem(model, x, conditions, keys, training)

    def learn(self, model: Any, problem: Problem, errors) -> None:
        """Passes the weighted squared error of each example to the schedule."""
        _learned(model.schedule).learn(problem.drawn.t, problem.weight * errors)

    def check(self, model: Any) -> None:
        """Raises a ValueError if the schedule is not learned, or if it would change the objective."""
        super().check(model)
        if _learned(model.schedule) is None:
            raise ValueError(f"LearnedSchedule: the schedule must be schedules.Learned(); received: {model.schedule!r}")
        if not getattr(model.weighting, "per_log_snr", False):
            raise ValueError(
                "LearnedSchedule: the weighting must be one per log-SNR, such as 'variational', or the loss would "
                f"depend on the schedule; received: {model.weighting!r}"
            )
        if not isinstance(model.times, (Uniform, Stratified)):
            raise ValueError(
                f"LearnedSchedule: times must be 'uniform' or 'stratified', since the schedule sets their density; "
                f"received: {model.times!r}"
            )
        m = model.schedule.at_log_snr(np.zeros(1, "float32"))
        labels = [ops.convert_to_numpy(model.time_label(model.schedule, m._replace(t=m.t * part))) for part in (1, 0.5)]
        if labels[0] != labels[1]:
            raise ValueError(
                "LearnedSchedule: the noise level at t changes as the schedule learns, so the network needs log-SNR "
                f"as its time, time_label='log_snr'; received: {model.time_label!r}"
            )


def _learned(schedule: Any) -> Learned | None:
    return next((part for part in schedule._flatten_layers() if isinstance(part, Learned)), None)
