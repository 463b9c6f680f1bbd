"""Training autoencoders: `AutoencoderTrainer(AutoencoderKL(...)).fit(images)`, and loss terms for it."""

from kdiff.autoencoding.callback import ReconstructionCallback
from kdiff.autoencoding.discriminator import PatchDiscriminator
from kdiff.autoencoding.features import LPIPS, Features, vgg16
from kdiff.autoencoding.terms import MSSSIM, Gradients, Laplacian, Term
from kdiff.autoencoding.trainer import AutoencoderTrainer

__all__ = [
    "LPIPS",
    "MSSSIM",
    "AutoencoderTrainer",
    "Features",
    "Gradients",
    "Laplacian",
    "PatchDiscriminator",
    "ReconstructionCallback",
    "Term",
    "vgg16",
]
