"""ControlNets made and saved by diffusers: the same residuals, and pipelines with them the same images."""

import json

import numpy as np
import pytest
from keras import ops

from kdiff import networks
from kdiff.guidance import ClassifierFree, Control
from kdiff.interop import diffusers as interop
from tests import test_interop_prompts_reference as pipelines
from tests.test_interop_prompts_reference import (
    TEXTS,
    TIME_IDS,
    UNET,
    XL,
    X,
    perturbed,
)
from tests.toys import mostly_once, numpy

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # diffusers mixes NumPy 2 and tensors
]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SMALL = {name: UNET[name] for name in ("block_out_channels", "layers_per_block", "norm_num_groups", "in_channels")}
SMALL |= {"down_block_types": UNET["down_block_types"], "attention_head_dim": 2, "cross_attention_dim": 16}
HINT = {"conditioning_embedding_out_channels": (4, 6)}  # the toy autoencoder halves pictures once
ADDED = {"projection_class_embeddings_input_dim": 6 * 8 + 12, "cross_attention_dim": 32}
NETWORKS = {
    "sd_1": {},
    "sd_2": {"use_linear_projection": True, "attention_head_dim": (2, 4), "layers_per_block": 2},
    "xl": {**XL, **ADDED, "transformer_layers_per_block": (1, 2), "mid_block_type": "UNetMidBlock2DCrossAttn"},
    "plain_middle": {"mid_block_type": "UNetMidBlock2D", "conditioning_channels": 1},
    "eight_times": {"conditioning_embedding_out_channels": (16, 32, 96, 256)},
    "classes": {"num_class_embeds": 5},
}
RNG = np.random.default_rng(3)
PICTURE = RNG.uniform(-1, 1, (2, 16, 16, 3)).astype("float32")
OTHER = RNG.uniform(-1, 1, (2, 16, 16, 3)).astype("float32")


def control_net(seed=0, **options):
    """With outlets that are not zero, and not small beside what they are added to."""
    torch.manual_seed(seed)
    network = perturbed(diffusers.ControlNetModel(**{**SMALL, **HINT, **options}))
    with torch.no_grad():
        for layer in (*network.controlnet_down_blocks, network.controlnet_mid_block):
            layer.weight.add_(0.3 * torch.randn(layer.weight.shape))
        network.controlnet_cond_embedding.conv_out.weight.add_(0.3)
    return network


def channels_first(x):
    return torch.tensor(np.moveaxis(x, -1, 1))


@pytest.mark.parametrize("name", mostly_once(NETWORKS, ("xl",)))
def test_residuals(name, tmp_path):
    """And of what is written again diffusers' are equal to the last bit."""
    theirs = control_net(**NETWORKS[name])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = interop.load(tmp_path / "theirs")
    assert isinstance(ours, networks.ControlNet)
    config, rng, factor = theirs.config, np.random.default_rng(1), ours.hint.factor
    picture = rng.uniform(-1, 1, (2, 8 * factor, 8 * factor, config.conditioning_channels)).astype("float32")
    tokens = rng.standard_normal((2, 5, config.cross_attention_dim)).astype("float32")
    inputs, options = {"image": X, "time": np.float32([7, 300]), "hint": picture, "tokens": tokens}, {}
    if name == "xl":
        added = {"text_embeds": rng.standard_normal((2, 12)).astype("float32"), "time_ids": np.float32([TIME_IDS] * 2)}
        inputs |= added
        options["added_cond_kwargs"] = {key: torch.tensor(value) for key, value in added.items()}
    if name == "classes":
        inputs["label"] = np.int32([1, 4])
        options["class_labels"] = torch.tensor([1, 4])
    asked = (channels_first(X), torch.tensor([7, 300]), torch.tensor(tokens), channels_first((picture + 1) / 2))
    with torch.no_grad():
        down, middle = theirs(*asked, **options, return_dict=False)
    found = ours({one: ops.convert_to_tensor(value) for one, value in inputs.items()}, training=False)
    for y, wanted in zip(found, (*down, middle), strict=True):
        wanted = wanted.permute(0, 2, 3, 1).numpy()
        assert np.abs(numpy(y) - wanted).max() <= 1e-5 * max(1.0, np.abs(wanted).max())
        assert wanted.std() > 0.01
    interop.save(ours, tmp_path / "ours")
    again = diffusers.ControlNetModel.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        for one, other in zip(again(*asked, **options)[0], theirs(*asked, **options)[0], strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


REFUSED = {
    "controlnet_conditioning_channel_order": "bgr",
    "global_pool_conditions": True,
    "encoder_hid_dim": 12,
    "addition_embed_type": "text",
}


@pytest.mark.once
def test_what_is_not_there_is_refused_by_name(tmp_path):
    control_net().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name, value in REFUSED.items():
        (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
        with pytest.raises(ValueError, match=f"config.json: `{name}` must be"):
            interop.load(tmp_path)


# --- pipelines


def pipeline(kind, folder, *controls):
    """That of the tests of texts, with ControlNets."""
    parts = dict(getattr(pipelines, kind)(folder).components)
    theirs = getattr(diffusers, f"StableDiffusion{'XL' if kind == 'xl' else ''}ControlNetPipeline")
    parts = {name: one for name, one in parts.items() if name != "image_encoder" or one is not None}
    options = {"add_watermarker": False} if kind == "xl" else {"requires_safety_checker": False}
    controls = controls[0] if len(controls) == 1 else list(controls)
    made = theirs(**parts, controlnet=controls, **options)
    made.set_progress_bar_config(disable=True)
    return made


def of_xl(kind):
    return {**XL, **ADDED} if kind == "xl" else {}


def images(theirs, kind, pictures, steps=4, scale=6.0, **options):
    """diffusers'."""
    given = [channels_first((one + 1) / 2) for one in pictures]
    own = {"original_size": (16, 16), "target_size": (16, 16)} if kind == "xl" else {}
    options = {"negative_prompt": ["", ""], "num_inference_steps": steps, "guidance_scale": scale, **own, **options}
    given = given[0] if len(given) == 1 else given
    return theirs(TEXTS, image=given, latents=channels_first(X), output_type="np", **options).images


def check_images(model, wanted, kind, guidance, steps=4, **pictures):
    ids = {"time_ids": TIME_IDS} if kind == "xl" else {}
    found = model.sample(2, text=TEXTS, guidance=guidance, steps=steps, x=X, **ids, **pictures)
    assert wanted.std() > 0.05
    assert np.abs((found + 1.0) / 2.0 - wanted).max() < 1e-4


@pytest.fixture(scope="module", params=mostly_once(["sd_1", "xl"], ("sd_1",)))
def one(request, tmp_path_factory):
    """(kind, diffusers' pipeline with a ControlNet, the folder that it has written)."""
    folder, kind = tmp_path_factory.mktemp(request.param), request.param
    theirs = pipeline(kind, folder, control_net(**of_xl(kind)))
    theirs.save_pretrained(folder / "saved")
    return kind, theirs, folder / "saved"


def free(kind):
    return ClassifierFree(6.0, negative={"text": ["", ""]})


@pytest.mark.once
def test_images(one):
    """At a scale, in a part of the run: of four steps the second and the third."""
    kind, theirs, folder = one
    model = interop.load(folder)
    window = {"control_guidance_start": 0.25, "control_guidance_end": 0.75}
    wanted = images(theirs, kind, [PICTURE], controlnet_conditioning_scale=0.7, **window)
    plain = images(theirs, kind, [PICTURE], controlnet_conditioning_scale=0.0)
    assert np.abs(wanted - plain).max() > 0.02
    times = model.sampler.clone(steps=4).times(model.schedule)
    part = Control("control", 0.7, begin=float(times[:2].mean()), end=float(times[2:4].mean()))
    check_images(model, wanted, kind, [part, free(kind)], control=PICTURE)
    if kind == "sd_1":
        return
    check_images(model, plain, kind, free(kind))  # without the picture


@pytest.mark.once
def test_guess_mode(one):
    kind, theirs, folder = one
    model, count = interop.load(folder), len(theirs.controlnet.controlnet_down_blocks) + 1
    wanted = images(theirs, kind, [PICTURE], guess_mode=True, controlnet_conditioning_scale=0.9)
    ramp = 0.9 * np.tile(np.logspace(-1, 0, count), (2, 1))
    guidance = ClassifierFree(6.0, negative={"text": ["", ""], "control_scale": 0 * ramp})
    check_images(model, wanted, kind, guidance, control=PICTURE, control_scale=ramp)


@pytest.mark.once
def test_written_again(one, tmp_path):
    kind, theirs, folder = one
    interop.save(interop.load(folder), tmp_path)
    again = type(theirs).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(images(again, kind, [PICTURE]), images(theirs, kind, [PICTURE]), atol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize("given", ["its own", "folders"])
def test_two_at_once(given, tmp_path):
    """Each with its own scale and part of the run, of the pipeline or of folders beside it."""
    theirs = pipeline("sd_2", tmp_path, control_net(use_linear_projection=True), control_net(1, layers_per_block=1))
    theirs.save_pretrained(tmp_path / "saved")
    paths = {"edges": tmp_path / "saved" / "controlnet", "depth": tmp_path / "saved" / "controlnet_1"}
    model = interop.load(tmp_path / "saved", controlnet=None if given == "its own" else paths)
    names = ("control", "control_1") if given == "its own" else ("edges", "depth")
    assert tuple(model.network.controls) == names
    scales = {"controlnet_conditioning_scale": [0.5, 0.8], "control_guidance_end": [0.5, 1.0]}
    wanted = images(theirs, "sd_2", [PICTURE, OTHER], **scales)
    times = model.sampler.clone(steps=4).times(model.schedule)
    parts = [Control(names[0], 0.5, end=float(times[1:3].mean())), free("sd_2")]
    pictures = {names[0]: PICTURE, names[1]: OTHER, f"{names[1]}_scale": 0.8}
    check_images(model, wanted, "sd_2", parts, **pictures)
    if given == "its own":
        interop.save(model, tmp_path / "again")
        again = type(theirs).from_pretrained(tmp_path / "again")
        assert len(again.controlnet.nets) == 2


@pytest.mark.once
def test_an_adapter_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "T2IAdapter"}))
    with pytest.raises(ValueError, match="received: 'T2IAdapter'"):
        interop.load(tmp_path)
    index = {"unet": ["diffusers", "UNet2DConditionModel"], "adapter": ["diffusers", "T2IAdapter"]}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionAdapterPipeline", **index}))
    with pytest.raises((ValueError), match="T2IAdapter"):
        interop.load(tmp_path)
