"""Pipelines of Stable Diffusion, made and saved by diffusers with all their parts: strings in, the same images out."""

import json
import os

import numpy as np
import pytest
from keras import ops

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from kdiff import backend
from kdiff.guidance import ClassifierFree
from kdiff.interop import diffusers as interop
from kdiff.interop import prompts
from tests.toys import mostly_once

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # diffusers mixes NumPy 2 and tensors
]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["!", *LETTERS, *(f"{letter}</w>" for letter in f"!{LETTERS}"), "<|startoftext|>", "<|endoftext|>"]
LENGTH = 16
TEXT = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": LENGTH,
    "bos_token_id": len(WORDS) - 2,
    "projection_dim": 12,
}
END = len(WORDS) - 1
UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2,
}
XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "use_linear_projection": True}
VAE = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
}
TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
TABLE |= {"clip_sample": False, "set_alpha_to_one": False}
TEXTS, NEGATIVE = ["a red cat", "A disc! of it"], ["dull", ""]
X = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype("float32")
SIZES = {"original_size": (16, 16), "target_size": (16, 16), "height": 16, "width": 16}
TIME_IDS = np.array([16.0, 16.0, 0.0, 0.0, 16.0, 16.0])


def perturbed(model):
    """Ones and zeros would hide what comes before them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def words(folder, padding):
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(WORDS)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {"model_max_length": LENGTH, "pad_token": padding, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return transformers.CLIPTokenizer.from_pretrained(folder)


def text_encoder(kind="CLIPTextModel", **options):
    config = transformers.CLIPTextConfig(**{**TEXT, "eos_token_id": END, **options})
    return perturbed(getattr(transformers, kind)(config))


def unet(**options):
    return perturbed(diffusers.UNet2DConditionModel(**{**UNET, "cross_attention_dim": 16, **options}))


def plain(folder, padding, unet, scheduler, **text):
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return diffusers.StableDiffusionPipeline(
        vae=perturbed(diffusers.AutoencoderKL(**VAE)),
        text_encoder=text_encoder(**text),
        tokenizer=words(folder / "words", padding),
        unet=unet,
        scheduler=scheduler,
        **parts,
    )


def sd_1(folder):
    return plain(folder, "<|endoftext|>", unet(), diffusers.DDIMScheduler(**TABLE), eos_token_id=2)


def sd_2(folder):
    scheduler = diffusers.DDIMScheduler(**TABLE, prediction_type="v_prediction")
    return plain(folder, "!", unet(use_linear_projection=True), scheduler, hidden_act="gelu")


def xl(folder, zeros=True):
    return diffusers.StableDiffusionXLPipeline(
        vae=perturbed(diffusers.AutoencoderKL(**VAE, force_upcast=False)),
        text_encoder=text_encoder(eos_token_id=2),
        text_encoder_2=text_encoder("CLIPTextModelWithProjection", hidden_act="gelu"),
        tokenizer=words(folder / "words", "<|endoftext|>"),
        tokenizer_2=words(folder / "words_2", "!"),
        unet=unet(**XL, cross_attention_dim=32, projection_class_embeddings_input_dim=6 * 8 + 12),
        scheduler=diffusers.DDIMScheduler(**TABLE),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )


def refiner(folder):
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=perturbed(diffusers.AutoencoderKL(**VAE)),
        text_encoder=None,
        text_encoder_2=text_encoder("CLIPTextModelWithProjection", hidden_act="gelu", projection_dim=16),
        tokenizer=None,
        tokenizer_2=words(folder / "words", "!"),
        unet=unet(**XL, projection_class_embeddings_input_dim=5 * 8 + 16),
        scheduler=diffusers.DDIMScheduler(**TABLE),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


PIPELINES = {"sd_1": sd_1, "sd_2": sd_2, "xl": xl, "refiner": refiner}


@pytest.fixture(scope="module", params=mostly_once(PIPELINES, ("xl",)))
def pair(request, tmp_path_factory):
    """(name, the pipeline, the folder that it has written, the model of that)."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = PIPELINES[request.param](folder)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(folder / "saved")
    return request.param, theirs, folder / "saved", interop.load(folder / "saved")


def embeddings(pipeline, text, **options):
    """(tokens, vector) of diffusers, for a text and, under guidance, for no text."""
    options |= {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    given = pipeline.encode_prompt(text, **options)
    pairs = [(given[0], given[2]), (given[1], given[3])] if len(given) == 4 else [(one, None) for one in given]
    return [[None if y is None else y.detach().numpy() for y in one] for one in pairs]


def check(found, wanted, tolerance):
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= tolerance * max(1.0, np.abs(wanted).max())


def test_embeddings(pair):
    """Of texts, and of none: the empty text, or zeros."""
    name, theirs, _, model = pair
    prompt = prompts.prompt_of(model.network)
    (tokens, vector), (no_tokens, no_vector) = embeddings(theirs, TEXTS)
    assert prompt.zeros == (name == "xl")
    for rows, wanted, wanted_vector in (
        (prompt.prepare(TEXTS), tokens, vector),
        (np.stack([prompt.null] * 2), no_tokens, no_vector),
    ):
        check(rows[:, :LENGTH], wanted, 2e-6)
        if wanted_vector is not None:
            check(rows[:, LENGTH, : prompt.vector], wanted_vector, 2e-6)


@pytest.mark.once
def test_clip_skip(pair):
    """diffusers' pipeline of Stable Diffusion 1 and 2 fails at it with transformers 5: there the encoder does it."""
    name, theirs, folder, model = pair
    prompt = prompts.load(folder, json.loads((folder / "model_index.json").read_text()), skip=1)
    if name.startswith("sd"):
        ids = torch.tensor(prompts.prompt_of(model.network).tokenizers[0](TEXTS))
        states = theirs.text_encoder(ids, output_hidden_states=True).hidden_states
        tokens = theirs.text_encoder.final_layer_norm(states[-2]).detach().numpy()
    else:
        (tokens, _), _ = embeddings(theirs, TEXTS, clip_skip=1)
    check(prompt.prepare(TEXTS)[:, :LENGTH], tokens, 2e-6)


@pytest.mark.once
@pytest.mark.parametrize("negative", [NEGATIVE, None])
def test_images(pair, negative):
    """By the whole pipeline, decoder and all."""
    name, theirs, _, model = pair
    if name == "refiner":
        pytest.skip("it begins from an image")
    own = SIZES if name == "xl" else {"height": 16, "width": 16}
    options = {"negative_prompt": negative, "num_inference_steps": 4, "guidance_scale": 6.0, **own}
    latents = torch.tensor(X.transpose(0, 3, 1, 2))
    wanted = theirs(TEXTS, latents=latents, output_type="np", **options).images
    guidance = ClassifierFree(6.0, negative=None if negative is None else {"text": negative})
    ids = {"time_ids": TIME_IDS} if name == "xl" else {}
    found = model.sample(2, text=TEXTS, guidance=guidance, steps=4, x=X, **ids)
    assert wanted.std() > 0.05
    assert np.abs((found + 1.0) / 2.0 - wanted).max() < 1e-4


@pytest.mark.once
def test_saved_again(pair, tmp_path):
    """transformers reads encoders and tokenizers that kdiff has written, and the network has its conditions again."""
    name, theirs, folder, model = pair
    interop.save(model, tmp_path)
    prompt = prompts.prompt_of(model.network)
    for part, tokenizer in prompts.PARTS:
        encoder, words = getattr(theirs, part, None), getattr(theirs, tokenizer, None)
        if encoder is None:
            assert not (tmp_path / part).exists()
            continue
        read = transformers.CLIPTokenizer.from_pretrained(tmp_path / tokenizer)
        assert read.pad_token == words.pad_token
        options = {"padding": "max_length", "max_length": LENGTH, "truncation": True, "return_tensors": "pt"}
        ids = words(TEXTS, **options).input_ids
        assert torch.equal(read(TEXTS, **options).input_ids, ids)
        again = type(encoder).from_pretrained(tmp_path / part).eval()
        assert torch.equal(again(ids)[0], encoder(ids)[0])
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    for (key, one), (_, other) in zip(unet.state_dict().items(), theirs.unet.state_dict().items(), strict=True):
        assert torch.equal(one.reshape(other.shape), other), key  # a dense layer, or a convolution of size 1
    again = type(theirs).from_pretrained(tmp_path)  # of which whole pipelines make the same images
    again.set_progress_bar_config(disable=True)
    own = {"image": torch.zeros(2, 3, 16, 16)} if name == "refiner" else {"height": 16, "width": 16}
    one, other = (
        pipe(TEXTS, num_inference_steps=4, output_type="np", generator=torch.manual_seed(0), **own).images
        for pipe in (theirs, again)
    )
    np.testing.assert_allclose(one, other, atol=1e-5)
    index = json.loads((folder / "model_index.json").read_text())
    assert prompts.save(prompt, tmp_path) == {
        part: index[part] for pair in prompts.PARTS for part in pair if index.get(part, [None])[0] is not None
    }


@pytest.mark.once
def test_without_text(pair):
    """The network takes what the encoders give, as before."""
    name, _, folder, model = pair
    network = interop.load(folder, text=False).network
    names = {"context"} if name.startswith("sd") else {"context", "text_embeds", "time_ids"}
    assert set(network.condition_inputs) == names
    prompt = prompts.prompt_of(model.network)
    rows = prompt.prepare(TEXTS)
    numbers = 5 if name == "refiner" else 6
    inputs = {"image": X, "time": np.array([7.0, 300.0], "float32")}
    ids = {} if name.startswith("sd") else {"time_ids": np.ones((2, numbers), "float32")}
    given = {"context": rows[:, :LENGTH], "text_embeds": rows[:, -1, : prompt.vector]}
    given = {key: value for key, value in given.items() if key in names}
    one, other = (
        ops.convert_to_numpy(backend.compiled(lambda x, n=n: n(x), n)({**inputs, **ids, **more}))
        for n, more in ((network, given), (model.network, {"text": rows}))
    )
    np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.once
def test_a_text_of_another_width_is_refused(tmp_path):
    theirs = plain(tmp_path, "!", unet(cross_attention_dim=12), diffusers.DDIMScheduler(**TABLE))
    theirs.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"must take the width of the text, 16, as 'context'; it takes: .*12"):
        interop.load(tmp_path / "saved")
