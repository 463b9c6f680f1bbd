"""Objectives: what a network learns. Each makes of a clean batch the problem that a training step solves."""

from kdiff.objectives.base import Drawn, Objective, Problem
from kdiff.objectives.denoising import Denoising, VariationalBound, variance_bound
from kdiff.objectives.effective_weight import (
    POINTS,
    Recipe,
    effective_weight,
    loss_weight,
    plot_objective,
    same_objective,
)
from kdiff.objectives.learned_schedule import LearnedSchedule
from kdiff.objectives.loss_aware import LossAware

__all__ = [
    "POINTS",
    "Denoising",
    "Drawn",
    "LearnedSchedule",
    "LossAware",
    "Objective",
    "Problem",
    "Recipe",
    "VariationalBound",
    "effective_weight",
    "loss_weight",
    "plot_objective",
    "same_objective",
    "variance_bound",
]
