"""Guidance: denoisers that wrap a denoiser, by further calls, by gradients, or by known parts of the result."""

from kdiff.guidance.base import Clip, DynamicThreshold, Guidance, Here
from kdiff.guidance.classifier_free import AdaptiveProjected, CFGPlusPlus, CFGZeroStar, ClassifierFree
from kdiff.guidance.control import Control
from kdiff.guidance.inverse import DPS, Inpaint, MomentMatching, PiGDM
from kdiff.guidance.models import Autoguidance, ClassifierGuidance, PerturbedAttention, Seamless
from kdiff.guidance.successive import Successive

__all__ = [
    "DPS",
    "AdaptiveProjected",
    "Autoguidance",
    "CFGPlusPlus",
    "CFGZeroStar",
    "ClassifierFree",
    "ClassifierGuidance",
    "Clip",
    "Control",
    "DynamicThreshold",
    "Guidance",
    "Here",
    "Inpaint",
    "MomentMatching",
    "PerturbedAttention",
    "PiGDM",
    "Seamless",
    "Successive",
]
