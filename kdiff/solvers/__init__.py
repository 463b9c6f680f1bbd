"""Solvers, which step a sampling run from one time to the next. The theory is in `solvers.base`."""

from kdiff.solvers.adaptive import Adaptive
from kdiff.solvers.ancestral import DDIM, DDPM, DDIMInversion
from kdiff.solvers.base import Denoise, Draw, Solver
from kdiff.solvers.consistency import LCM, TCD, Consistency, FlowMap
from kdiff.solvers.dpm import DPMSolver, DPMSolverPP, DPMSolverPPSinglestep, DPMSolverSinglestep
from kdiff.solvers.dpm_sde import (
    DPMSolverPP2SAncestral,
    DPMSolverPP3MSDE,
    DPMSolverPPSDE,
    DPMSolverPPSinglestepSDE,
    DPMSolverSDE,
)
from kdiff.solvers.fast import DPMSolverFast
from kdiff.solvers.multistep import DEIS, IPNDM, LMS, PNDM
from kdiff.solvers.runge_kutta import DPM2, RK4, DPM2Ancestral, Euler, EulerAncestral, Heun
from kdiff.solvers.sa import SASolver, Tau, Within
from kdiff.solvers.stages import Angle, Ratio
from kdiff.solvers.unipc import UniPC

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "DPM2",
    "IPNDM",
    "LCM",
    "LMS",
    "PNDM",
    "RK4",
    "TCD",
    "Adaptive",
    "Angle",
    "Consistency",
    "DDIMInversion",
    "DPM2Ancestral",
    "DPMSolver",
    "DPMSolverFast",
    "DPMSolverPP",
    "DPMSolverPP2SAncestral",
    "DPMSolverPP3MSDE",
    "DPMSolverPPSDE",
    "DPMSolverPPSinglestep",
    "DPMSolverPPSinglestepSDE",
    "DPMSolverSDE",
    "DPMSolverSinglestep",
    "Denoise",
    "Draw",
    "Euler",
    "EulerAncestral",
    "FlowMap",
    "Heun",
    "Ratio",
    "SASolver",
    "Solver",
    "Tau",
    "UniPC",
    "Within",
]
