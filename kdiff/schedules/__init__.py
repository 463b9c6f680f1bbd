"""Noise schedules: the amounts of signal and noise at each time. The theory is in `schedules.base`."""

from kdiff.schedules.alpha_bar import CosineAlphaBar, SigmoidAlphaBar
from kdiff.schedules.base import CLEAN_LOG_SNR, Marginal, NoiseSchedule, bridge
from kdiff.schedules.continuous import (
    Cosine,
    Laplace,
    LinearVP,
    Rectified,
    SubVP,
    Trigonometric,
    VarianceExploding,
)
from kdiff.schedules.learned import Learned
from kdiff.schedules.tables import AlphaBarTable, BetaTable, CosineBeta, LinearBeta, ScaledLinearBeta, SigmoidBeta
from kdiff.schedules.wrappers import Shifted, ZeroTerminalSNR

__all__ = [
    "CLEAN_LOG_SNR",
    "AlphaBarTable",
    "BetaTable",
    "Cosine",
    "CosineAlphaBar",
    "CosineBeta",
    "Laplace",
    "Learned",
    "LinearBeta",
    "LinearVP",
    "Marginal",
    "NoiseSchedule",
    "Rectified",
    "ScaledLinearBeta",
    "Shifted",
    "SigmoidAlphaBar",
    "SigmoidBeta",
    "SubVP",
    "Trigonometric",
    "VarianceExploding",
    "ZeroTerminalSNR",
    "bridge",
]
