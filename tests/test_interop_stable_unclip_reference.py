"""Stable unCLIP, made and saved by diffusers: of pictures, and of texts by the prior, the same images."""

import importlib
import shutil

import keras
import numpy as np
import pytest
from PIL import Image
from safetensors import numpy as safetensors

from kdiff import UnCLIP
from kdiff.encoders import Pair
from kdiff.guidance import ClassifierFree
from kdiff.interop import diffusers as interop
from kdiff.interop.files import read_json, write_json
from tests.test_interop_prompts_reference import LENGTH, NEGATIVE, TABLE, TEXTS, VAE, X, perturbed, text_encoder, words
from tests.test_interop_prompts_reference import unet as plain_unet
from tests.test_interop_unclip_reference import PICTURES, PRIOR, draws, first, options_of, vision
from tests.test_interop_unclip_reference import STEPS as STEPS_OF
from tests.test_interop_unclip_reference import perturbed as perturbed_prior
from tests.toys import mostly_once

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
WIDTH, STEPS, LEVEL = 16, 4, 200
# The pipeline does not tell Karlo's own scheduler which step is next, and is used with this one.
OF_PRIOR = {"beta_schedule": "squaredcos_cap_v2", "variance_type": "fixed_small_log", "clip_sample_range": 5.0}
OF_PRIOR |= {"prediction_type": "sample"}
SIZES = {"height": 16, "width": 16, "num_inference_steps": STEPS, "output_type": "np"}


def shared(folder):
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    label = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * WIDTH}
    return {
        "image_normalizer": perturbed(StableUnCLIPImageNormalizer(embedding_dim=WIDTH)),
        "image_noising_scheduler": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        "tokenizer": words(folder / "words", "!"),
        "text_encoder": text_encoder(hidden_act="gelu"),
        "unet": plain_unet(**label),
        "scheduler": diffusers.DDIMScheduler(**TABLE, prediction_type="v_prediction"),
        "vae": perturbed(diffusers.AutoencoderKL(**VAE)),
    }


def of_pictures(folder):
    encoder, processor = vision()
    return diffusers.StableUnCLIPImg2ImgPipeline(**shared(folder), image_encoder=encoder, feature_extractor=processor)


def of_texts(folder):
    prior = diffusers.PriorTransformer(**PRIOR, embedding_dim=WIDTH, num_embeddings=LENGTH)
    return diffusers.StableUnCLIPPipeline(
        **shared(folder),
        prior=perturbed_prior(prior, 1),
        prior_text_encoder=text_encoder("CLIPTextModelWithProjection", projection_dim=WIDTH),
        prior_tokenizer=words(folder / "prior_words", "<|endoftext|>"),
        prior_scheduler=diffusers.DDPMScheduler(**OF_PRIOR),
    )


@pytest.fixture(scope="module", params=mostly_once({"pictures": of_pictures, "texts": of_texts}, ("pictures",)))
def pair(request, tmp_path_factory):
    """(the pipeline, its folder, our model)."""
    folder = tmp_path_factory.mktemp("stable_unclip")
    pipeline = {"pictures": of_pictures, "texts": of_texts}[request.param](folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "saved")
    return pipeline, folder / "saved", interop.load(folder / "saved")


def test_images(pair, monkeypatch):
    theirs, _, ours = pair
    noise = np.random.default_rng(6).standard_normal((2, WIDTH)).astype("float32")
    noised = theirs.noise_image_embeddings
    monkeypatch.setattr(
        theirs, "noise_image_embeddings", lambda *a, **o: noised(*a, **{**o, "noise": torch.tensor(noise)})
    )
    options = {"negative_prompt": NEGATIVE, "guidance_scale": 6.0, "noise_level": LEVEL, "latents": first(X), **SIZES}
    run = {"x": X, "steps": STEPS, "guidance": ClassifierFree(6.0, {"text": NEGATIVE})}
    level = (LEVEL + 1) / 1000
    if isinstance(ours, UnCLIP):
        given = iter(noise for noise in draws("prior")[1:-1])
        module = importlib.import_module("diffusers.schedulers.scheduling_ddpm")
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: first(next(given)))
        of_prior = {"prior_num_inference_steps": STEPS_OF["prior"], "prior_latents": first(draws("prior")[0])}
        wanted = theirs(TEXTS, **of_prior, **options).images
        z = ours.embeddings(2, options=options_of("prior", guidance=4.0), text=TEXTS)
        beside = {"embedding_level": level, "embedding_noise": noise}
        found = ours.decoder.sample(2, text=TEXTS, embedding=z, **beside, **run)
    else:
        wanted = theirs([Image.fromarray(picture) for picture in PICTURES], TEXTS, **options).images
        beside = {"picture_level": level, "picture_noise": noise}
        found = ours.sample(2, text=TEXTS, picture=PICTURES, **beside, **run)
    assert wanted.std() > 0.05
    np.testing.assert_allclose((found + 1.0) / 2.0, wanted, atol=TOLERANCE)


@pytest.mark.once
def test_the_whole(pair, tmp_path):
    """Text alone for one, pictures alone for the other, and again after saving; the level and the picture count."""
    _, _, ours = pair
    ours.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    if isinstance(ours, UnCLIP):
        options = {"text": TEXTS, "prior": {"steps": 2, "guidance": 4.0}, "decoder": {"steps": 2, "guidance": 6.0}}
    else:
        options = {"text": "", "picture": PICTURES, "steps": 2, "guidance": 6.0}
        images = ours.sample(2, **options)
        for other in ({"picture": PICTURES[::-1]}, {"picture_level": 0.9}):
            assert np.abs(ours.sample(2, **{**options, **other}) - images).max() > 1e-3
    np.testing.assert_allclose(again.sample(2, **options), ours.sample(2, **options), atol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize("pair", ["texts"], indirect=True)
def test_without_text(pair):
    """The network takes what there is in diffusers."""
    _, folder, _ = pair
    assert set(interop.load(folder, text=False).network.condition_inputs) == {"context", "label"}


@pytest.mark.once
def test_saved_again(pair, tmp_path):
    """diffusers loads what kdiff writes as the same pipeline, with the same weights, and so does kdiff."""
    theirs, _, ours = pair
    interop.save(ours, tmp_path / "again")
    again = type(theirs).from_pretrained(tmp_path / "again")
    check_parts(theirs, again)
    both = [ours, interop.load(tmp_path / "again")]
    if isinstance(ours, UnCLIP):
        options = {"text": TEXTS, "prior": {"steps": 2, "guidance": 4.0}, "decoder": {"steps": 2}}
    else:
        options = {"text": TEXTS, "picture": PICTURES, "picture_level": 0.3, "steps": 2, "guidance": 4.0}
    np.testing.assert_allclose(both[1].sample(2, **options), both[0].sample(2, **options), atol=1e-5)


def check_parts(theirs, again):
    """Two pipelines have the same weights, and schedulers with the same tables and kinds."""
    assert again.components.keys() == theirs.components.keys()
    for name, part in theirs.components.items():
        other = again.components[name]
        if isinstance(part, torch.nn.Module):
            wanted, found = part.state_dict(), other.state_dict()
            assert found.keys() == wanted.keys(), name
            for key, value in wanted.items():
                dense = value.flatten(2)[..., 0] if value.ndim == 4 and found[key].ndim == 2 else value  # 1 x 1 kernels
                np.testing.assert_allclose(found[key], dense, atol=1e-6, err_msg=f"{name}.{key}")
        elif hasattr(part, "betas"):
            assert type(other) is type(part)
            np.testing.assert_allclose(other.alphas_cumprod, part.alphas_cumprod, rtol=1e-5)
            of_steps = ("prediction_type", "variance_type", "clip_sample", "clip_sample_range", "set_alpha_to_one")
            for key in of_steps if name != "image_noising_scheduler" else ():
                values = [str(one.config.get(key)).removesuffix("_log") for one in (other, part)]  # one variance
                assert values[0] == values[1], (name, key)
        elif name.endswith("tokenizer"):
            assert other(TEXTS).input_ids == part(TEXTS).input_ids


@pytest.mark.once
@pytest.mark.parametrize("pair", ["texts"], indirect=True)
def test_what_it_does_not_save(pair, tmp_path):
    _, _, ours = pair
    text = ours.prior.network.conditions["text"].through(None)
    with pytest.raises(ValueError, match="for latents diffusers has a prior, no upsampler"):
        interop.save(UnCLIP(None, ours.decoder), tmp_path)
    with pytest.raises(ValueError, match="for latents diffusers has a prior, no upsampler"):
        interop.save(UnCLIP(ours.prior, ours.decoder, clip=Pair(None, text)), tmp_path)
    assert not list(tmp_path.iterdir())


def with_weights(folder, change):
    path = folder / "image_normalizer" / "diffusion_pytorch_model.safetensors"
    safetensors.save_file(change(safetensors.load_file(path)), path)


FAULTS = {
    "missing": (lambda state: {"mean": state["mean"]}, r"image_normalizer: .*missing: \['std'\]"),
    "extra": (lambda state: {**state, "odd": state["mean"]}, r"image_normalizer: .*'mean' and 'std'; found: \['odd'\]"),
    "shape": (lambda state: {**state, "std": np.ones((1, 3), "float32")}, r"image_normalizer: .*`embedding_dim`, .*16"),
    "sign": (lambda state: {**state, "std": -state["std"]}, "image_normalizer: Standard: .*positive"),
}


@pytest.mark.once
@pytest.mark.parametrize("pair", ["pictures"], indirect=True)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_normalizer(pair, tmp_path, fault):
    _, folder, _ = pair
    shutil.copytree(folder, tmp_path / "saved")
    change, words = FAULTS[fault]
    with_weights(tmp_path / "saved", change)
    with pytest.raises(ValueError, match=words):
        interop.load(tmp_path / "saved")


@pytest.mark.once
@pytest.mark.parametrize("pair", ["pictures"], indirect=True)
@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("image_normalizer", {"embedding_dim": 0}, "config.json: `embedding_dim` must be a whole number"),
        (
            "unet",
            {"class_embed_type": "simple_projection"},
            "unet.config.json: .*`class_embed_type` 'projection' of 32",
        ),
        ("image_noising_scheduler", {"beta_schedule": "odd"}, "scheduler_config.json: `beta_schedule` must be one of"),
    ],
)
def test_faults_of_the_configurations(pair, tmp_path, file, change, words):
    _, folder, _ = pair
    shutil.copytree(folder, tmp_path / "saved")
    path = next((tmp_path / "saved" / file).glob("*config.json"))
    write_json(path, {**read_json(path), **change})
    with pytest.raises(ValueError, match=words):
        interop.load(tmp_path / "saved")
