"""kdiff: diffusion models in Keras 3, on TensorFlow, JAX and PyTorch."""

import importlib
import types

from kdiff import (
    analytic,
    autoencoding,
    blocks,
    codecs,
    control,
    conversion,
    degradations,
    distribution,
    ema,
    encoders,
    evaluation,
    guidance,
    interop,
    inversion,
    likelihood,
    lora,
    losses,
    networks,
    objectives,
    operators,
    pictures,
    posthoc,
    predictions,
    random,
    reflow,
    scenes,
    schedules,
    solvers,
    students,
    tangents,
    text,
    times,
    weightings,
)
from kdiff.base import Configurable
from kdiff.callbacks import BackupCallback, SampleCallback
from kdiff.cascade import Cascade
from kdiff.compiling import compilation_cache
from kdiff.contrastive import Contrastive
from kdiff.doctor import doctor
from kdiff.model import DiffusionModel
from kdiff.sampling import Sampler, Step
from kdiff.unclip import UnCLIP

__all__ = [
    "BackupCallback",
    "Cascade",
    "Configurable",
    "Contrastive",
    "DiffusionModel",
    "SampleCallback",
    "Sampler",
    "Step",
    "UnCLIP",
    "analytic",
    "autoencoding",
    "blocks",
    "codecs",
    "compilation_cache",
    "control",
    "conversion",
    "degradations",
    "distribution",
    "doctor",
    "ema",
    "encoders",
    "evaluation",
    "guidance",
    "interop",
    "inversion",
    "likelihood",
    "lora",
    "losses",
    "networks",
    "objectives",
    "operators",
    "pictures",
    "posthoc",
    "predictions",
    "random",
    "reflow",
    "scenes",
    "schedules",
    "solvers",
    "students",
    "tangents",
    "text",
    "times",
    "weightings",
]

__version__ = "0.2.0"


def __getattr__(name: str) -> types.ModuleType:
    """Imports `kdiff.data`, which imports TensorFlow, and `kdiff.demo` when they are first accessed."""
    if name in ("data", "demo"):
        return importlib.import_module(f"kdiff.{name}")
    raise AttributeError(f"module 'kdiff' has no attribute {name!r}")
