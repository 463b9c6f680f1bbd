"""Networks of diffusers, made and saved by it with random weights, give the same output in kdiff, and back."""

import json

import keras
import numpy as np
import pytest
from keras import ops

from kdiff.interop import diffusers as interop
from kdiff.interop import maps

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TOLERANCE = 2e-5  # float32: outputs are some units, and sums of some hundred terms
SIZE = 8
SMALL = {
    "sample_size": SIZE,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
PLAIN = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
DDPM = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
RESNET = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
}
UNETS = {
    "plain": PLAIN,
    "attention": DDPM,
    "padding_0": {**DDPM, "downsample_padding": 0},
    "ddpm": {**DDPM, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1},
    "one_head": {**DDPM, "attention_head_dim": None},
    "depth_2": {**DDPM, "layers_per_block": 2, "norm_eps": 1e-6},
    "three_levels": {
        "block_out_channels": (8, 16, 24),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    "resnet_blocks": RESNET,
    "resnet_resampling": {**DDPM, "downsample_type": "resnet", "upsample_type": "resnet"},
    "attention_resampled_by_resnets": {
        "down_block_types": ("AttnDownBlock2D",) * 2,
        "up_block_types": ("AttnUpBlock2D",) * 2,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "no_attention_in_the_middle": {**DDPM, "add_attention": False},
    "rescaled_middle": {**DDPM, "mid_block_scale_factor": 1.5},
    "scale_shift": {**DDPM, "resnet_time_scale_shift": "scale_shift"},
    "scale_shift_groups": {**DDPM, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2},
    "learned_variance": {**DDPM, "out_channels": 6},
    "oblong": {**DDPM, "sample_size": (8, 4)},
}
CLASSES = {
    "classes": {"num_class_embeds": 5},
    "class_as_time": {"class_embed_type": "timestep"},
    "class_as_vector": {"class_embed_type": "identity"},
}
CROSS = {
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
CONDITIONED = {
    "stable_diffusion": CROSS,
    "stable_diffusion_2": {**CROSS, "use_linear_projection": True, "attention_head_dim": (2, 4)},
    "depth_2": {**CROSS, "transformer_layers_per_block": 2, "layers_per_block": 2},
    "simple_middle": {**CROSS, "mid_block_type": "UNetMidBlock2D"},
    "rescaled_middle": {**CROSS, "mid_block_scale_factor": 1.5},
    "resnet_blocks": {
        **CROSS,
        "down_block_types": ("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    },
}
XL = {
    **CROSS,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 10,
}
SMALL_DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 3,
    "sample_size": SIZE,
    "num_embeds_ada_norm": 10,
}
DITS = {
    "paper": {"norm_eps": 1e-6},
    "epsilon": {"norm_eps": 1e-2},
    "patch_4": {"patch_size": 4, "out_channels": None},
    "no_bias": {"attention_bias": False},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For networks as small as these several threads wait for each other more than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)  # of diffusers' own weights
    yield
    torch.set_num_threads(threads)


def perturbed(model, apart=False):
    """The model with no weight left zero; the copies of DiT's embeddings stay copies unless `apart`."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    for block in getattr(model, "transformer_blocks", []) if not apart else ():
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model.eval()


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def tensors(arguments):
    return {
        name: tensors(value) if isinstance(value, dict) else torch.tensor(value) for name, value in arguments.items()
    }


def theirs(model, x, t, **arguments):
    with torch.no_grad():
        y = model(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t), **tensors(arguments)).sample
    return y.numpy().transpose(0, 2, 3, 1)


def compare(request, model, folder, conditions=(), arguments=(), apart=False):
    """The two outputs; then kdiff's is saved, read by diffusers, and gives the same again."""
    perturbed(model, apart).save_pretrained(folder / "saved")
    network = interop.load(folder / "saved")
    size = model.config.sample_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    x, t = normal(2, height, width, model.config.in_channels), np.array([3.0, 977.0], "float32")
    conditions, arguments = dict(conditions), dict(arguments)
    wanted = theirs(model, x, t, **arguments)
    given = ops.convert_to_numpy(network({"image": x, "time": t, **conditions}))
    difference = np.abs(given - wanted).max()
    print(f"DIFFERENCE {request.node.name} {difference:.1e}")
    assert difference < TOLERANCE
    return network, wanted, (x, t, arguments)


def check_round_trip(kind, network, folder, wanted, inputs):
    interop.save(network, folder / "again")
    x, t, arguments = inputs
    again = theirs(kind.from_pretrained(folder / "again").eval(), x, t, **arguments)
    np.testing.assert_allclose(again, wanted, atol=TOLERANCE)


@pytest.mark.parametrize("name", UNETS)
def test_unet(request, name, tmp_path):
    model = diffusers.UNet2DModel(**{**SMALL, **UNETS[name]})
    network, *rest = compare(request, model, tmp_path)
    check_round_trip(diffusers.UNet2DModel, network, tmp_path, *rest)


@pytest.mark.once
@pytest.mark.parametrize(("attention", "groups"), [(False, 32), (True, 32), (True, None)])
def test_ncsnpp(request, attention, groups, tmp_path):
    """Its time is sigma there, and log(sigma) here; None is 16 groups of 64 channels, 32 of 128."""
    down, up = ("AttnSkipDownBlock2D", "AttnSkipUpBlock2D") if attention else ("SkipDownBlock2D", "SkipUpBlock2D")
    model = diffusers.UNet2DModel(
        sample_size=SIZE,
        block_out_channels=(64, 128) if groups is None else (64, 64),
        norm_num_groups=groups,
        layers_per_block=1,
        attention_head_dim=None,
        mid_block_scale_factor=2**0.5,
        norm_eps=1e-6,
        time_embedding_type="fourier",
        down_block_types=("SkipDownBlock2D", down),
        up_block_types=(up, "SkipUpBlock2D"),
    )
    perturbed(model).save_pretrained(tmp_path)
    network = interop.load(tmp_path)
    x, sigma = normal(2, SIZE, SIZE, 3), np.array([0.5, 30.0], "float32")
    given = ops.convert_to_numpy(network({"image": x, "time": np.log(sigma)}))
    wanted = theirs(model, x, sigma)
    difference = np.abs(given - wanted).max()
    print(f"DIFFERENCE {request.node.name} {difference:.1e}")
    # Of their scale: these outputs go up to 5, where float32 is 2.7e-5 off on JAX.
    assert difference < 1e-5 * max(1.0, np.abs(wanted).max())
    interop.save(network, tmp_path / "again")
    again = diffusers.UNet2DModel.from_pretrained(tmp_path / "again").eval()
    np.testing.assert_allclose(theirs(again, x, sigma), theirs(model, x, sigma), atol=TOLERANCE)
    other = network.clone(divide=False)
    other.build({"image": (None, SIZE, SIZE, 3), "time": (None,)})
    with pytest.raises(ValueError, match="divide: False would be True"):
        interop.save(other, tmp_path)


@pytest.mark.once
@pytest.mark.parametrize("name", CLASSES)
def test_unet_with_classes(request, name, tmp_path):
    labels = normal(2, 32) if name == "class_as_vector" else np.array([1, 4])
    model = diffusers.UNet2DModel(**SMALL, **DDPM, **CLASSES[name])
    network, *rest = compare(request, model, tmp_path, {"label": labels}, {"class_labels": labels})
    check_round_trip(diffusers.UNet2DModel, network, tmp_path, *rest)


@pytest.mark.once
@pytest.mark.parametrize("name", CONDITIONED)
def test_conditioned_unet(request, name, tmp_path):
    context = normal(2, 7, 12)
    model = diffusers.UNet2DConditionModel(**{**SMALL, **CONDITIONED[name]})
    network, *rest = compare(request, model, tmp_path, {"context": context}, {"encoder_hidden_states": context})
    check_round_trip(diffusers.UNet2DConditionModel, network, tmp_path, *rest)


@pytest.mark.once
def test_stable_diffusion_xl(request, tmp_path):
    context, vector = normal(2, 7, 12), normal(2, 10, seed=1)
    numbers = np.array([[16, 16, 0, 0, 16, 16], [16, 8, 2, 0, 16, 8]], "float32")
    added = {"text_embeds": vector, "time_ids": numbers}
    model = diffusers.UNet2DConditionModel(**{**SMALL, **XL})
    arguments = {"encoder_hidden_states": context, "added_cond_kwargs": added}
    network, *rest = compare(request, model, tmp_path, {"context": context, **added}, arguments)
    check_round_trip(diffusers.UNet2DConditionModel, network, tmp_path, *rest)


REFINERS = {"by_its_pipeline": (6, {"requires_aesthetics_score": True}), "by_its_widths": (12, {})}


@pytest.mark.once
@pytest.mark.parametrize("name", REFINERS)
def test_refiner(request, name, tmp_path):
    """Stable Diffusion XL's has 5 numbers: two sizes, less the last, and a score."""
    width, more = REFINERS[name]
    context, vector = normal(2, 7, 12), normal(2, width, seed=1)
    added = {"text_embeds": vector, "time_ids": np.array([[16, 16, 0, 0, 6], [16, 8, 2, 0, 2.5]], "float32")}
    changes = {"projection_class_embeddings_input_dim": 5 * 8 + width}
    model = perturbed(diffusers.UNet2DConditionModel(**{**SMALL, **XL, **changes}))
    model.save_pretrained(tmp_path / "unet")
    if more:
        diffusers.EulerDiscreteScheduler(timestep_spacing="leading").save_pretrained(tmp_path / "scheduler")
        kinds = {"unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", "EulerDiscreteScheduler"]}
        index = {"_class_name": "StableDiffusionXLImg2ImgPipeline", **kinds, **more}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
    network = interop.load(tmp_path).network if more else interop.load(tmp_path / "unet")
    x, t = normal(2, SIZE, SIZE, 4), np.array([3.0, 977.0], "float32")
    shapes = maps.input_shapes(network)
    assert (shapes["text_embeds"][-1], shapes["time_ids"][-1]) == (width, 5)
    given = network({"image": x, "time": t, "context": context, **added})
    wanted = theirs(model, x, t, encoder_hidden_states=context, added_cond_kwargs=added)
    np.testing.assert_allclose(ops.convert_to_numpy(given), wanted, atol=1e-5)


@pytest.mark.parametrize("name", DITS)
def test_dit(request, name, tmp_path):
    """A label, and the number that stands for none."""
    labels = np.array([1, 10])
    model = diffusers.DiTTransformer2DModel(**{**SMALL_DIT, **DITS[name]})
    network, *rest = compare(request, model, tmp_path, {"label": labels}, {"class_labels": labels})
    check_round_trip(diffusers.DiTTransformer2DModel, network, tmp_path, *rest)


@pytest.mark.once
def test_dit_whose_embeddings_differ(request, tmp_path):
    """Each block has its own in diffusers, which training there moves apart, and the last layer the first block's."""
    model = diffusers.DiTTransformer2DModel(**SMALL_DIT)
    labels = np.array([1, 10])
    network, *rest = compare(request, model, tmp_path, {"label": labels}, {"class_labels": labels}, apart=True)
    assert network.separate
    network.save(tmp_path / "network.keras")
    given = keras.models.load_model(tmp_path / "network.keras")(
        {"image": rest[1][0], "time": rest[1][1], "label": labels}
    )
    np.testing.assert_allclose(ops.convert_to_numpy(given), rest[0], atol=TOLERANCE)
    check_round_trip(diffusers.DiTTransformer2DModel, network, tmp_path, *rest)


@pytest.mark.once
def test_shards(request, tmp_path):
    model = perturbed(diffusers.UNet2DModel(**SMALL, **DDPM))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    x, t = normal(2, SIZE, SIZE, 3), np.array([3.0, 977.0], "float32")
    given = ops.convert_to_numpy(interop.load(tmp_path)({"image": x, "time": t}))
    np.testing.assert_allclose(given, theirs(model, x, t), atol=TOLERANCE)


@pytest.mark.once
def test_pickled_weights(tmp_path):
    model = perturbed(diffusers.UNet2DModel(**SMALL, **PLAIN))
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "diffusion_pytorch_model.bin").exists()
    x, t = normal(2, SIZE, SIZE, 3), np.array([3.0, 977.0], "float32")
    given = ops.convert_to_numpy(interop.load(tmp_path)({"image": x, "time": t}))
    np.testing.assert_allclose(given, theirs(model, x, t), atol=TOLERANCE)


@pytest.mark.once
def test_old_names_of_attention(tmp_path):
    """What was written before diffusers had one class of attention for all."""
    from safetensors.numpy import load_file, save_file

    model = perturbed(diffusers.UNet2DModel(**SMALL, **DDPM))
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        state = {name.replace(new, old): array for name, array in state.items()}
    save_file(state, file)
    x, t = normal(2, SIZE, SIZE, 3), np.array([3.0, 977.0], "float32")
    given = ops.convert_to_numpy(interop.load(tmp_path)({"image": x, "time": t}))
    np.testing.assert_allclose(given, theirs(model, x, t), atol=TOLERANCE)
