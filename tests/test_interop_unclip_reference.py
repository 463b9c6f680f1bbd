"""Karlo's pipeline, made and saved by diffusers: strings in, the same embeddings and images out."""

import importlib
import math
import shutil

import numpy as np
import pytest
from keras import ops
from PIL import Image
from safetensors import numpy as safetensors

from kdiff import UnCLIP, backend
from kdiff.encoders import CLIPText, Prompt
from kdiff.interop import diffusers as interop
from kdiff.interop import unclip as karlo
from kdiff.interop import unet_names, unets
from kdiff.text import Bytes
from tests.test_interop_prompts_reference import LENGTH, TEXTS, text_encoder, words

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
WIDTH, TIME, STEPS = 16, 32, {"prior": 3, "decoder": 3, "super_res": 2}
SHIFT = {"resnet_time_scale_shift": "scale_shift", "norm_num_groups": 4, "layers_per_block": 1}
DECODER = {
    **SHIFT,
    "sample_size": 4,
    "in_channels": 3,
    "out_channels": 6,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "block_out_channels": (8, 16),
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "class_embed_type": "identity",
}
LARGER = {
    **SHIFT,
    "resnet_time_scale_shift": "default",
    "sample_size": 8,
    "in_channels": 6,
    "out_channels": 3,
    "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
    "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    "block_out_channels": (8, 16),
    "attention_head_dim": 4,
}
PRIOR = {"num_attention_heads": 2, "attention_head_dim": 6, "num_layers": 2}
KARLO = {
    "decoder": {
        **DECODER,
        "sample_size": 64,
        "layers_per_block": 3,
        "norm_num_groups": 32,
        "down_block_types": ("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
        "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
        "block_out_channels": (320, 640, 960, 1280),
        "cross_attention_dim": 1536,
        "attention_head_dim": 64,
    },
    "super_res": {
        **LARGER,
        "sample_size": 256,
        "layers_per_block": 3,
        "norm_num_groups": 32,
        "down_block_types": ("ResnetDownsampleBlock2D",) * 4,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 4,
        "block_out_channels": (320, 640, 960, 1280),
        "add_attention": False,
    },
}
TEXT_PROJ = {"clip_embeddings_dim": 768, "time_embed_dim": 1280, "cross_attention_dim": 1536}


def perturbed(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
        if hasattr(model, "clip_std"):
            model.clip_std.copy_(model.clip_std.abs() + 0.5)
    return model.eval()


def scheduler(**options):
    """With its table in float64: in float32 it takes 1 - (1 - r) for an r of 1e-7, of which a digit is left."""
    made = diffusers.UnCLIPScheduler(num_train_timesteps=1000, **options)
    bar = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    made.betas = torch.tensor(np.minimum(1 - bar[1:] / bar[:-1], 0.999))
    made.alphas = 1.0 - made.betas
    made.alphas_cumprod = torch.cumprod(made.alphas, 0)
    return made


def saved(pipeline, folder):
    """(the pipeline, its folder, our model)."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "saved")
    return pipeline, folder / "saved", interop.load(folder / "saved")


def shared(folder):
    """What both pipelines have."""
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    torch.manual_seed(0)
    text = {"clip_embeddings_dim": WIDTH, "time_embed_dim": TIME, "cross_attention_dim": 12}
    return {
        "decoder": perturbed(diffusers.UNet2DConditionModel(**DECODER), 2),
        "text_encoder": text_encoder("CLIPTextModelWithProjection", projection_dim=WIDTH),
        "tokenizer": words(folder / "words", "<|endoftext|>"),
        "text_proj": perturbed(UnCLIPTextProjModel(**text), 3),
        "super_res_first": perturbed(diffusers.UNet2DModel(**LARGER), 4),
        "super_res_last": perturbed(diffusers.UNet2DModel(**LARGER), 5),
        "decoder_scheduler": scheduler(variance_type="learned_range"),
        "super_res_scheduler": scheduler(),
    }


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("karlo")
    pipeline = diffusers.UnCLIPPipeline(
        **shared(folder),
        prior=perturbed(diffusers.PriorTransformer(**PRIOR, embedding_dim=WIDTH, num_embeddings=LENGTH), 1),
        prior_scheduler=scheduler(prediction_type="sample", clip_sample_range=5.0),
    )
    return saved(pipeline, folder)


def vision():
    """(an encoder of images, its processor)."""
    config = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"image_size": 8, "patch_size": 4, "projection_dim": WIDTH}
    size = {"shortest_edge": 8}, {"height": 8, "width": 8}
    processor = transformers.CLIPImageProcessor(size=size[0], crop_size=size[1])
    model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**config))
    return perturbed(model, 6), processor


@pytest.fixture(scope="module")
def variations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variations")
    encoder, processor = vision()
    parts = {"image_encoder": encoder, "feature_extractor": processor}
    return saved(diffusers.UnCLIPImageVariationPipeline(**shared(folder), **parts), folder)


SHAPES = {"prior": (2, WIDTH), "decoder": (2, 4, 4, 3), "super_res": (2, 8, 8, 3)}


def draws(stage):
    """What a stage begins with, and the noise of its steps."""
    rng = np.random.default_rng(list(SHAPES).index(stage))
    return [rng.standard_normal(SHAPES[stage]).astype("float32") for _ in range(STEPS[stage] + 1)]


PICTURES = np.random.default_rng(5).integers(0, 256, (2, 8, 8, 3)).astype("uint8")


def first(x):
    return torch.tensor(np.moveaxis(x, -1, 1) if x.ndim == 4 else x)


def images_of(pipeline, monkeypatch, **options):
    """(embeddings, small images, images) in [-1, 1]."""
    given = iter(noise for stage in SHAPES for noise in draws(stage)[1:-1])
    module = importlib.import_module("diffusers.schedulers.scheduling_unclip")
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: first(next(given)))
    seen = {}
    post = pipeline.prior.post_process_latents
    monkeypatch.setattr(pipeline.prior, "post_process_latents", lambda z: seen.setdefault("z", post(z)))
    handle = pipeline.super_res_first.register_forward_pre_hook(
        lambda _, __, kwargs: seen.update(low=kwargs["sample"][:, 3:].clone()), with_kwargs=True
    )
    latents = {f"{stage}_latents": first(draws(stage)[0]) for stage in SHAPES}
    steps = {f"{stage}_num_inference_steps": count for stage, count in STEPS.items()}
    images = pipeline(TEXTS, output_type="np", **latents, **steps, **options).images
    handle.remove()
    return seen["z"].numpy(), seen["low"].numpy().transpose(0, 2, 3, 1), 2.0 * images - 1.0


def options_of(stage, **options):
    x, *noise = draws(stage)
    return {"x": x, "noise": lambda step, shape: noise[step], "steps": STEPS[stage], **options}


def test_text_to_images(pair, monkeypatch):
    """The prior's embeddings, the decoder's small images, and the upsampler's, whose last step is another network's."""
    theirs, _, unclip = pair
    scales = {"prior_guidance_scale": 4.0, "decoder_guidance_scale": 8.0}
    z, low, images = images_of(theirs, monkeypatch, **scales)
    found = unclip.embeddings(2, options=options_of("prior", guidance=4.0), text=TEXTS)
    np.testing.assert_allclose(found, z, atol=TOLERANCE * np.abs(z).max())
    small = unclip.decoder.sample(2, embedding=found, text=TEXTS, **options_of("decoder", guidance=8.0))
    upsampler = unclip.upsamplers[0]
    x = np.zeros((2, 8, 8, 3), "float32")
    beside = upsampler.network.noisy.conditions["low"]
    resized = ops.convert_to_numpy(beside(ops.convert_to_tensor(small), image=ops.convert_to_tensor(x)).map)
    np.testing.assert_allclose(resized, low, atol=TOLERANCE)
    large = upsampler.sample(2, low=small, **options_of("super_res"))
    assert images.std() > 0.05
    np.testing.assert_allclose(large, images, atol=TOLERANCE)


@pytest.mark.once
def test_the_last_step_is_another_networks(pair):
    _, _, unclip = pair
    network = unclip.upsamplers[0].network
    inputs = {"image": draws("super_res")[0], "low": draws("decoder")[0], "time": np.array([0.0, 999.0], "float32")}
    clean, noisy = (ops.convert_to_numpy(one(inputs)) for one in (network.clean, network.noisy))
    assert np.abs(clean - noisy).max() > 0.01
    for training in (False, True):
        mixed = ops.convert_to_numpy(network(inputs, training=training))
        np.testing.assert_allclose(mixed, np.stack([clean[0], noisy[1]]), atol=1e-5)


@pytest.mark.once
def test_the_whole_is_saved(pair, tmp_path):
    import keras

    _, _, unclip = pair
    unclip.save(tmp_path / "karlo.keras")
    again = keras.saving.load_model(tmp_path / "karlo.keras")
    options = {"text": TEXTS, "prior": {"steps": 2}, "decoder": {"steps": 2}, "upsampling": {"steps": 2}}
    np.testing.assert_allclose(again.sample(2, **options), unclip.sample(2, **options), atol=1e-5)


def names(network, slots):
    return {slot.name: math.prod(slot.variable.shape) for slot in slots(network)}


@pytest.mark.once
def test_the_published_sizes():
    """Without memory for them: the decoder, and one of the two upsamplers."""
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**KARLO["decoder"]).state_dict()
        theirs |= {f"text_proj.{k}": v for k, v in UnCLIPTextProjModel(**TEXT_PROJ).state_dict().items()}
        larger = diffusers.UNet2DModel(**KARLO["super_res"]).state_dict()
    with backend.unallocated():
        encoder = CLIPText(257, 77, 768, 1, projection=768)
        encoder.build((None, 77))
        found = karlo.decoder(KARLO["decoder"], TEXT_PROJ, Prompt(encoder, Bytes(77), masked=True), "config.json")
        found.network.build({"time": (None,), **found.shapes})
        small = unets.unet_2d(KARLO["super_res"], "config.json")
        small.network.build({"time": (None,), **small.shapes})
    counted = names(found.network, karlo.decoder_slots)
    assert counted == {name: value.numel() for name, value in theirs.items()}
    assert sum(count for name, count in counted.items() if not name.startswith("text_proj.")) == 885_439_686
    assert sum(count for name, count in counted.items() if name.startswith("text_proj.")) == 7_878_400
    counted = names(small.network, unet_names.unet_slots)
    assert counted == {name: value.numel() for name, value in larger.items()}
    assert sum(counted.values()) == 691_579_523


@pytest.mark.once
def test_what_it_refuses():
    prompt = Prompt(CLIPText(257, 4, 8, 1, 2, 8, projection=8), Bytes(4), masked=True)
    with pytest.raises(ValueError, match="but the decoder takes"):
        karlo.decoder(DECODER, {**TEXT_PROJ, "cross_attention_dim": 5}, prompt, "config.json")
    with pytest.raises(ValueError, match="`time_embed_dim` must be a whole number"):
        karlo.decoder(DECODER, {"cross_attention_dim": 5, "time_embed_dim": None}, prompt, "config.json")


def again_of(theirs, unclip, folder):
    """The pipeline of what kdiff writes, with its tables in float64."""
    interop.save(unclip, folder)
    again = type(theirs).from_pretrained(folder)
    again.set_progress_bar_config(disable=True)
    for name in (name for name in SHAPES if hasattr(theirs, f"{name}_scheduler")):
        one, other = (getattr(pipeline, f"{name}_scheduler") for pipeline in (theirs, again))
        for key in ("variance_type", "num_train_timesteps", "clip_sample", "clip_sample_range", "prediction_type"):
            assert one.config[key] == other.config[key], (name, key)
        for key in ("betas", "alphas", "alphas_cumprod"):
            setattr(other, key, getattr(one, key))
    return again


@pytest.mark.once
def test_saved_again(pair, monkeypatch, tmp_path):
    """diffusers makes the same images of what kdiff writes."""
    theirs, _, unclip = pair
    again = again_of(theirs, unclip, tmp_path)
    scales = {"prior_guidance_scale": 4.0, "decoder_guidance_scale": 8.0}
    with pytest.MonkeyPatch.context() as patch:
        wanted = images_of(theirs, patch, **scales)
    found = images_of(again, monkeypatch, **scales)
    for one, other in zip(wanted, found, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5 * np.abs(one).max())


@pytest.mark.once
def test_variations(variations, monkeypatch, tmp_path):
    """Of pictures, without a prior; and again as kdiff saves them."""
    theirs, _, unclip = variations
    assert unclip.prior is None
    pictures = [Image.fromarray(picture) for picture in PICTURES]
    wanted = varied(theirs, pictures, monkeypatch)
    z = unclip.clip.embed_image(PICTURES)
    run = options_of("decoder", guidance=8.0)
    small = unclip.decoder.sample(2, embedding=z, text=None, **run)
    large = unclip.upsamplers[0].sample(2, low=small, **options_of("super_res"))
    assert wanted.std() > 0.05
    np.testing.assert_allclose(large, wanted, atol=TOLERANCE)
    seen = []
    monkeypatch.setattr(unclip.cascade, "sample", lambda *_, low, **__: seen.append(low))
    unclip.variations(PICTURES, 1, decoder=run)
    np.testing.assert_allclose(seen[0], small, atol=TOLERANCE)
    again = again_of(theirs, unclip, tmp_path)
    np.testing.assert_allclose(varied(again, pictures, monkeypatch), wanted, atol=1e-5)
    with pytest.raises(ValueError, match="it has no prior"):
        unclip.sample(1, text="a cat")


def varied(pipeline, pictures, monkeypatch):
    given = iter(noise for stage in ("decoder", "super_res") for noise in draws(stage)[1:-1])
    module = importlib.import_module("diffusers.schedulers.scheduling_unclip")
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: first(next(given)))
    latents = {f"{stage}_latents": first(draws(stage)[0]) for stage in ("decoder", "super_res")}
    steps = {f"{stage}_num_inference_steps": STEPS[stage] for stage in ("decoder", "super_res")}
    return 2.0 * pipeline(pictures, output_type="np", **latents, **steps).images - 1.0


@pytest.mark.once
def test_what_it_does_not_save(pair, variations, monkeypatch, tmp_path):
    _, _, unclip = pair
    refused = {
        "one upsampler, `ExpertDenoisers`": UnCLIP(unclip.prior, unclip.decoder),
        "a prior, or a `clip`": UnCLIP(None, unclip.decoder, *unclip.upsamplers),
        "one text encoder in diffusers; these have two": UnCLIP(
            unclip.prior, variations[2].decoder, *unclip.upsamplers
        ),
    }
    for reason, model in refused.items():
        with pytest.raises(ValueError, match=reason):
            interop.save(model, tmp_path)
    monkeypatch.setattr(unclip.decoder, "sampler", unclip.decoder.sampler.replaced(solver="ddim"))
    with pytest.raises(ValueError, match="no UnCLIPScheduler of diffusers equals"):
        interop.save(unclip, tmp_path)


@pytest.mark.once
@pytest.mark.parametrize(
    ("file", "name", "words"),
    [
        ("text_proj", "embedding_proj.weight", "(?s)saved.decoder, and text_proj: .*text_proj.embedding_proj.weight"),
        ("prior", "clip_mean", r"prior: the weights must have .*missing: \['clip_mean'\]"),
        ("super_res_last", "conv_in.bias", "(?s)super_res_last.*conv_in.bias"),
    ],
)
def test_missing_weights(pair, tmp_path, file, name, words):
    _, folder, _ = pair
    shutil.copytree(folder, tmp_path / "saved")
    path = tmp_path / "saved" / file / "diffusion_pytorch_model.safetensors"
    state = safetensors.load_file(path)
    del state[name]
    safetensors.save_file(state, path)
    with pytest.raises(ValueError, match=words):
        interop.load(tmp_path / "saved")
