"""The keys of the configurations of U-Nets of diffusers: their valid values and defaults."""

from typing import Any

from kdiff.interop.configs import FLAG, TEXT, Key, either, listed, one_of, only, optional, real, whole

__all__ = [
    "ACTIVATION",
    "ACTIVATIONS",
    "COUNT",
    "DEPTH",
    "EACH",
    "LAYERS",
    "MAYBE",
    "NAMED",
    "NESTED",
    "ONLY_2D",
    "SHARED",
    "SIZE",
    "UNET_2D",
    "UNET_2D_CONDITION",
    "image_shape",
]

COUNT, MAYBE = whole(1), optional(whole(1))
NAMED = listed(TEXT, 1, 12)  # one per level
EACH = either(COUNT, listed(COUNT, 1, 12))
SIZE = optional(either(COUNT, listed(COUNT, 2, 2)))
DEPTH, LAYERS = whole(1, 16), whole(1, 64)
NESTED = listed(either(LAYERS, listed(LAYERS, 1, 17)), 1, 12)  # one per level, or one per block
# Activations by their names in diffusers.
ACTIVATIONS = {"silu": "silu", "swish": "silu", "mish": "mish", "gelu": "gelu", "relu": "relu"}
ACTIVATION = one_of(*ACTIVATIONS)

UNET_2D = {
    "sample_size": Key(None, SIZE),
    "in_channels": Key(3, COUNT),
    "out_channels": Key(3, COUNT),
    "center_input_sample": only(False),
    "time_embedding_type": Key("positional", one_of("positional", "fourier")),
    "time_embedding_dim": Key(None, MAYBE),
    "freq_shift": Key(0, real(0, 1)),
    "flip_sin_to_cos": Key(True, FLAG),
    "down_block_types": Key(("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"), NAMED),
    "mid_block_type": Key("UNetMidBlock2D", one_of("UNetMidBlock2D", None)),
    "up_block_types": Key(("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"), NAMED),
    "block_out_channels": Key((224, 448, 672, 896), listed(COUNT, 1, 12)),
    "layers_per_block": Key(2, DEPTH),
    "mid_block_scale_factor": Key(1, real(1e-6, 1e6)),
    "downsample_padding": Key(1, one_of(0, 1)),
    "downsample_type": Key("conv", one_of("conv", "resnet")),
    "upsample_type": Key("conv", one_of("conv", "resnet")),
    "dropout": Key(0.0, real(0.0, 1.0)),
    "act_fn": Key("silu", ACTIVATION),
    "attention_head_dim": Key(8, MAYBE),
    "norm_num_groups": Key(32, MAYBE),  # None: the largest number up to 32, of at least four channels each
    "attn_norm_num_groups": Key(None, MAYBE),
    "norm_eps": Key(1e-5, real(0.0, 1.0)),
    "resnet_time_scale_shift": Key("default", one_of("default", "scale_shift")),
    "add_attention": Key(True, FLAG),
    "class_embed_type": Key(None, one_of(None, "timestep", "identity")),
    "num_class_embeds": Key(None, optional(whole(1, 10_000_000))),
    "num_train_timesteps": Key(None, MAYBE),
}

ONLY_2D = ("downsample_type", "upsample_type", "add_attention", "attn_norm_num_groups", "num_train_timesteps")
UNET_2D_CONDITION = {
    **{name: key for name, key in UNET_2D.items() if name not in ONLY_2D},
    "in_channels": Key(4, COUNT),
    "out_channels": Key(4, COUNT),
    "time_embedding_type": only("positional"),
    "norm_num_groups": Key(32, COUNT),
    "down_block_types": Key(
        ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"), NAMED
    ),
    "mid_block_type": Key(
        "UNetMidBlock2DCrossAttn",
        one_of("UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2D", None),
    ),
    "up_block_types": Key(("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), NAMED),
    "block_out_channels": Key((320, 640, 1280, 1280), listed(COUNT, 1, 12)),
    "layers_per_block": Key(2, either(DEPTH, listed(DEPTH, 1, 12))),
    "attention_head_dim": Key(8, EACH),
    "only_cross_attention": Key(False, either(FLAG, listed(FLAG, 1, 12))),
    "cross_attention_dim": Key(1280, EACH),
    "transformer_layers_per_block": Key(1, either(LAYERS, NESTED)),
    "reverse_transformer_layers_per_block": Key(None, optional(NESTED)),
    "encoder_hid_dim": Key(None, MAYBE),
    "encoder_hid_dim_type": Key(None, one_of(None, "text_proj", "image_proj", "text_image_proj")),
    "num_attention_heads": only(None),
    "dual_cross_attention": only(False),
    "use_linear_projection": Key(False, FLAG),
    "class_embed_type": Key(None, one_of(None, "timestep", "identity", "projection", "simple_projection")),
    "addition_embed_type": Key(None, one_of(None, "text_time", "text", "image", "text_image")),
    "addition_time_embed_dim": Key(None, MAYBE),
    "upcast_attention": Key(False, optional(FLAG)),  # float32 logits, as always in kdiff
    "resnet_skip_time_act": Key(False, FLAG),
    "resnet_out_scale_factor": Key(1.0, real(1e-6, 1e6)),
    "time_embedding_act_fn": Key(None, optional(ACTIVATION)),
    "timestep_post_act": only(None),
    "time_cond_proj_dim": Key(None, MAYBE),
    "conv_in_kernel": only(3),
    "conv_out_kernel": only(3),
    "projection_class_embeddings_input_dim": Key(None, MAYBE),
    "attention_type": only("default"),
    "class_embeddings_concat": only(False),
    "mid_block_only_cross_attention": Key(None, optional(FLAG)),
    "cross_attention_norm": Key(None, one_of(None, "layer_norm", "group_norm")),
    "addition_embed_type_num_heads": Key(64, COUNT),
}
# The values of keys of the other class that hold for every network of this one.
SHARED = {"downsample_type": "conv", "upsample_type": "conv"}


def image_shape(config: dict[str, Any]) -> tuple:
    """(batch, height, width, channels), with None for unknown sizes."""
    size = config["sample_size"]
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return (None, height, width, config["in_channels"])
