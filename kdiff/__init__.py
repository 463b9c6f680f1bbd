"""kdiff: diffusion models in Keras 3, on TensorFlow, JAX and PyTorch."""

from kdiff import (
    analytic,
    blocks,
    codecs,
    conversion,
    guidance,
    interop,
    networks,
    objectives,
    operators,
    predictions,
    random,
    scenes,
    schedules,
    solvers,
    text,
    times,
    weightings,
)
from kdiff.base import Configurable
from kdiff.callbacks import BackupCallback, SampleCallback
from kdiff.model import DiffusionModel
from kdiff.sampling import Sampler, Step

__all__ = [
    "BackupCallback",
    "Configurable",
    "DiffusionModel",
    "SampleCallback",
    "Sampler",
    "Step",
    "analytic",
    "blocks",
    "codecs",
    "conversion",
    "guidance",
    "interop",
    "networks",
    "objectives",
    "operators",
    "predictions",
    "random",
    "scenes",
    "schedules",
    "solvers",
    "text",
    "times",
    "weightings",
]

__version__ = "0.1.0"
