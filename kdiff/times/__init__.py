"""Times: those of training, those of sampling, and the time input of the network.

TimeSampler   (schedule, batch, key) -> t     random times for a training batch, float32, shape `(batch,)`
TimeGrid      (schedule, steps) -> t          the times of a sampling run, float64, decreasing (except `Jumps`) to 0
TimeLabel     (schedule, marginal) -> label   the time input of the network
"""

from kdiff.times.grids import (
    All,
    BetaQuantile,
    Distilled,
    FlowShift,
    Leading,
    Linspace,
    Rounded,
    TimeGrid,
    Times,
    Trailing,
)
from kdiff.times.jumps import Jumps
from kdiff.times.labels import Index, LogSNR, RoundedLabel, Scaled, TimeLabel
from kdiff.times.noise_grids import Exponential, Karras, Polyexponential, Sigmas, UniformLogSNR
from kdiff.times.samplers import (
    Antithetic,
    Discrete,
    LogitNormal,
    LogNormalSigma,
    LogUniform,
    LowDiscrepancy,
    Mode,
    PowerLaw,
    Stratified,
    Systematic,
    TimeSampler,
    Uniform,
)
from kdiff.times.sections import DEEPFLOYD, Sections

__all__ = [
    "DEEPFLOYD",
    "All",
    "Antithetic",
    "BetaQuantile",
    "Discrete",
    "Distilled",
    "Exponential",
    "FlowShift",
    "Index",
    "Jumps",
    "Karras",
    "Leading",
    "Linspace",
    "LogNormalSigma",
    "LogSNR",
    "LogUniform",
    "LogitNormal",
    "LowDiscrepancy",
    "Mode",
    "Polyexponential",
    "PowerLaw",
    "Rounded",
    "RoundedLabel",
    "Scaled",
    "Sections",
    "Sigmas",
    "Stratified",
    "Systematic",
    "TimeGrid",
    "TimeLabel",
    "TimeSampler",
    "Times",
    "Trailing",
    "Uniform",
    "UniformLogSNR",
]
