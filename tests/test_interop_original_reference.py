"""The original layouts: weights of diffusers' networks under the original names give diffusers' output."""

import re

import numpy as np
import pytest
from keras import ops

from kdiff.interop import original
from tests.test_interop_networks_reference import SMALL_DIT, TOLERANCE, normal, one_thread, perturbed, theirs  # noqa: F401

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TIMES = np.array([3.0, 977.0], "float32")
DIT_NAMES = [
    (r"pos_embed\.proj", "x_embedder.proj"),
    (r"transformer_blocks\.(\d+)\.norm1\.linear", r"blocks.\1.adaLN_modulation.1"),
    (r"transformer_blocks\.(\d+)\.attn1\.to_out\.0", r"blocks.\1.attn.proj"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"blocks.\1.mlp.fc1"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"blocks.\1.mlp.fc2"),
    (r"transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"transformer_blocks\.0\.norm1\.emb\.class_embedder", "y_embedder"),
    (r"proj_out_1", "final_layer.adaLN_modulation.1"),
    (r"proj_out_2", "final_layer.linear"),
]


def arrays(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def original_dit(state):
    """The names of facebookresearch/DiT: one layer for queries, keys and values."""
    for name in [name for name in state if "to_q" in name]:
        parts = [state.pop(name.replace("to_q", f"to_{part}")) for part in "qkv"]
        state[re.sub(r"transformer_blocks\.(\d+)\.attn1\.to_q", r"blocks.\1.attn.qkv", name)] = np.concatenate(parts)
    state = {name: array for name, array in state.items() if not re.search(r"\.[1-9]\d*\.norm1\.emb\.", name)}
    for new, old in DIT_NAMES:
        state = {re.sub(new, old, name): array for name, array in state.items()}
    return state


@pytest.fixture(scope="module")
def dit():
    """diffusers' DiT, with the waves of the original, which it has with another shift."""
    model = perturbed(diffusers.DiTTransformer2DModel(**{**SMALL_DIT, "num_layers": 2, "sample_size": 16}))
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model


@pytest.mark.once
@pytest.mark.parametrize("kind", ["mapping", "safetensors", "npz", "pt"])
def test_dit(request, dit, kind, tmp_path):
    state = original_dit(arrays(dit))
    network = original.dit(written(state, kind, tmp_path), heads=2, image_size=16)
    x, labels = normal(2, 16, 16, 4), np.array([1, 10])
    given = ops.convert_to_numpy(network({"image": x, "time": TIMES, "label": labels}))
    difference = np.abs(given - theirs(dit, x, TIMES, class_labels=labels)).max()
    print(f"DIFFERENCE original {request.node.name} {difference:.1e}")
    assert difference < TOLERANCE


def written(state, kind, folder):
    """The state dict as a file of this kind, or as it is."""
    from safetensors.numpy import save_file

    state = {name: np.ascontiguousarray(array) for name, array in state.items()}
    file = folder / f"weights.{kind}"
    writers = {
        "safetensors": lambda: save_file(state, file),
        "npz": lambda: np.savez(file, **state),
        "pt": lambda: torch.save({name: torch.tensor(array) for name, array in state.items()}, file),
    }
    if kind in writers:
        writers[kind]()
    return state if kind == "mapping" else file


ADM = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "attn_norm_num_groups": 32,
    "attention_head_dim": 16,
    "num_class_embeds": 5,
    "out_channels": 6,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
}
RESNET = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
BLOCK_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "group_norm": "norm",
    "to_out.0": "proj_out",
}
FIXED = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def original_adm(state, depth, heads_first, head_width):
    """The names of openai/guided-diffusion."""
    for name in [name for name in state if "to_q" in name]:
        parts = [state.pop(name.replace("to_q", f"to_{part}")) for part in "qkv"]
        if heads_first:  # head by head
            parts = [part.reshape(-1, head_width, *part.shape[1:]) for part in parts]
            parts = [np.stack(parts, axis=1).reshape(-1, *parts[0].shape[2:])]
        whole = np.concatenate(parts)
        state[name.replace("to_q", "qkv")] = whole[..., None] if name.endswith("weight") else whole
    return {renamed(name, depth, state): array for name, array in state.items()}


def renamed(name, depth, state):
    for new, old in FIXED.items():
        name = name.replace(new, old, 1) if name.startswith(new + ".") else name
    found = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|\w+samplers)\.(\d+)\.(.*)", name)
    if found:
        way, level, kind, index, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        attends = any(key.startswith(f"up_blocks.{level}.attentions") for key in state)
        number = {
            ("down", "downsamplers"): (depth + 1) * (level + 1),
            ("up", "upsamplers"): (depth + 1) * level + depth,
        }.get((way, kind), (depth + 1) * level + index + (way == "down"))
        place = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 1 + attends}[kind]
        rest = rest.replace("conv.", "op." if kind == "downsamplers" else "conv.") if rest.startswith("conv.") else rest
        name = f"{'input' if way == 'down' else 'output'}_blocks.{number}.{place}.{rest}"
    for new, old in BLOCK_NAMES.items():
        name = re.sub(rf"\.{re.escape(new)}\.(weight|bias)$", rf".{old}.\1", name)
    return name


@pytest.mark.parametrize(
    "changes", [{}, RESNET, {"resnet_time_scale_shift": "default"}], ids=["conv", "resnet", "added"]
)
@pytest.mark.parametrize("new_order", [False, True])
def test_guided(request, changes, new_order):
    config = {**ADM, **changes}
    if changes is RESNET:
        config["up_block_types"] = ("AttnUpBlock2D", "ResnetUpsampleBlock2D")
    model = perturbed(diffusers.UNet2DModel(**config))
    state = original_adm(arrays(model), 2, not new_order, 16)
    options = {"head_width": 16, "new_order": new_order, "scale_shift": config["resnet_time_scale_shift"] != "default"}
    network = original.guided(state, 16, (1, 2), attention_at=(8,), **options)
    x, labels = normal(2, 16, 16, 3), np.array([1, 4])
    given = ops.convert_to_numpy(network({"image": x, "time": TIMES, "label": labels}))
    difference = np.abs(given - theirs(model, x, TIMES, class_labels=labels)).max()
    print(f"DIFFERENCE original {request.node.name} {difference:.1e}")
    assert difference < TOLERANCE


@pytest.mark.once
def test_guided_of_half_a_width(request):
    """ADM's at 512: the first level has half of the channels of the time's waves."""
    from diffusers.models.embeddings import TimestepEmbedding, Timesteps

    model = diffusers.UNet2DModel(**{**ADM, "time_embedding_dim": 256})
    model.time_proj, model.time_embedding = Timesteps(64, True, 0), TimestepEmbedding(64, 256)
    state = original_adm(arrays(perturbed(model)), 2, True, 16)
    network = original.guided(state, 16, (0.5, 1), attention_at=(8,), head_width=16)
    x, labels = normal(2, 16, 16, 3), np.array([1, 4])
    given = ops.convert_to_numpy(network({"image": x, "time": TIMES, "label": labels}))
    np.testing.assert_allclose(given, theirs(model, x, TIMES, class_labels=labels), atol=TOLERANCE)


# --- the SimpleUNet of tutorials

WIDTHS = (8, 16, 16)


def simple_state():
    """Random weights under the names of the tutorial's module; `dec3` has twice the channels of `enc3` and so on."""
    generator = np.random.default_rng(0)
    state = {}

    def add(name, *shape):
        scale = np.prod(shape[1:]) ** -0.5
        state[f"{name}.weight"] = (scale * generator.normal(size=shape)).astype("float32")
        state[f"{name}.bias"] = (0.1 * generator.normal(size=shape[0])).astype("float32")

    def block(name, before, after):
        for layer, shape in {"conv1": (after, before, 3, 3), "conv2": (after, after, 3, 3)}.items():
            add(f"{name}.{layer}", *shape)
        add(f"{name}.time_mlp", after, 12)
        for norm in ("norm1", "norm2"):
            add(f"{name}.{norm}", after)
            state[f"{name}.{norm}.weight"] += 0.5
        if before != after:
            add(f"{name}.shortcut", after, before, 1, 1)

    one, two, three = WIDTHS
    add("time_mlp.1", 12, 12)
    add("time_mlp.3", 12, 12)
    blocks = {"enc1": (3, one), "enc2": (one, two), "enc3": (two, three), "mid": (three, three)}
    blocks |= {"dec3": (2 * three, two), "dec2": (2 * two, one), "dec1": (2 * one, one)}
    for name, (before, after) in blocks.items():
        block(name, before, after)
    add("out", 3, one, 1, 1)
    return state


def simple(state, image, time):
    """The module, written with PyTorch's functions: (batch, height, width, channels) there and back, in float64."""
    functional = torch.nn.functional
    state = {name: torch.tensor(array, dtype=torch.float64) for name, array in state.items()}

    def of(function, name, x, **options):
        return function(x, weight=state[f"{name}.weight"], bias=state[f"{name}.bias"], **options)

    def norm(name, x):
        return of(functional.group_norm, name, functional.silu(x), num_groups=8)

    def block(name, x):
        y = norm(f"{name}.norm1", of(functional.conv2d, f"{name}.conv1", x, padding=1))
        y = y + of(functional.linear, f"{name}.time_mlp", functional.silu(vector))[:, :, None, None]
        y = norm(f"{name}.norm2", of(functional.conv2d, f"{name}.conv2", y, padding=1))
        return y + (of(functional.conv2d, f"{name}.shortcut", x) if f"{name}.shortcut.weight" in state else x)

    angles = torch.tensor(time, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(6) / 5.0)
    vector = of(functional.linear, "time_mlp.1", torch.cat([torch.sin(angles), torch.cos(angles)], -1))
    vector = of(functional.linear, "time_mlp.3", functional.silu(vector))
    x, skips = torch.tensor(image, dtype=torch.float64).permute(0, 3, 1, 2), []
    for i in (1, 2, 3):
        skips.append(block(f"enc{i}", x))
        x = functional.max_pool2d(skips[-1], 2)
    x = block("mid", x)
    for i in (3, 2, 1):
        x = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        x = block(f"dec{i}", torch.cat([x, skips[i - 1]], 1))
    return of(functional.conv2d, "out", x).permute(0, 2, 3, 1).numpy()


@pytest.mark.once
def test_simple_unet():
    state = simple_state()
    network = original.simple_unet({name: torch.tensor(array) for name, array in state.items()})
    x, t = normal(2, 16, 8, 3), np.array([0.0, 999.0], "float32")
    given = ops.convert_to_numpy(network({"image": x, "time": t}))
    wanted = simple(state, x, t)
    assert np.abs(given - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert network.count_params() == sum(array.size for array in state.values())
