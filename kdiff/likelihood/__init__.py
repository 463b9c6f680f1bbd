"""How likely is data under a model? In nats, or in bits per dimension, each with its uncertainty.

    likelihood.bound(model, data)                 the variational bound of a run of T steps, term by term
    likelihood.continuous_bound(model, data)      that of a run in continuous time, from random times
    likelihood.ode(model, data)                   the density of the probability flow

Each takes a `DiffusionModel`, or any denoiser with its schedule, and returns a `Report`:

    >>> print(likelihood.bound(model, images))
    3.172 +- 0.021 bits per dimension (n = 1000): prior 0.001, diffusion 2.954, reconstruction 0.217

The model is p(x) = integral of p(x_1) p(... | x_1) ... p(x | x_(1/T)), whose beginning is that of a run of `sample`,
p(x_1) = N(0, sigma_1^2 I).
"""

from kdiff.likelihood.bound import bound
from kdiff.likelihood.continuous import BitsPerDim, continuous_bound
from kdiff.likelihood.decoders import Decoder, Density, Levels
from kdiff.likelihood.flow import Exact, Hutchinson, Probes, encode, ode
from kdiff.likelihood.report import Curve, Report
from kdiff.likelihood.variances import Known, Large, Learned, Small, Variance

__all__ = [
    "BitsPerDim",
    "Curve",
    "Decoder",
    "Density",
    "Exact",
    "Hutchinson",
    "Known",
    "Large",
    "Learned",
    "Levels",
    "Probes",
    "Report",
    "Small",
    "Variance",
    "bound",
    "continuous_bound",
    "encode",
    "ode",
]
