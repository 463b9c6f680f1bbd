"""Training that shapes its schedule, `schedules.Learned` (Kingma et al. 2021, "VDM", arXiv:2107.00630, appendix I)."""

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
    """Denoising that tells a `schedules.Learned` the losses, so that their estimate varies as little as it can.

        DiffusionModel(network, schedules.Learned(), "noise", weighting="variational", time_label="log_snr",
                       objective="learned_schedule")

    With a weight per log-SNR the expected loss is the same all the while: with `Variational` it is that of the
    variational bound, in nats a dimension. The schedule may be inside another, as in `Shifted(Learned(), 1.0)`.
    """

    def problem(self, model: Any, x, conditions: Mapping[str, Any], keys: Iterator, training: bool) -> Problem:
        if training and backend.has_numbers(x):
            # Not when it learns: what is measured of a step is of the schedule that it began with.
            _learned(model.schedule).settle()
        return super().problem(model, x, conditions, keys, training)

    def learn(self, model: Any, problem: Problem, errors) -> None:
        """Notes the squared error of each example, with its weight."""
        _learned(model.schedule).learn(problem.drawn.t, problem.weight * errors)

    def check(self, model: Any) -> None:
        """Raises a ValueError if the schedule does not learn, or what it learns would change what is trained."""
        super().check(model)
        if _learned(model.schedule) is None:
            raise ValueError(f"LearnedSchedule: the schedule must be schedules.Learned(); received: {model.schedule!r}")
        if not getattr(model.weighting, "per_log_snr", False):
            raise ValueError(
                "LearnedSchedule: the weighting must be one per log-SNR, such as 'variational', or the loss would "
                f"follow the schedule; received: {model.weighting!r}"
            )
        if not isinstance(model.times, (Uniform, Stratified)):
            raise ValueError(
                f"LearnedSchedule: times must be 'uniform' or 'stratified', for the schedule spreads them; received: "
                f"{model.times!r}"
            )
        m = model.schedule.at_log_snr(np.zeros(1, "float32"))
        labels = [ops.convert_to_numpy(model.time_label(model.schedule, m._replace(t=m.t * part))) for part in (1, 0.5)]
        if labels[0] != labels[1]:
            raise ValueError(
                "LearnedSchedule: t means another noise level as the schedule learns, so the network must be told the "
                f"log-SNR, time_label='log_snr'; received: {model.time_label!r}"
            )


def _learned(schedule: Any) -> Learned | None:
    return next((part for part in schedule._flatten_layers() if isinstance(part, Learned)), None)
