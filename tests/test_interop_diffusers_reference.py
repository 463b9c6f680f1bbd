"""Whole pipelines of diffusers, each of its kind, made and saved by it: kdiff loads them and makes the same images."""

import json
from functools import partial

import numpy as np
import pytest
from keras import ops

from kdiff import lora
from kdiff.guidance import ClassifierFree, Successive
from kdiff.interop import diffusers as interop
from kdiff.interop import prompts
from tests import test_interop_prompts_reference as whole
from tests.test_encoders_tokenizers_reference import clip  # noqa: F401
from tests.test_interop_networks_reference import DDPM, SMALL, SMALL_DIT, one_thread, theirs  # noqa: F401
from tests.toys import mostly_once

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # diffusers mixes NumPy 2 and tensors
]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

TEXTS, X, TABLE = whole.TEXTS, whole.X, whole.TABLE
EULER = {name: TABLE[name] for name in ("beta_start", "beta_end", "beta_schedule")} | {"timestep_spacing": "trailing"}
STEPS = 3
NONE = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
PICTURES = np.random.default_rng(1).uniform(-1, 1, (2, 16, 16, 3)).astype("float32")
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 8, "patch_size": 4, "projection_dim": 16}
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "##s", "!"]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def first(array):
    return torch.tensor(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def last(tensor):
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


def vae():
    return whole.perturbed(diffusers.AutoencoderKL(**whole.VAE))


def text_parts(folder):
    return {"text_encoder": whole.text_encoder(eos_token_id=2), "tokenizer": whole.words(folder / "words", "!")}


def ddim(**options):
    return diffusers.DDIMScheduler(**{**TABLE, **options})


def lcm(folder):
    scheduler = diffusers.LCMScheduler(**{**TABLE, "clip_sample": False})
    unet, image = whole.unet(time_cond_proj_dim=8), {"image_encoder": None}
    return diffusers.LatentConsistencyModelPipeline(
        vae(), **text_parts(folder), unet=unet, scheduler=scheduler, **NONE, **image
    )


def turbo(folder):
    pipeline = whole.sd_1(folder)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler(**EULER)
    return pipeline


def xl_turbo(folder):
    pipeline = whole.xl(folder)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler(**EULER)
    return pipeline


def pix2pix(folder):
    unet = whole.unet(in_channels=8)
    return diffusers.StableDiffusionInstructPix2PixPipeline(
        vae(), **text_parts(folder), unet=unet, scheduler=ddim(), **NONE
    )


def upscale(folder):
    unet = whole.unet(in_channels=7, num_class_embeds=1000, only_cross_attention=(True, False))
    return diffusers.StableDiffusionUpscalePipeline(
        vae(),
        **text_parts(folder),
        unet=unet,
        low_res_scheduler=diffusers.DDPMScheduler(),
        scheduler=ddim(prediction_type="v_prediction"),
    )


def depth(folder):
    estimator = transformers.DPTForDepthEstimation(
        transformers.DPTConfig(
            **{"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8},
            **{"image_size": 16, "patch_size": 8, "backbone_out_indices": [0] * 4, "is_hybrid": False},
            **{"neck_hidden_sizes": [4] * 4, "fusion_hidden_size": 4},
        )
    )
    return diffusers.StableDiffusionDepth2ImgPipeline(
        vae(),
        **text_parts(folder),
        unet=whole.unet(in_channels=5),
        scheduler=ddim(),
        depth_estimator=estimator,
        feature_extractor=transformers.DPTImageProcessor(),
    )


def variations(folder):
    encoder = whole.perturbed(transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION)))
    return diffusers.StableDiffusionImageVariationPipeline(
        vae(),
        encoder,
        whole.unet(sample_size=64),
        ddim(),
        safety_checker=None,
        feature_extractor=transformers.CLIPImageProcessor(size=8, crop_size=8),
        requires_safety_checker=False,
    )


def ldm_text(folder):
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    (folder / "pieces").mkdir()
    (folder / "pieces" / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    tokenizer = transformers.BertTokenizer.from_pretrained(folder / "pieces", model_max_length=512)
    sizes = {"encoder_layers": 2, "encoder_ffn_dim": 24, "encoder_attention_heads": 2, "head_dim": 4, "d_model": 16}
    bert = whole.perturbed(LDMBertModel(LDMBertConfig(vocab_size=len(PIECES), **sizes)))
    return diffusers.LDMTextToImagePipeline(vae(), bert, tokenizer, whole.unet(), ddim())


def ldm(folder):
    config = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    unet = diffusers.UNet2DModel(**config, **unet, in_channels=4, out_channels=4, attention_head_dim=4)
    codes = diffusers.VQModel(**whole.VAE, num_vq_embeddings=32, vq_embed_dim=4)
    from diffusers.pipelines.deprecated.latent_diffusion_uncond import LDMPipeline

    return LDMPipeline(whole.perturbed(codes), whole.perturbed(unet), ddim())


def dit(folder):
    transformer = diffusers.DiTTransformer2DModel(**{**SMALL_DIT, "num_embeds_ada_norm": 1000})
    return diffusers.DiTPipeline(whole.perturbed(transformer), vae(), ddim(), id2label={0: "cat", 1: "dog"})


def refiner(folder):
    return whole.refiner(folder)


def img2img(folder):
    parts = {**whole.sd_2(folder).components, "image_encoder": None}
    return diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)


MAKERS = [lcm, turbo, xl_turbo, pix2pix, upscale, depth, variations, ldm_text, ldm, dit, refiner, img2img]
PIPELINES = {maker.__name__: maker for maker in MAKERS}


@pytest.fixture(scope="module", params=mostly_once(PIPELINES, ("pix2pix",)))
def pair(request, tmp_path_factory):
    """(name, the pipeline, the folder that it has written, the model of that)."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = PIPELINES[request.param](folder)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(folder / "saved")
    return request.param, theirs, folder / "saved", interop.load(folder / "saved")


def draws(monkeypatch, theirs, *noises):
    """What the pipeline and its scheduler draw, one after the other."""
    given = iter(noises)
    for kind in (type(theirs), type(theirs.scheduler)):
        module = __import__(kind.__module__, fromlist=["x"])
        monkeypatch.setattr(module, "randn_tensor", lambda *shape, **options: first(next(given)), raising=False)


def of_lcm(theirs, model, monkeypatch):
    noises = [normal(2, 8, 8, 4, seed=i) for i in range(STEPS)]
    draws(monkeypatch, theirs, *noises)
    wanted = theirs(TEXTS, latents=first(X), guidance_scale=4.0, num_inference_steps=STEPS, output_type="np").images
    steps = iter(noises)
    return wanted, partial(
        model.sample, 2, text=TEXTS, timestep_cond=4.0, x=X, steps=STEPS, noise=lambda *a: next(steps)
    )


def of_turbo(theirs, model, monkeypatch):
    options = {"guidance_scale": 0.0, "num_inference_steps": 1, "height": 16, "width": 16}
    wanted = theirs(TEXTS, latents=first(X), output_type="np", **options).images
    return wanted, partial(model.sample, 2, text=TEXTS, noise=X, steps=1)


def of_pix2pix(theirs, model, monkeypatch):
    source = last(theirs.vae.encode(first(PICTURES)).latent_dist.mode())
    options = {"guidance_scale": 6.0, "image_guidance_scale": 1.7, "num_inference_steps": STEPS}
    wanted = theirs(
        TEXTS, image=source_of(PICTURES), latents=first(X), negative_prompt=whole.NEGATIVE, output_type="np", **options
    ).images
    guidance = Successive({"text": 6.0, "source": 1.7}, negative={"text": whole.NEGATIVE})
    return wanted, partial(model.sample, 2, text=TEXTS, source=source, guidance=guidance, x=X, steps=STEPS)


def source_of(pictures):
    return first(0.5 * pictures + 0.5)


def of_upscale(theirs, model, monkeypatch):
    low, noise = PICTURES[:, ::2, ::2], normal(2, 8, 8, 3, seed=7)
    draws(monkeypatch, theirs, noise)
    options = {"guidance_scale": 6.0, "noise_level": 20, "num_inference_steps": STEPS}
    wanted = theirs(TEXTS, image=source_of(low), latents=first(X), output_type="np", **options).images
    noisy = last(theirs.low_res_scheduler.add_noise(first(low), first(noise), torch.tensor([20])))
    options = {"guidance": 6.0, "x": X, "steps": STEPS}
    return wanted, partial(model.sample, 2, text=TEXTS, low=noisy, label=20, **options)


def of_depth(theirs, model, monkeypatch):
    """From an image, to which noise is added."""
    near = normal(2, 16, 16, seed=3)
    draws(monkeypatch, theirs, X)
    options = {"guidance_scale": 6.0, "num_inference_steps": 4, "strength": 0.5, "output_type": "np"}
    without_draws(monkeypatch)
    wanted = theirs(TEXTS, image=source_of(PICTURES), depth_map=torch.tensor(near), **options).images
    small = torch.nn.functional.interpolate(torch.tensor(near)[:, None], (8, 8), mode="bicubic")
    low, high = small.amin((1, 2, 3), True), small.amax((1, 2, 3), True)
    small = last(2 * (small - low) / (high - low) - 1)
    begin = {"image": PICTURES, "noise": X, "strength": strength_of(model, 4, 0.5)}
    return wanted, partial(model.sample, 2, text=TEXTS, depth=small, guidance=6.0, steps=4, **begin)


def without_draws(monkeypatch):
    """kdiff begins from the mean of an image's latents, diffusers from one that is drawn."""
    kind = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
    monkeypatch.setattr(kind, "sample", lambda posterior, generator=None: posterior.mode())


def strength_of(model, steps, strength):
    """The time of the first of the last `int(steps strength)` steps, which are those that diffusers makes."""
    return float(model.sampler.replaced(steps=steps).times(model.schedule)[steps - int(steps * strength)])


def of_img2img(theirs, model, monkeypatch, negative=None):
    draws(monkeypatch, theirs, X)
    without_draws(monkeypatch)
    options = {"guidance_scale": 6.0, "num_inference_steps": 4, "strength": 0.5, "output_type": "np"}
    negative = negative or {"text": whole.NEGATIVE}
    wanted = theirs(TEXTS, image=source_of(PICTURES), negative_prompt=negative["text"], **options).images
    begin = {"image": PICTURES, "noise": X, "strength": strength_of(model, 4, 0.5)}
    guidance = ClassifierFree(6.0, negative=negative)
    return wanted, partial(model.sample, 2, text=TEXTS, guidance=guidance, steps=4, **begin)


def of_refiner(theirs, model, monkeypatch):
    """The score of the negative text is lower, and is to be said."""
    ids = np.array([16.0, 16.0, 0.0, 0.0, 2.5])
    return of_img2img(theirs, model, monkeypatch, {"text": whole.NEGATIVE, "time_ids": ids})


def of_variations(theirs, model, monkeypatch):
    pictures = np.random.default_rng(2).integers(0, 256, (2, 8, 8, 3)).astype("uint8")
    from PIL import Image

    options = {"guidance_scale": 6.0, "num_inference_steps": STEPS, "height": 16, "width": 16, "output_type": "np"}
    wanted = theirs([Image.fromarray(one) for one in pictures], latents=first(X), **options).images
    return wanted, partial(model.sample, 2, picture=pictures, guidance=6.0, x=X, steps=STEPS)


def of_ldm_text(theirs, model, monkeypatch):
    x = normal(2, 4, 4, 4)
    options = {"guidance_scale": 6.0, "num_inference_steps": STEPS, "height": 32, "width": 32}
    wanted = theirs(["a red cats!", "cat"], latents=first(x), output_type="np", **options).images
    return wanted, partial(model.sample, 2, text=["a red cats!", "cat"], guidance=6.0, x=x, steps=STEPS)


def of_ldm(theirs, model, monkeypatch):
    draws(monkeypatch, theirs, X)
    wanted = theirs(batch_size=2, num_inference_steps=STEPS, output_type="np").images
    return wanted, partial(model.sample, 2, x=X, steps=STEPS)


def of_dit(theirs, model, monkeypatch):
    draws(monkeypatch, theirs, X)
    wanted = theirs([1, 7], guidance_scale=4.0, num_inference_steps=STEPS, output_type="np").images
    return wanted, partial(model.sample, 2, label=[1, 7], guidance=4.0, x=X, steps=STEPS)


RUNS = {**{name: globals()[f"of_{name}"] for name in PIPELINES if name != "xl_turbo"}, "xl_turbo": of_turbo}


def test_images(pair, monkeypatch):
    """By the whole pipeline from the same noise, guidance, decoder and all."""
    name, theirs, _, model = pair
    wanted, sample = RUNS[name](theirs, model, monkeypatch)
    assert wanted.std() > 0.02
    check(sample(), wanted)


def check(found, wanted):
    assert np.abs((found + 1.0) / 2.0 - wanted).max() < 1e-4


ABSENT = {"upscale": ("low_res_scheduler",), "depth": ("depth_estimator", "feature_extractor")}


@pytest.mark.once
def test_saved_again(pair, tmp_path, monkeypatch):
    """diffusers makes the same images of what kdiff writes, and kdiff calls the conditions what they were called."""
    name, theirs, _, model = pair
    interop.save(model, tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == type(theirs).__name__.replace("DiffusionImg2Img", "Diffusion")
    parts = {part: getattr(theirs, part) for part in ABSENT.get(name, ())}
    again = type(theirs).from_pretrained(tmp_path, **parts)
    again.set_progress_bar_config(disable=True)
    runs = []
    for one in (theirs, again):
        with monkeypatch.context() as patch:
            runs.append(RUNS[name](one, model, patch)[0])
    np.testing.assert_allclose(*runs, atol=1e-5)
    assert interop.load(tmp_path).shapes == model.shapes


@pytest.mark.once
@pytest.mark.parametrize("pair", ["xl_turbo", "pix2pix"], indirect=True)
def test_other_sizes(pair, monkeypatch):
    """Than those of the folder: the numbers that XL has of them follow, and what stands for no picture is as large."""
    name, pipeline, _, model = pair
    x, size = normal(2, 12, 16, 4), {"height": 24, "width": 32}
    options = {"num_inference_steps": 2, "guidance_scale": 5.0, "latents": first(x), "output_type": "np"}
    if name == "xl_turbo":
        wanted = pipeline(TEXTS, **size, **options).images
        found = model.sample(2, text=TEXTS, guidance=5.0, noise=x, steps=2, **size)
    else:
        pictures = np.random.default_rng(1).uniform(-1, 1, (2, 24, 32, 3)).astype("float32")
        source = last(pipeline.vae.encode(first(pictures)).latent_dist.mode())
        wanted = pipeline(TEXTS, image=source_of(pictures), **options).images
        guidance = Successive({"text": 5.0, "source": 1.5})
        found = model.sample(2, text=TEXTS, source=source, guidance=guidance, x=x, steps=2)
    check(found, wanted)
    assert model.sample(
        1, text="a cat", steps=1, **size, **({"source": source[:1]} if name == "pix2pix" else {})
    ).shape == (
        1,
        24,
        32,
        3,
    )


@pytest.mark.once
def test_the_real_vocabulary(clip, tmp_path):  # noqa: F811
    """CLIP's 49,408 tokens, texts of 77, a caption in each of which there is something to take apart."""
    config = {"model_max_length": 77, "pad_token": "<|endoftext|>", "tokenizer_class": "CLIPTokenizer"}
    (clip / "tokenizer_config.json").write_text(json.dumps(config))
    real = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407}
    pipeline = diffusers.StableDiffusionPipeline(
        vae(),
        whole.text_encoder(**real),
        transformers.CLIPTokenizer.from_pretrained(clip),
        whole.unet(),
        ddim(),
        **NONE,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    model = interop.load(tmp_path)
    texts = ["A photo of two astronauts, riding horses: 4k!", "Ünïcödé 🙂 it's " + "very " * 90 + "long"]
    (tokens, _), (none, _) = whole.embeddings(pipeline, texts)
    prompt = prompts.prompt_of(model.network)
    with pytest.warns(UserWarning, match="tokens"):
        whole.check(prompt.prepare(texts), tokens, 2e-6)
    whole.check(np.stack([prompt.null] * 2), none, 2e-6)
    options = {"num_inference_steps": STEPS, "guidance_scale": 7.5, "height": 16, "width": 16}
    wanted = pipeline(texts, latents=first(X), output_type="np", **options).images
    check(model.sample(2, text=prompt.prepare(texts), guidance=7.5, x=X, steps=STEPS), wanted)


@pytest.mark.once
@pytest.mark.parametrize("averages", [True, False])
def test_averages_and_lora_are_exported(averages, tmp_path):
    """The averages, or what was trained, each with LoRA's changes, which the model itself keeps apart."""
    unet = whole.perturbed(diffusers.UNet2DModel(**SMALL, **DDPM))
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "theirs")
    model = interop.load(tmp_path / "theirs", ema=0.5)
    lora.enable(model, rank=2, where="(query|resid.*conv.*)$|conv_in")
    changed = lora.enabled(model)
    for seed in (0, 1):  # the averages lie between the two
        for i, layer in enumerate(changed):
            for j, one in enumerate((layer.lora_kernel_a, layer.lora_kernel_b)):
                one.assign(0.3 * normal(*one.shape, seed=100 * seed + 2 * i + j))
        model.update_ema()
    interop.save(model, tmp_path / "again", averages)
    again = type(unet).from_pretrained(tmp_path / "again" / "unet").eval()
    x, t = normal(2, 8, 8, 3), np.array([3.0, 977.0], "float32")
    plain = theirs(unet, x, t)
    assert lora.enabled(model) == changed
    lora.merge(model, averages)
    wanted = ops.convert_to_numpy(model.network({"image": x, "time": t}))
    np.testing.assert_allclose(theirs(again, x, t), wanted, atol=2e-5)
    assert np.abs(wanted - plain).max() > 0.01
