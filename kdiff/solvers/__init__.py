"""Solvers, a file a family: how a sampling run goes from one time to the next."""

from kdiff.solvers.ancestral import DDIM, DDPM, DDIMInversion
from kdiff.solvers.base import Denoise, Draw, Solver
