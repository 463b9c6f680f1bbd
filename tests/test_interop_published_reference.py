"""Published configurations, without their weights: the names and shapes that diffusers has are those that are read.

Nothing is allocated: diffusers' network is on PyTorch's device "meta", and kdiff's is as `networks.flops` builds it.
"""

import math

import pytest

from kdiff import backend
from kdiff.interop import diffusers as interop

pytestmark = [pytest.mark.reference, pytest.mark.once]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


def cross(plain_first, count, plain_last=0):
    """(down, up): the types of blocks, with attention to the context at `count` levels."""
    kinds = ["DownBlock2D"] * plain_first + ["CrossAttnDownBlock2D"] * count + ["DownBlock2D"] * plain_last
    return {"down_block_types": kinds, "up_block_types": [kind.replace("Down", "Up") for kind in kinds[::-1]]}


def simple(resnets, count):
    """The same of attention that joins the context."""
    down = ["ResnetDownsampleBlock2D"] * resnets + ["SimpleCrossAttnDownBlock2D"] * count
    up = ["SimpleCrossAttnUpBlock2D"] * count + ["ResnetUpsampleBlock2D"] * resnets
    shared = {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "resnet_time_scale_shift": "scale_shift"}
    return {"down_block_types": down, "up_block_types": up, "attention_head_dim": 64, **shared}


STABLE = {"block_out_channels": (320, 640, 1280, 1280), **cross(0, 3, 1), "cross_attention_dim": 768}
STABLE_2 = {
    **STABLE,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
XL = {
    **cross(1, 2),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
IF = {
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "out_channels": 6,
}
KANDINSKY = {
    **simple(1, 3),
    "out_channels": 8,
    "block_out_channels": (384, 768, 1152, 1536),
    "cross_attention_dim": 768,
    "layers_per_block": 3,
}
CONDITIONED = {
    "stable_diffusion": STABLE,
    "stable_diffusion_2": STABLE_2,
    "latent_consistency_model": {**STABLE, "time_cond_proj_dim": 256},
    "unclip": {
        **STABLE_2,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 2048,
    },
    "upscaler": {
        **cross(1, 3),
        "in_channels": 7,
        "block_out_channels": (256, 512, 512, 1024),
        "cross_attention_dim": 1024,
        "num_class_embeds": 1000,
        "only_cross_attention": (True, True, True, False),
        "use_linear_projection": True,
    },
    "stable_diffusion_xl": XL,
    "refiner": {
        **XL,
        **cross(1, 2, 1),
        "block_out_channels": (384, 768, 1536, 1536),
        "cross_attention_dim": 1280,
        "attention_head_dim": (6, 12, 24, 24),
        "transformer_layers_per_block": 4,
        "projection_class_embeddings_input_dim": 2560,
    },
    "segmind": {
        **XL,
        "transformer_layers_per_block": [[1, 1], [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    "deep_floyd_if": {
        **IF,
        **simple(1, 3),
        "in_channels": 3,
        "block_out_channels": (704, 1408, 2112, 2816),
        "cross_attention_dim": 2816,
        "layers_per_block": 3,
    },
    "deep_floyd_if_2": {
        **IF,
        **simple(3, 1),
        "in_channels": 6,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": (2, 4, 6, 6),
        "cross_attention_dim": 1280,
        "class_embed_type": "timestep",
        "mid_block_scale_factor": 2**0.5,
        "resnet_out_scale_factor": 2**0.5,
        "resnet_skip_time_act": True,
        "time_embedding_act_fn": "gelu",
        "time_embedding_dim": 1280,
        "only_cross_attention": True,
    },
    "karlo": {
        **simple(1, 3),
        "in_channels": 3,
        "out_channels": 6,
        "block_out_channels": (320, 640, 960, 1280),
        "cross_attention_dim": 1536,
        "class_embed_type": "identity",
        "layers_per_block": 3,
    },
    "kandinsky_2_1": {
        **KANDINSKY,
        "addition_embed_type": "text_image",
        "encoder_hid_dim": 1024,
        "encoder_hid_dim_type": "text_image_proj",
    },
    "kandinsky_2_2": {
        **KANDINSKY,
        "addition_embed_type": "image",
        "encoder_hid_dim": 1280,
        "encoder_hid_dim_type": "image_proj",
    },
}
SKIPS = ["SkipDownBlock2D"] * 4 + ["AttnSkipDownBlock2D"] + ["SkipDownBlock2D"] * 2
PLAIN = {
    "ncsnpp_256": {
        "block_out_channels": (128, 128, 256, 256, 256, 256, 256),
        "attention_head_dim": None,
        "norm_num_groups": None,
        "time_embedding_type": "fourier",
        "down_block_types": SKIPS,
        "up_block_types": [kind.replace("Down", "Up") for kind in SKIPS[::-1]],
        "mid_block_scale_factor": 2**0.5,
    },
    "consistency_64": {
        "block_out_channels": (192, 384, 576, 768),
        "layers_per_block": 3,
        "attention_head_dim": 64,
        "num_class_embeds": 1000,
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 32,
        "down_block_types": ["ResnetDownsampleBlock2D"] + ["AttnDownBlock2D"] * 3,
        "up_block_types": ["AttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
}
PARAMETERS = {"stable_diffusion": 859_520_964, "stable_diffusion_xl": 2_567_463_684, "karlo": 885_439_686}
PARAMETERS |= {"deep_floyd_if": 4_304_695_110}
QUICK = ("karlo", "kandinsky_2_1", "deep_floyd_if_2", "ncsnpp_256")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.thorough) for n in (*CONDITIONED, *PLAIN)]
)
def test_names_and_shapes(name):
    kind = "UNet2DConditionModel" if name in CONDITIONED else "UNet2DModel"
    config = {**(CONDITIONED | PLAIN)[name], "sample_size": 64}
    with torch.device("meta"):
        theirs = {key: tuple(value.shape) for key, value in getattr(diffusers, kind)(**config).state_dict().items()}
    described = interop.MODELS[kind].network(config, name)
    with backend.unallocated():
        described.network.build({"time": (None,), **described.shapes})
    slots = list(interop.MODELS[kind].slots(described.network))
    assert {slot.name for slot in slots} == set(theirs)
    for slot in slots:
        assert math.prod(slot.variable.shape) == math.prod(theirs[slot.name]), slot.name
    assert sum(map(math.prod, theirs.values())) == PARAMETERS.get(name, sum(map(math.prod, theirs.values())))
