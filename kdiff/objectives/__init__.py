"""Training objectives: each turns a clean batch into the regression problem of a training step."""

from kdiff import deprecated as _deprecated
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
from kdiff.objectives.flow_maps import MeanFlow, Shortcut
from kdiff.objectives.given_noise import Reflow
from kdiff.objectives.halving import ProgressiveDistillation
from kdiff.objectives.latent_consistency import LCM
from kdiff.objectives.learned_schedule import LearnedSchedule
from kdiff.objectives.loss_aware import LossAware, LossAwareBound
from kdiff.objectives.matching import DistributionMatching
from kdiff.objectives.pairing import Consistency, Discretised, Easy, Pairs
from kdiff.objectives.tangential import SCM
from kdiff.objectives.taught import Taught

__all__ = [
    "LCM",
    "POINTS",
    "SCM",
    "Consistency",
    "Denoising",
    "Discretised",
    "DistributionMatching",
    "Drawn",
    "Easy",
    "LearnedSchedule",
    "LossAware",
    "LossAwareBound",
    "MeanFlow",
    "Objective",
    "Pairs",
    "Problem",
    "ProgressiveDistillation",
    "Recipe",
    "Reflow",
    "Shortcut",
    "Taught",
    "VariationalBound",
    "effective_weight",
    "loss_weight",
    "plot_objective",
    "same_objective",
    "variance_bound",
]

__getattr__ = _deprecated.names(__name__, Distillation="ProgressiveDistillation", TangentConsistency="SCM")
