"""Folders as diffusers and its users lay them out: each loads as what it is, or is refused by name."""

import json
import shutil

import numpy as np
import pytest
from keras import ops

from kdiff.interop import diffusers as interop
from kdiff.interop import folders
from tests.test_interop_networks_reference import PLAIN, SIZE, SMALL, normal, one_thread, perturbed, theirs  # noqa: F401

pytestmark = [pytest.mark.reference, pytest.mark.once]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

X, T = normal(2, SIZE, SIZE, 3), np.array([3.0, 977.0], "float32")


@pytest.fixture
def unet():
    return perturbed(diffusers.UNet2DModel(**SMALL, **PLAIN))


def check(network, unet, tolerance=1e-5):
    given = ops.convert_to_numpy(network({"image": X, "time": T}))
    np.testing.assert_allclose(given, theirs(unet, X, T), atol=tolerance)


def configure(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def pipeline(unet, tmp_path):
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    return tmp_path


def test_all_in_the_root(unet, pipeline):
    """As in google/ddpm-cifar10-32: nothing lies in `unet` or `scheduler`."""
    for part in ("unet", "scheduler"):
        for file in (pipeline / part).iterdir():
            file.rename(pipeline / file.name)
        (pipeline / part).rmdir()
    model = interop.load(pipeline)
    check(model.network, unet)
    assert model.sampler.solver.__class__.__name__ == "DDPM"
    configure(pipeline / "config.json", _class_name="Other")
    with pytest.raises(ValueError, match=r"config\.json: `_class_name` must be one of"):
        interop.load(pipeline)


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_variants(unet, variant, shards, tmp_path):
    """The only one is taken, one of several if asked for, and none before the file without one."""
    options = {"max_shard_size": "20KB"} if shards else {}
    unet.save_pretrained(tmp_path, variant=variant, **options)
    assert folders.variants(tmp_path) == [variant]
    check(interop.load(tmp_path), unet)
    other = perturbed(diffusers.UNet2DModel(**SMALL, **PLAIN))
    other.conv_out.bias.data += 1
    other.save_pretrained(tmp_path, variant="bf16")
    with pytest.raises(ValueError, match=rf"`variant` must be one of \['bf16', '{variant}'\]; received: None"):
        interop.load(tmp_path)
    check(interop.load(tmp_path, variant=variant), unet)
    check(interop.load(tmp_path, variant="bf16"), other)
    other.conv_out.bias.data += 1
    other.save_pretrained(tmp_path)
    check(interop.load(tmp_path), other)
    with pytest.raises(ValueError, match=rf"`variant` must be one of \['bf16', '{variant}'\]; received: 'fp8'"):
        interop.load(tmp_path, variant="fp8")


def test_names_of_indices(tmp_path):
    """Of variants there are two, by the version of diffusers."""
    for name in (
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "model.bf16.bin.index.json",
        "model.bin",
        "x.json",
    ):
        (tmp_path / name).write_text("{}")
    (tmp_path / "diffusion_pytorch_model.fp16-00001-of-00002.safetensors").write_text("")
    assert folders.variants(tmp_path) == ["bf16", "fp16"]


def test_accelerates_name(unet, tmp_path):
    unet.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").rename(tmp_path / "model.safetensors")
    check(interop.load(tmp_path), unet)


def test_what_ema_model_writes(unet, tmp_path):
    """The averaged weights, and notes of the average among the keys of the network."""
    from diffusers.training_utils import EMAModel

    average = EMAModel(
        unet.parameters(),
        use_ema_warmup=True,
        inv_gamma=2.0,
        power=0.75,
        model_cls=type(unet),
        model_config=unet.config,
    )
    average.save_pretrained(tmp_path)
    assert {"inv_gamma", "power", "decay"} <= set(json.loads((tmp_path / "config.json").read_text()))
    check(interop.load(tmp_path), unet)


@pytest.mark.parametrize(
    ("part", "entry"),
    [
        ("adapter", ["diffusers", "T2IAdapter"]),
        ("motion_adapter", ["diffusers", "MotionAdapter"]),
        ("upscaler", ["my_module", "Upscaler"]),
    ],
)
def test_pipelines_that_would_be_others(pipeline, part, entry):
    configure(pipeline / "model_index.json", **{part: entry})
    with pytest.raises(
        ValueError, match=rf"has \{{'{part}': '{entry[1]}'\}}, which kdiff does not load.*load\('.*unet'\)"
    ):
        interop.load(pipeline)
    configure(pipeline / "model_index.json", **{part: [None, None]})
    interop.load(pipeline)


def test_parts_that_change_nothing(pipeline):
    more = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    more |= {"text_encoder": ["transformers", "CLIPTextModel"], "low_res_scheduler": ["diffusers", "DDPMScheduler"]}
    configure(pipeline / "model_index.json", **more)
    interop.load(pipeline)


@pytest.mark.parametrize(("entry", "codec"), [([None, None], "Pixels"), (["diffusers", "AutoencoderKL"], "Identity")])
def test_an_autoencoder_that_is_not_there(pipeline, entry, codec):
    configure(pipeline / "model_index.json", vae=entry)
    assert type(interop.load(pipeline).codec).__name__ == codec


def test_no_network(pipeline):
    configure(pipeline / "model_index.json", unet=[None, None])
    with pytest.raises(ValueError, match="must have one of"):
        interop.load(pipeline)
    shutil.rmtree(pipeline / "unet")
    configure(pipeline / "model_index.json", unet=["diffusers", "UNet2DModel"])
    with pytest.raises(ValueError, match=r"unet.config\.json: neither the file nor"):
        interop.load(pipeline)


def test_times_by_the_number_of_tokens(pipeline):
    """`use_dynamic_shifting` asks for it."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.save_pretrained(pipeline / "scheduler")
    with pytest.raises(ValueError, match="give `tokens`, the length"):
        interop.load(pipeline)
    model = interop.load(pipeline, tokens=256)
    scheduler.set_timesteps(10, mu=0.5)
    np.testing.assert_allclose(model.sampler.clone(steps=10).times(model.schedule), scheduler.sigmas, atol=1e-6)
    with pytest.raises(ValueError, match=r"\['tokens'\] are arguments for a pipeline"):
        interop.load(pipeline / "unet", tokens=256)


def test_pictures_in_0_to_1(tmp_path):
    """Of score-based models; there and back."""
    config = {"down_block_types": ("SkipDownBlock2D",) * 2, "up_block_types": ("SkipUpBlock2D",) * 2}
    config |= {"block_out_channels": (64, 64), "sample_size": SIZE, "layers_per_block": 1, "norm_num_groups": None}
    unet = perturbed(diffusers.UNet2DModel(**config, attention_head_dim=None, time_embedding_type="fourier"))
    scheduler = diffusers.ScoreSdeVeScheduler(snr=0.1)
    unet.save_pretrained(tmp_path / "unet")
    scheduler.save_pretrained(tmp_path / "scheduler")
    parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "ScoreSdeVeScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "ScoreSdeVePipeline", **parts}))
    model = interop.load(tmp_path)
    np.testing.assert_allclose(ops.convert_to_numpy(model.codec.encode(np.array([-1.0, 0.0, 1.0]))), [0, 0.5, 1])
    assert np.isfinite(model.sample(2, steps=3)).all()
    interop.save(model, tmp_path / "again")
    again = interop.load(tmp_path / "again")
    assert again.sampler == model.sampler
    assert (again.codec, again.schedule) == (model.codec, model.schedule)
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["_class_name"] == "ScoreSdeVePipeline"
