"""Codecs: between what people hold and what diffuses."""

from kdiff.codecs.base import Codec, Identity, Pixels
from kdiff.codecs.wavelets import Haar

__all__ = ["Codec", "Haar", "Identity", "Pixels"]
