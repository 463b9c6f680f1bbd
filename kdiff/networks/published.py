"""Networks at published sizes, as compositions of blocks.

    published.ddpm_cifar10()                                        # 35.7 M parameters
    published.adm(64)                                               # 295.9 M
    published.adm(64, width=64, levels=2, conditions={}, out_channels=3, remat=True)        # a smaller version

Every function for a U-Net takes `width`, the channels of the first level, `levels`, where fewer levels leave out the
coarsest, and any other argument of `UNet.composed` and `UNet` (for Stable Diffusion: only of `UNet`); that for Stable
Diffusion 3 takes those of `MMDiT`. Nothing is allocated before a network is built.

| function | paper | parameters (millions) |
|---|---|---|
| `ddpm_cifar10` | Ho et al., "Denoising Diffusion Probabilistic Models" (2020), appendix B | 35.7 |
| `ddpm_256` | the same, CelebA-HQ and LSUN | 113.7 |
| `improved_ddpm(32)`, `improved_ddpm(64)` | Nichol & Dhariwal, "Improved DDPM" (2021), appendix A | 52.5, 121.1 |
| `adm(64)`, `adm(128)`, `adm(256)`, `adm(512)` | Dhariwal & Nichol, "Diffusion Models Beat GANs" (2021), appendix I | 296, 422, 554, 559 |
| `ddpmpp_cifar10`, `ncsnpp_cifar10` | Song et al. (2021), as in Karras et al., "EDM" (2022), table 7 | 55.7, 56.4 |
| `ncsnpp_256` | Song et al. (2021), appendix H, CelebA-HQ | 65.6 |
| `stable_diffusion_1`, `stable_diffusion_2` | Rombach et al., "Latent Diffusion Models" (2022) | 859.5, 865.9 |
| `efficient` | Saharia et al., "Imagen" (2022), appendix B, from 64 to 256 | 696 |
| `stable_diffusion_xl` | Podell et al., "SDXL" (2023), section 2.1 | 2567 |
| `stable_diffusion_3("3-medium")`, `("3.5-medium")`, `("3.5-large")` | Esser et al., "Scaling Rectified Flow Transformers" (2024) | 2028, 2243, 8057 |
"""  # noqa: E501

import math
from typing import Any

import keras

from kdiff.base import check_choice
from kdiff.blocks.attention import SelfAttention
from kdiff.blocks.conditions import Joint
from kdiff.blocks.context_attention import ContextAttention
from kdiff.blocks.convolution import ResidualBlock
from kdiff.blocks.embeddings import MLPEmbedding, SinusoidalEmbedding, SizeEmbedding
from kdiff.blocks.lookup import LabelEmbedding
from kdiff.blocks.normalization import GroupNorm, RMSNorm
from kdiff.blocks.positions import PositionTable
from kdiff.blocks.resampling import Downsample, FIRDownsample, FIRUpsample, Upsample
from kdiff.blocks.transformer import SpatialTransformer, adaptive_block
from kdiff.networks.levels import Level
from kdiff.networks.mmdit import MMDiT
from kdiff.networks.ncsnpp import InputResidual, InputSkip, NCSNpp, OutputSkip
from kdiff.networks.unet import UNet

__all__ = [
    "ADM",
    "IMPROVED",
    "SONG_32",
    "SONG_256",
    "STABLE_DIFFUSION_3",
    "adm",
    "ddpm_256",
    "ddpm_cifar10",
    "ddpmpp_cifar10",
    "efficient",
    "improved_ddpm",
    "ncsnpp_256",
    "ncsnpp_cifar10",
    "stable_diffusion_1",
    "stable_diffusion_2",
    "stable_diffusion_3",
    "stable_diffusion_xl",
    "text_and_numbers",
    "text_vector",
]

# --- Ho et al. (2020)


def ddpm_cifar10(width: int = 128, levels: int = 4, **options: Any) -> UNet:
    """DDPM for 32x32: widths 128, 256, 256, 256, attention at 16x16, dropout 0.1. `time` is 0 ... 999."""
    return _ddpm(width, levels, (1, 2, 2, 2), (1,), 0.1, **options)


def ddpm_256(width: int = 128, levels: int = 6, **options: Any) -> UNet:
    """DDPM for 256x256: widths 128, 128, 256, 256, 512, 512, attention at 16x16, no dropout. `time` is 0 ... 999."""
    return _ddpm(width, levels, (1, 1, 2, 2, 4, 4), (4,), 0.0, **options)


def _ddpm(width, levels, factors, where, dropout, **options):
    norm = GroupNorm(epsilon=1e-6)
    block = ResidualBlock(scale_shift=False, dropout=dropout, normalization=norm)
    options = {**_time(width, sine_first=True, shift=1), "normalization": norm, **options}
    return _composed(block, SelfAttention(normalization=norm), width, levels, factors, where, **options)


# --- Nichol & Dhariwal (2021), Dhariwal & Nichol (2021)

# By the size of the image: multipliers, levels with attention, dropout.
IMPROVED = {32: ((1, 2, 2, 2), (1, 2), 0.3), 64: ((1, 2, 3, 4), (2, 3), 0.0)}

# By the size of the image: width, depth, multipliers, levels with attention (32x32 and coarser), heads, dropout.
ADM = {
    64: (192, 3, (1, 2, 3, 4), (1, 2, 3), {"head_width": 64}, 0.1),
    128: (256, 2, (1, 1, 2, 3, 4), (2, 3, 4), {"heads": 4}, 0.0),
    256: (256, 2, (1, 1, 2, 2, 4, 4), (3, 4, 5), {"head_width": 64}, 0.0),
    512: (256, 2, (0.5, 1, 1, 2, 2, 4, 4), (4, 5, 6), {"head_width": 64}, 0.0),
}


def improved_ddpm(size: int = 64, width: int = 128, levels: int = 4, **options: Any) -> UNet:
    """Improved DDPM for CIFAR-10 (32) or ImageNet (64): four heads at 16x16 and 8x8, learned variances (6 channels).

    Args:
        size: the size of the image, 32 or 64.
        width: the channels of the first level.
        levels: the number of levels.
        options: other arguments of `UNet.composed` and `UNet`.
    """
    check_choice("improved_ddpm", "size", size, tuple(IMPROVED))
    factors, where, dropout = IMPROVED[size]
    down = Downsample(padding="symmetric")
    options = {"depth": 3, "out_channels": 6, "downsample": down, **_time(width), **options}
    return _composed(ResidualBlock(dropout=dropout), SelfAttention(heads=4), width, levels, factors, where, **options)


def adm(size: int = 64, width: int | None = None, levels: int | None = None, **options: Any) -> UNet:
    """ADM for ImageNet: attention at 32x32, 16x16 and 8x8, resampling in residual blocks, 1000 classes as `label`.

    The output has six channels: the noise and learned variances. There are one fewer downsamplings than levels.

    Args:
        size: the size of the image, 64, 128, 256 or 512.
        width: the channels at multiplier 1; None for the published 192 (64) or 256.
        levels: the number of levels; None for the published number.
        options: other arguments of `UNet.composed` and `UNet`.
    """
    check_choice("adm", "size", size, tuple(ADM))
    base, depth, factors, where, heads, dropout = ADM[size]
    width, levels = width or base, levels or len(factors)
    block = ResidualBlock(dropout=dropout)
    options = {
        "depth": depth,
        "out_channels": 6,
        "conditions": {"label": LabelEmbedding(1000)},
        "downsample": block.clone(resample=Downsample("average")),
        "upsample": block.clone(resample=Upsample("nearest", convolution=False)),
        **_time(width),
        **options,
    }
    return _composed(block, SelfAttention(**heads), width, levels, factors, where, **options)


def _time(width, **convention):
    return {"embedding": MLPEmbedding(SinusoidalEmbedding(width, **convention), 4 * width)}


def _composed(block, mixer, width, levels, factors, where, network=UNet, **options):
    """Levels have these factors unless `options` has `multipliers`, and mixers at `where` unless it has `at`."""
    multipliers = options.pop("multipliers", None)
    levels, multipliers = (levels, factors[:levels]) if multipliers is None else (len(multipliers), multipliers)
    options = {"at": [i for i in where if i < levels], **options}
    return network.composed(block, mixer, width, levels, multipliers=multipliers, **options)


# --- Song et al. (2021), Karras et al. (2022)


# Multipliers, depth, levels with attention (16x16), dropout.
SONG_32 = ((2, 2, 2), 4, (1,), 0.13)
SONG_256 = ((1, 1, 2, 2, 2, 2, 2), 2, (4,), 0.0)


def ddpmpp_cifar10(width: int = 128, levels: int = 3, **options: Any) -> NCSNpp:
    """DDPM++ as trained by EDM on CIFAR-10, without the augmentation input. `time` is EDM's log(sigma) / 4."""
    return _song(width, levels, *SONG_32, (1, 1), **{**_time(width, sine_first=True, shift=1), **options})


def ncsnpp_cifar10(width: int = 128, levels: int = 3, **options: Any) -> NCSNpp:
    """NCSN++ as trained by EDM on CIFAR-10, without the augmentation input. `time` is EDM's log(sigma) / 4."""
    return _song(width, levels, *SONG_32, (1, 3, 3, 1), **{"progressive_input": InputResidual(), **options})


def ncsnpp_256(width: int = 128, levels: int = 7, **options: Any) -> NCSNpp:
    """NCSN++ for 256x256 images, attention at 16x16. `time` is log(sigma); the output over sigma is the score."""
    output = OutputSkip(normalization=GroupNorm(epsilon=1e-6))
    skips = {"progressive_input": InputSkip(), "progressive_output": output, "divide": True}
    return _song(width, levels, *SONG_256, (1, 3, 3, 1), **{**skips, **options})


def _song(width, levels, factors, blocks, where, dropout, taps, **options):
    """Residual sums are divided by sqrt(2); each decoder level has attention once, at its end."""
    norm, rescale = GroupNorm(epsilon=1e-6), math.sqrt(2)
    block = ResidualBlock(scale_shift=False, dropout=dropout, normalization=norm, rescale=rescale)
    options = {
        "depth": blocks,
        "downsample": block.clone(resample=FIRDownsample(taps), project=True),
        "upsample": block.clone(resample=FIRUpsample(taps), project=True),
        "up_mixers": 1,
        "normalization": norm,
        "stem_width": width,
        **options,
    }
    mixer = SelfAttention(normalization=norm, rescale=rescale)
    return _composed(block, mixer, width, levels, factors, where, NCSNpp, **options)


# --- Rombach et al. (2022), Podell et al. (2023)


def stable_diffusion_1(width: int = 320, levels: int = 4, **options: Any) -> UNet:
    """Stable Diffusion 1.1 ... 1.5, for latents of 4 channels: 8 heads, a `context` (batch, 77, 768)."""
    return _stable_diffusion(width, levels, (1, 2, 4, 4), (1, 1, 1, 0), 1, {"heads": 8}, **options)


def stable_diffusion_2(width: int = 320, levels: int = 4, **options: Any) -> UNet:
    """Stable Diffusion 2.0 and 2.1, for latents of 4 channels: heads of 64 channels, a `context` (batch, 77, 1024)."""
    return _stable_diffusion(width, levels, (1, 2, 4, 4), (1, 1, 1, 0), 1, {"head_width": 64}, **options)


def stable_diffusion_xl(width: int = 320, levels: int = 3, **options: Any) -> UNet:
    """Stable Diffusion XL 1.0, for latents of 4 channels: a `context` (batch, 77, 2048) and two added inputs.

    These are `text_embeds`, (batch, 1280), the pooled text, and `time_ids`, (batch, 6), the sizes and the crop.
    """
    conditions = {"context": keras.layers.Identity(), "added": text_and_numbers(SizeEmbedding(256), 4 * width)}
    options = {"conditions": conditions, **options}
    return _stable_diffusion(width, levels, (1, 2, 4), (0, 2, 10), 10, {"head_width": 64}, **options)


# --- Saharia et al. (2022)


def efficient(width: int = 128, levels: int = 4, **options: Any) -> UNet:
    """Imagen's Efficient U-Net, from 64x64 to 256x256: most blocks at the coarsest level, none at full size.

    Each level downsamples before its convolutions and upsamples after them, residual sums are divided by sqrt(2), and
    only the coarsest level has attention, jointly to itself and to the text, in heads of 64 channels. Every block of
    the encoder, not every level, has a skip connection, as in every `UNet` here: 696 M parameters against 600 M in the
    paper. The low-resolution image is a condition that the caller adds, `{"low": Concat("bicubic", noise=...),
    "context": ...}`; the default is a `context` alone.

    Args:
        width: the channels of the first level.
        levels: the number of levels, up to 4.
        options: other arguments of `UNet`.
    """
    check_choice("efficient", "levels", levels, (1, 2, 3, 4))
    rows = list(zip((1, 2, 4, 8), (2, 4, 8, 8), strict=True))[:levels]
    block, mixer = ResidualBlock(rescale=math.sqrt(2)), ContextAttention(head_width=min(64, width * rows[-1][0]))
    made = [
        Level(width * factor, depth, block, mixer if i == levels - 1 else None)
        for i, (factor, depth) in enumerate(rows)
    ]
    options = {
        "middle": Level(made[-1].width, 0, block),
        "conditions": {"context": keras.layers.Identity()},
        "shrink": Downsample(),
        "grow": Upsample(),
        **_time(width),
        **options,
    }
    return UNet(made, **options)


# The number of blocks and of heads of 64 channels; size of the table of positions; blocks with a second attention;
# whether queries and keys are normalised.
STABLE_DIFFUSION_3 = {
    "3-medium": (24, 192, 0, False),
    "3.5-medium": (24, 384, 13, True),
    "3.5-large": (38, 192, 0, True),
}


def stable_diffusion_3(version: str = "3-medium", depth: int | None = None, **options: Any) -> MMDiT:
    """Stable Diffusion 3 or 3.5, for latents of 16 channels: a text `context`, such as (batch, 333, 4096), and
    "text_embeds", (batch, 2048), the pooled text. `time` is 0 ... 1000.

    The numbers of parameters exclude the table of positions, which is not trained.

    Args:
        version: "3-medium", "3.5-medium" or "3.5-large".
        depth: the number of blocks and of heads, if not the published one.
        options: other arguments of `MMDiT`.
    """
    check_choice("stable_diffusion_3", "version", version, tuple(STABLE_DIFFUSION_3))
    published, table, dual, normed = STABLE_DIFFUSION_3[version]
    depth = depth or published
    width = 64 * depth
    options = {
        "block": adaptive_block(depth, qk_norm=RMSNorm() if normed else None),
        "dual": range(min(dual, depth)),
        "positions": PositionTable(table, base_size=64),
        "conditions": {"context": keras.layers.Identity(), "added": text_vector(width)},
        **options,
    }
    return MMDiT(width, depth, 2, **options)


def text_vector(width: int) -> Joint:
    """The condition of Stable Diffusion 3 from "text_embeds" to a vector."""
    return Joint({"text_embeds": keras.layers.Identity()}, MLPEmbedding(keras.layers.Identity(), width))


def text_and_numbers(waves: SizeEmbedding, width: int) -> Joint:
    """The condition of Stable Diffusion XL: one vector from "text_embeds" and sinusoidal features of "time_ids"."""
    parts = {"text_embeds": keras.layers.Identity(), "time_ids": waves}
    return Joint(parts, MLPEmbedding(keras.layers.Identity(), width))


def _stable_diffusion(width, levels, factors, depths, middle_depth, heads, **options):
    """`depths` are those of the transformers at each level; 0 for none."""
    check_choice("stable_diffusion", "levels", levels, tuple(range(1, len(factors) + 1)))
    block, down = ResidualBlock(scale_shift=False), Downsample(padding="symmetric")
    made = [
        Level(width * factor, 2, block, SpatialTransformer(depth, **heads) if depth else None, down)
        for factor, depth in list(zip(factors, depths, strict=True))[:levels]
    ]
    options = {
        "middle": Level(made[-1].width, 2, block, SpatialTransformer(middle_depth, **heads)),
        "conditions": {"context": keras.layers.Identity()},
        **_time(width),
        **options,
    }
    return UNet(made, **options)
