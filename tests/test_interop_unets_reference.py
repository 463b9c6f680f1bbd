"""The less common options of diffusers' U-Nets: loaded, saved again and read by diffusers, the output is the same."""

import keras
import numpy as np
import pytest
from keras import ops

from kdiff.blocks import SinusoidalEmbedding
from kdiff.interop import diffusers as interop
from tests.test_interop_networks_reference import (  # noqa: F401
    CROSS,
    DDPM,
    PLAIN,
    SIZE,
    SMALL,
    check_round_trip,
    compare,
    normal,
    one_thread,
    perturbed,
    theirs,
)
from tests.toys import mostly_once

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

THREE = {"block_out_channels": (8, 16, 24)}
UNETS = {
    "gelu": {**DDPM, "act_fn": "gelu"},
    "mish_and_scale_shift": {**DDPM, "act_fn": "mish", "resnet_time_scale_shift": "scale_shift"},
    "no_middle": {**DDPM, "mid_block_type": None},
    "attention_on_the_way_down_alone": {**DDPM, "up_block_types": ("UpBlock2D", "UpBlock2D")},
    "attention_on_the_way_up_alone": {**PLAIN, "up_block_types": ("UpBlock2D", "AttnUpBlock2D")},
    "resnets_on_the_way_up_alone": {**PLAIN, "up_block_types": ("ResnetUpsampleBlock2D", "UpBlock2D")},
}
# DeepFloyd IF's first stage and its second, Karlo's decoder.
SIMPLE = {
    **CROSS,
    "attention_head_dim": 4,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
}
IF = {
    **SIMPLE,
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
    "cross_attention_norm": "group_norm",
    "cross_attention_dim": 32,
    "encoder_hid_dim": 12,
}
IF_2 = {
    **IF,
    "class_embed_type": "timestep",
    "mid_block_scale_factor": 1.4,
    "resnet_out_scale_factor": 1.4,
    "resnet_skip_time_act": True,
    "time_embedding_act_fn": "gelu",
    "time_embedding_dim": 16,
    "only_cross_attention": True,
}
CONDITIONED = {
    "gelu": {**CROSS, "act_fn": "gelu"},
    "relu": {**CROSS, "act_fn": "relu"},
    "no_middle": {**CROSS, "mid_block_type": None},
    "up_blocks_that_do_not_mirror": {**CROSS, "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D")},
    "no_attention_on_the_way_up": {**CROSS, "up_block_types": ("UpBlock2D", "UpBlock2D")},
    "only_cross": {**CROSS, "only_cross_attention": True},
    "only_cross_at_one": {
        **CROSS,
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        "only_cross_attention": (True, False),
    },
    "depths_by_block": {
        **CROSS,
        "layers_per_block": (1, 2),
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        "transformer_layers_per_block": [1, [2, 1]],
        "reverse_transformer_layers_per_block": [[1, 3, 1], 2],
    },
    "depths_on_the_way_up": {**CROSS, "reverse_transformer_layers_per_block": [1, 2]},
    "three_levels_of_heads": {
        **CROSS,
        **THREE,
        "attention_head_dim": (2, 4, 3),
        "down_block_types": ("CrossAttnDownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
    "text_projected": {**CROSS, "encoder_hid_dim": 12, "cross_attention_dim": 10},
    "simple": SIMPLE,
    "simple_heads": {**SIMPLE, "up_block_types": ("SimpleCrossAttnUpBlock2D",) * 2, "attention_head_dim": (8, 4)},
    "simple_only_cross": {**SIMPLE, "only_cross_attention": (False, True), "mid_block_only_cross_attention": True},
    "simple_layer_norm": {
        **SIMPLE,
        "block_out_channels": (8, 12),
        "cross_attention_norm": "layer_norm",
    },
    "skip_time_act": {**SIMPLE, "resnet_skip_time_act": True},
    "deep_floyd_if": IF,
    "deep_floyd_if_super_resolution": IF_2,
}
LABELS = {
    "deep_floyd_if_super_resolution": np.array([250, 3]),
    "projection": normal(2, 6),
    "simple_projection": normal(2, 6),
    "timestep": np.array([20, 7]),
    "identity": normal(2, 32),
}
CLASSES = {
    name: {**CROSS, "class_embed_type": name, "projection_class_embeddings_input_dim": 6}
    for name in ("projection", "simple_projection", "timestep", "identity")
}


@pytest.mark.once
@pytest.mark.parametrize("name", UNETS)
def test_unet(request, name, tmp_path):
    model = diffusers.UNet2DModel(**{**SMALL, **UNETS[name]})
    network, *rest = compare(request, model, tmp_path)
    check_round_trip(diffusers.UNet2DModel, network, tmp_path, *rest)


@pytest.mark.parametrize("name", mostly_once([*CONDITIONED, *CLASSES], ["deep_floyd_if_super_resolution"]))
def test_conditioned_unet(request, name, tmp_path):
    context = normal(2, 7, 12)
    model = diffusers.UNet2DConditionModel(**{**SMALL, **(CONDITIONED | CLASSES)[name]})
    labels = LABELS.get(name)
    label, class_labels = ({}, {}) if labels is None else ({"label": labels}, {"class_labels": labels})
    arguments = {"encoder_hidden_states": context, **class_labels}
    network, *rest = compare(request, model, tmp_path, {"context": context, **label}, arguments)
    check_round_trip(diffusers.UNet2DConditionModel, network, tmp_path, *rest)


KANDINSKY = {
    "2.1": {
        "addition_embed_type": "text_image",
        "encoder_hid_dim_type": "text_image_proj",
        "encoder_hid_dim": 10,
        "class_embed_type": None,
    },
    "2.2": {"addition_embed_type": "image", "encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 10},
}


@pytest.mark.once
@pytest.mark.parametrize("name", KANDINSKY)
def test_kandinsky(request, name, tmp_path):
    """A vector of the image is tokens and is added to the time; in 2.1 there are a text and a vector of it too."""
    model = diffusers.UNet2DConditionModel(**{**SMALL, **SIMPLE, **KANDINSKY[name]})
    added, context = {"image_embeds": normal(2, 12 if name == "2.1" else 10, seed=1)}, {}
    if name == "2.1":
        added["text_embeds"], context = normal(2, 12, seed=2), {"context": normal(2, 7, 10)}
    arguments = {"encoder_hidden_states": context.get("context", added["image_embeds"]), "added_cond_kwargs": added}
    network, *rest = compare(request, model, tmp_path, {**context, **added}, arguments)
    check_round_trip(diffusers.UNet2DConditionModel, network, tmp_path, *rest)


@pytest.mark.once
def test_condition_of_the_time(request, tmp_path):
    """Latent consistency models': the scale of guidance by its waves, which may be missing."""
    model = diffusers.UNet2DConditionModel(**{**SMALL, **CROSS, "time_cond_proj_dim": 6})
    context = normal(2, 7, 12)
    waves = SinusoidalEmbedding(6, scale=1000.0, sine_first=True, shift=1)
    given = ops.convert_to_numpy(waves(np.array([6.5, 3.0], "float32")))
    pipeline = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    wanted = pipeline(None, torch.tensor([6.5, 3.0]), 6).numpy()
    np.testing.assert_allclose(given, wanted, atol=1e-3)  # of sin and cos of 6500
    arguments = {"encoder_hidden_states": context, "timestep_cond": wanted}
    conditions = {"context": context, "timestep_cond": wanted}
    network, *rest = compare(request, model, tmp_path, conditions, arguments)
    check_round_trip(diffusers.UNet2DConditionModel, network, tmp_path, *rest)
    x, t, _ = rest[1]
    given = network({"image": x, "time": t, "context": context})
    wanted = theirs(model, x, t, encoder_hidden_states=context)
    np.testing.assert_allclose(ops.convert_to_numpy(given), wanted, atol=1e-5)
    network.save(tmp_path / "network.keras")
    again = keras.models.load_model(tmp_path / "network.keras")({"image": x, "time": t, "context": context})
    np.testing.assert_allclose(ops.convert_to_numpy(again), wanted, atol=1e-5)


REFUSED = [
    ({"time_embedding_act_fn": "gelu"}, "`time_embedding_act_fn` must be null unless"),
    (
        {"up_block_types": ("SimpleCrossAttnUpBlock2D", "UpBlock2D"), "resnet_out_scale_factor": 2.0},
        "blocks of a level",
    ),
    ({"class_embed_type": "projection"}, "`projection_class_embeddings_input_dim` must be a number"),
    ({"addition_embed_type": "image"}, "`encoder_hid_dim` must be a number"),
    ({"addition_embed_type": "image_hint"}, "`addition_embed_type` must be .*'image_hint'"),
    ({"class_embeddings_concat": True}, "`class_embeddings_concat` must be one of"),
    ({"transformer_layers_per_block": [[1], [2]]}, "need `reverse_transformer_layers_per_block`"),
    ({"down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D")}, "`down_block_types` must be one of"),
    ({"addition_embed_type": "text", "encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 4}, "together"),
]


@pytest.mark.once
@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_what_cannot_be_loaded(changes, words):
    config = {**SMALL, **(CROSS if "transformer_layers_per_block" in changes else SIMPLE), **changes}
    with pytest.raises(ValueError, match=f"^file: .*{words}"):
        interop.MODELS["UNet2DConditionModel"].network(config, "file")
