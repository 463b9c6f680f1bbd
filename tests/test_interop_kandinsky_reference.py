"""Kandinsky 2.2, made and saved by diffusers: of texts and of pictures the same embeddings and images."""

import importlib
import math
import shutil

import keras
import numpy as np
import pytest
from PIL import Image
from safetensors import numpy as safetensors

from kdiff import backend
from kdiff.cascade import stage_seed
from kdiff.guidance import ClassifierFree
from kdiff.interop import diffusers as interop
from kdiff.interop.autoencoder_configs import KINDS
from kdiff.interop.configs import complete
from kdiff.interop.files import read_json, write_json
from kdiff.random import slerp
from tests.test_interop_prompts_reference import LENGTH, TEXTS, perturbed, text_encoder, words
from tests.test_interop_stable_unclip_reference import check_parts
from tests.test_interop_unclip_reference import PICTURES, PRIOR, draws, first, options_of, scheduler, vision
from tests.test_interop_unclip_reference import STEPS as STEPS_OF
from tests.test_interop_unclip_reference import perturbed as perturbed_prior

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TOLERANCE = 1e-4
WIDTH, STEPS = 16, 3
UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 8,
    "addition_embed_type": "image",
    "encoder_hid_dim_type": "image_proj",
    "encoder_hid_dim": WIDTH,
    "cross_attention_dim": 8,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "resnet_time_scale_shift": "scale_shift",
}
MOVQ = {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "norm_type": "spatial",
    "latent_channels": 4,
    "num_vq_embeddings": 12,
    "vq_embed_dim": 4,
}
LINEAR = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012}
X = np.random.default_rng(7).standard_normal((STEPS + 1, 2, 8, 8, 4)).astype("float32")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(the prior's pipeline, the decoder's, the folder with both folders and the two in one)."""
    folder = tmp_path_factory.mktemp("kandinsky")
    torch.manual_seed(0)
    encoder, processor = vision()
    parts = {
        "prior": perturbed_prior(diffusers.PriorTransformer(**PRIOR, embedding_dim=WIDTH, num_embeddings=LENGTH), 1),
        "image_encoder": encoder,
        "text_encoder": text_encoder("CLIPTextModelWithProjection", projection_dim=WIDTH),
        "tokenizer": words(folder / "words", "<|endoftext|>"),
        "scheduler": scheduler(prediction_type="sample", clip_sample_range=5.0),
        "image_processor": processor,
    }
    own = {
        "unet": perturbed(diffusers.UNet2DConditionModel(**UNET)),
        "scheduler": diffusers.DDPMScheduler(**LINEAR, variance_type="learned_range", clip_sample_range=2.0),
        "movq": perturbed(diffusers.VQModel(**MOVQ)),
    }
    prior = diffusers.KandinskyV22PriorPipeline(**parts)
    decoder = diffusers.KandinskyV22Pipeline(**own)
    both = diffusers.KandinskyV22CombinedPipeline(**own, **{f"prior_{name}": part for name, part in parts.items()})
    for name, pipeline in {"prior": prior, "decoder": decoder, "both": both}.items():
        pipeline.save_pretrained(folder / name)
        pipeline.set_progress_bar_config(disable=True)
    return prior, decoder, folder


@pytest.fixture(scope="module")
def unclip(folders):
    return interop.load(folders[2] / "decoder", prior=folders[2] / "prior")


def drawn(monkeypatch, module, noises):
    given = iter(noises)
    module = importlib.import_module(f"diffusers.schedulers.{module}")
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: first(next(given)))


def images_of(decoder, z, negative, monkeypatch):
    drawn(monkeypatch, "scheduling_ddpm", X[1:])
    options = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "np", "latents": first(X[0])}
    images = decoder(torch.tensor(z), torch.tensor(negative), height=16, width=16, **options).images
    return 2.0 * images - 1.0


RUN = {"x": X[0], "noise": lambda step, shape: X[1 + step], "steps": STEPS, "guidance": 4.0}


def embeddings_of(prior, monkeypatch):
    drawn(monkeypatch, "scheduling_unclip", draws("prior")[1:])
    options = {"num_inference_steps": STEPS_OF["prior"], "latents": first(draws("prior")[0]), "output_type": "np"}
    found = prior(TEXTS, guidance_scale=4.0, **options)
    return found.image_embeds, found.negative_image_embeds


def test_text_to_images(folders, unclip, monkeypatch):
    prior, decoder, _ = folders
    z, none = embeddings_of(prior, monkeypatch)
    options = {"prior": options_of("prior", guidance=4.0), "decoder": RUN}
    found = unclip.embeddings(2, options=options["prior"], text=TEXTS)
    np.testing.assert_allclose(found, z, atol=TOLERANCE * np.abs(z).max())
    images = images_of(decoder, z, none, monkeypatch)
    assert images.std() > 0.05
    np.testing.assert_allclose(unclip.sample(2, text=TEXTS, **options), images, atol=TOLERANCE)


@pytest.mark.once
def test_variations_and_interpolation(folders, unclip, monkeypatch):
    """Of pictures by their encoder; those between two have embeddings on the arc between theirs, and one noise."""
    prior, decoder, _ = folders
    pixels = prior.image_processor([Image.fromarray(one) for one in PICTURES], return_tensors="pt").pixel_values
    with torch.no_grad():
        z, none = prior.image_encoder(pixels).image_embeds.numpy(), prior.get_zero_embed(2).numpy()
    images = images_of(decoder, z, none, monkeypatch)
    np.testing.assert_allclose(unclip.variations(PICTURES, 1, decoder=RUN), images, atol=TOLERANCE)
    run = {**RUN, "x": X[0][[0] * 4], "noise": lambda step, shape: X[1 + step][[0] * 4]}
    found = unclip.interpolate(*PICTURES, 4, noise=False, decoder=run)
    monkeypatch.setattr(importlib.import_module(__name__), "X", X[:, [0, 0]])
    images = images_of(decoder, slerp(*z, np.array([1 / 3, 2 / 3])).astype("float32"), none, monkeypatch)
    np.testing.assert_allclose(found[1:3], images, atol=TOLERANCE)
    assert unclip.interpolate(*PICTURES, 2, decoder={"steps": 2}).shape == (2, 16, 16, 3)


@pytest.mark.once
def test_one_folder_and_each_alone(folders, unclip, tmp_path):
    """Both in one folder, the two alone, and the whole as kdiff saves it."""
    folder = folders[2]
    options = {"prior": {"steps": 2, "guidance": 4.0}, "decoder": {"steps": 2, "guidance": 4.0}}
    wanted = unclip.sample(2, text=TEXTS, **options)
    np.testing.assert_array_equal(interop.load(folder / "both").sample(2, text=TEXTS, **options), wanted)
    prior, decoder = interop.load(folder / "prior"), interop.load(folder / "decoder")
    z = prior.sample(2, text=TEXTS, **options["prior"])
    none = unclip.decoder.network.conditions["image_embeds"].null
    guidance = [ClassifierFree(4.0, {"image_embeds": none}), *decoder.sampler.guidance]
    run = {**options["decoder"], "guidance": guidance, "seed": stage_seed(0, 1)}
    # Two steps under a guidance of 4 magnify rounding, which depends on where the weights lie in memory: 8e-6 once.
    np.testing.assert_allclose(decoder.sample(2, image_embeds=z, **run), wanted, atol=2e-5)
    unclip.save(tmp_path / "kandinsky.keras")
    again = keras.saving.load_model(tmp_path / "kandinsky.keras")
    np.testing.assert_allclose(again.sample(2, text=TEXTS, **options), wanted, atol=1e-6)
    np.testing.assert_allclose(again.clip.embed_image(PICTURES), unclip.clip.embed_image(PICTURES), atol=1e-6)
    assert again.clip.text.encoders[0] is again.prior.network.conditions["text"].encoders[0]


@pytest.mark.once
def test_saved_again(folders, unclip, tmp_path):
    """diffusers loads what kdiff writes, both in one folder, and the decoder alone, and so does kdiff."""
    _, decoder, folder = folders
    options = {"prior": {"steps": 2, "guidance": 4.0}, "decoder": {"steps": 2, "guidance": 4.0}}
    interop.save(unclip, tmp_path / "both")
    again = diffusers.KandinskyV22CombinedPipeline.from_pretrained(tmp_path / "both")
    check_parts(diffusers.KandinskyV22CombinedPipeline.from_pretrained(folder / "both"), again)
    found = interop.load(tmp_path / "both").sample(2, text=TEXTS, **options)
    np.testing.assert_allclose(found, unclip.sample(2, text=TEXTS, **options), atol=2e-5)
    interop.save(interop.load(folder / "decoder"), tmp_path / "decoder")
    check_parts(decoder, diffusers.DiffusionPipeline.from_pretrained(tmp_path / "decoder"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unclip.decoder.network.conditions["image_embeds"], "absent", np.ones(WIDTH))
        with pytest.raises(ValueError, match="the embedding of zero pixels represents no image"):
            interop.save(unclip, tmp_path / "other")
        patch.setattr(unclip.decoder.network.conditions["image_embeds"], "absent", None)  # a learned one
        with pytest.raises(ValueError, match="an `OptionalCondition` with `absent`"):
            interop.save(unclip, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.once
def test_the_published_autoencoder():
    """Without memory for it."""
    kinds = ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3
    config = {**MOVQ, "block_out_channels": (128, 256, 256, 512), "layers_per_block": 2, "num_vq_embeddings": 16384}
    config |= {"down_block_types": (*kinds[0], "AttnDownEncoderBlock2D")}
    config |= {"up_block_types": ("AttnUpDecoderBlock2D", *kinds[1])}
    with torch.device("meta"):
        state = diffusers.VQModel(**config).state_dict()
    kind = KINDS["VQModel"]
    with backend.unallocated():
        network = kind.network(complete(config, kind.keys, "config.json"), "config.json")
        network.build()
    found = {slot.name: math.prod(slot.variable.shape) for slot in kind.slots(network)}
    assert found == {name: value.numel() for name, value in state.items()}


@pytest.mark.once
@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        (
            "decoder/movq/config.json",
            {"vq_embed_dim": 5},
            "movq.config.json: with `norm_type` 'spatial'.*received: 32, 5",
        ),
        ("decoder/unet/config.json", {"encoder_hid_dim": 5}, "unet.config.json: .*embeddings of width 16.*it takes"),
        (
            "prior/model_index.json",
            {"_class_name": "DDPMPipeline"},
            "`prior` must be the folder of one of .*received 'DDPM",
        ),
        ("prior/prior/config.json", {"num_layers": "2"}, "prior.config.json: `num_layers` must be a whole number"),
        ("prior/prior/diffusion_pytorch_model.safetensors", "clip_std", r"prior: .*missing: \['clip_std'\]"),
        (
            "decoder/movq/diffusion_pytorch_model.safetensors",
            "decoder.conv_norm_out.conv_y.weight",
            "movq: .*conv_y.weight",
        ),
    ],
)
def test_faults(folders, tmp_path, file, change, words):
    for one in ("prior", "decoder"):
        shutil.copytree(folders[2] / one, tmp_path / one)
    path = tmp_path / file
    if isinstance(change, dict):
        write_json(path, {**read_json(path), **change})
    else:
        state = safetensors.load_file(path)
        safetensors.save_file({name: array for name, array in state.items() if name != change}, path)
    with pytest.raises(ValueError, match=f"(?s){words}"):
        interop.load(tmp_path / "decoder", prior=tmp_path / "prior")


@pytest.mark.once
def test_a_prior_for_another_pipeline_is_refused(folders):
    folder = folders[2]
    for options in ({}, {"text": False}):
        with pytest.raises(
            ValueError, match=r"`prior` must be the folder of one of .* for 'KandinskyV22CombinedPipeline'"
        ):
            interop.load(folder / "both", prior=folder / "prior", **options)
