"""Codecs: between user data and the space of the diffusion."""

from kdiff.codecs.base import Absent, Codec, Identity, Pixels
from kdiff.codecs.latent import Latent
from kdiff.codecs.standard import Standard, Transformed
from kdiff.codecs.wavelets import Haar

__all__ = ["Absent", "Codec", "Haar", "Identity", "Latent", "Pixels", "Standard", "Transformed"]
