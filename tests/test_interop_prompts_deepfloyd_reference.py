"""DeepFloyd IF's stages, made and saved by diffusers with all their parts: strings in, the same images out."""

import importlib
import io
import json
import os

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from kdiff import Cascade, Sampler, schedules, times
from kdiff.blocks import Concat
from kdiff.guidance import ClassifierFree, DynamicThreshold
from kdiff.interop import diffusers as interop
from kdiff.interop import prompts
from kdiff.interop.files import read_json, write_json
from tests.test_interop_networks_reference import SMALL
from tests.test_interop_prompts_reference import perturbed
from tests.test_interop_unets_reference import IF, IF_2

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # diffusers mixes NumPy 2 and tensors
]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")

TEXTS = ["A small RED hat ", "two blue boxes"]
SCHEDULER = {"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range", "thresholding": True}
SCHEDULER |= {"dynamic_thresholding_ratio": 0.95, "prediction_type": "epsilon"}
STEPS = 4
CLASSES = {1: "IFPipeline", 2: "IFSuperResolutionPipeline"}
SIZES = {1: 4, 2: 8}
TOLERANCE = 1e-4


def words(folder):
    """A tokenizer of T5's form, as a folder of IF has it; its words are learned here."""
    model = io.BytesIO()
    ids = {"bos_id": -1, "pad_id": 0, "eos_id": 1, "unk_id": 2, "pad_piece": "<pad>", "minloglevel": 2}
    sentences = iter([text.lower() for text in TEXTS] * 4)
    options = {"vocab_size": 40, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, model_writer=model, **options, **ids)
    folder.mkdir()
    (folder / "spiece.model").write_bytes(model.getvalue())
    extra = [f"<extra_id_{i}>" for i in range(100)]
    config = {"model_max_length": 512, "extra_ids": 100, "additional_special_tokens": extra}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "T5Tokenizer"}))
    return transformers.T5Tokenizer.from_pretrained(folder)


def made(stage, folder):
    """diffusers' pipeline; the weights of the two encoders are the same."""
    tokenizer = words(folder / "words")
    size = {"d_model": 12, "d_kv": 4, "d_ff": 20, "num_layers": 2, "num_heads": 3}
    torch.manual_seed(0)
    encoder = transformers.T5EncoderModel(transformers.T5Config(vocab_size=len(tokenizer), **size))
    config = {**SMALL, **IF, "in_channels": 3} if stage == 1 else {**SMALL, **IF_2, "in_channels": 6}
    unet = diffusers.UNet2DConditionModel(**{**config, "out_channels": 6, "sample_size": SIZES[stage]})
    highest = 1.5 if stage == 1 else 1.0
    parts = {"safety_checker": None, "feature_extractor": None, "watermarker": None, "requires_safety_checker": False}
    if stage == 2:
        parts["image_noising_scheduler"] = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    scheduler = diffusers.DDPMScheduler(**SCHEDULER, sample_max_value=highest)
    theirs = getattr(diffusers, CLASSES[stage])(
        tokenizer=tokenizer, text_encoder=perturbed(encoder), unet=perturbed(unet), scheduler=scheduler, **parts
    )
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(folder / "saved")
    return theirs


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """By stage (the pipeline, its folder, our model)."""
    found = {}
    for stage in CLASSES:
        folder = tmp_path_factory.mktemp(f"stage_{stage}")
        found[stage] = (made(stage, folder), folder / "saved", interop.load(folder / "saved"))
    return found


def draws(stage, count=8):
    generator = np.random.default_rng(stage)
    return [generator.standard_normal((2, SIZES[stage], SIZES[stage], 3)).astype("float32") for _ in range(count)]


def images_of(pipeline, stage, monkeypatch, **options):
    """In [-1, 1], of these draws, one after the other: x to begin with, the noise of the picture, and of each step."""
    given = iter(draws(stage))
    for module in (type(pipeline).__module__, "diffusers.schedulers.scheduling_ddpm"):
        one = importlib.import_module(module)
        monkeypatch.setattr(one, "randn_tensor", lambda *a, **k: torch.tensor(next(given).transpose(0, 3, 1, 2)))
    options = {"prompt": TEXTS, "num_inference_steps": STEPS, "clean_caption": False, "output_type": "np", **options}
    return 2.0 * pipeline(**options).images - 1.0


LOW = np.random.default_rng(9).uniform(-1, 1, (2, 4, 4, 3)).astype("float32")


def own_options(stage, **options):
    """What gives the same with kdiff."""
    x, *rest = draws(stage)
    more = {}
    if stage == 2:
        noise, *rest = rest
        more = {"low": LOW, "low_noise": noise}
    return {"text": TEXTS, "x": x, "noise": lambda step, shape: rest[step], "steps": STEPS, **more, **options}


@pytest.mark.parametrize("stage", CLASSES)
def test_images(stages, stage, monkeypatch):
    """By the whole pipeline: text, the variance of the conditional half, thresholds; a step of the low picture."""
    theirs, _, model = stages[stage]
    low = {"image": torch.tensor(LOW.transpose(0, 3, 1, 2))} if stage == 2 else {}
    wanted = images_of(theirs, stage, monkeypatch, guidance_scale=5.0, **low)
    found = model.sample(2, **own_options(stage, guidance=5.0))
    assert wanted.std() > 0.05
    assert np.abs(found - wanted).max() < TOLERANCE
    if stage == 2:
        wanted = images_of(theirs, stage, monkeypatch, guidance_scale=5.0, noise_level=600, **low)
        found = model.sample(2, **own_options(stage, guidance=5.0), low_level=0.601)
        assert np.abs(found - wanted).max() < TOLERANCE


@pytest.mark.once
def test_a_list_of_steps(stages, monkeypatch):
    """Without guidance, and against another text."""
    theirs, _, model = stages[1]
    steps = [999, 600, 250, 0]
    wanted = images_of(theirs, 1, monkeypatch, timesteps=steps, num_inference_steps=None, negative_prompt=["dull", ""])
    sampler = model.sampler.replaced(grid=times.Times([*((i + 1) / 1000 for i in steps), 0.0]), steps=4)
    rule = [ClassifierFree(7.0, negative={"text": ["dull", ""]}), *model.sampler.guidance]
    found = model.sample(2, **own_options(1, sampler=sampler, guidance=rule))
    assert np.abs(found - wanted).max() < TOLERANCE


@pytest.mark.once
@pytest.mark.parametrize("name", times.DEEPFLOYD)
def test_the_named_lists_of_steps(name):
    lists = importlib.import_module("diffusers.pipelines.deepfloyd_if.timesteps")
    wanted = getattr(lists, f"{name}_timesteps")
    grid = times.Sections.deepfloyd(name)
    found = Sampler("ddpm", grid).times(schedules.CosineBeta(1000))
    np.testing.assert_allclose(found, [*((np.array(wanted) + 1) / 1000), 0.0], atol=1e-12)


@pytest.mark.once
def test_what_is_read(stages):
    for stage, highest in ((1, 1.5), (2, 1.0)):
        model = stages[stage][2]
        assert model.sampler.guidance == (DynamicThreshold(0.95, highest),)
        prompt = prompts.prompt_of(model.network)
        assert (prompt.length, prompt.masked, prompt.padded, prompt.lower) == (77, True, True, True)
    low = stages[2][2].network.conditions["low"]
    assert (low.interpolation, low.level, low.noise) == ("aligned", 0.251, schedules.CosineBeta(1000))
    assert "label" not in stages[2][2].network.conditions


@pytest.mark.once
def test_embeddings(stages):
    theirs, _, model = stages[1]
    given, none = theirs.encode_prompt(TEXTS, clean_caption=False, device="cpu")
    prompt = prompts.prompt_of(model.network)
    for rows, wanted in ((prompt.prepare(TEXTS), given), (np.stack([prompt.null] * 2), none)):
        wanted = wanted.detach().numpy()
        assert np.abs(rows[:, :77, :12] - wanted).max() < 3e-6 * max(1.0, np.abs(wanted).max())


@pytest.mark.once
def test_the_two_as_a_cascade(stages, tmp_path):
    cascade = Cascade([stages[1][2], stages[2][2]])
    small, large = cascade.sample_stages(1, text=TEXTS[0], steps=2, guidance=[7.0, 4.0])
    assert (small.shape, large.shape) == ((1, 4, 4, 3), (1, 8, 8, 3))
    assert np.isfinite(large).all()


@pytest.mark.once
@pytest.mark.parametrize("stage", CLASSES)
def test_saved_again(stages, stage, tmp_path, monkeypatch):
    """diffusers makes the same images of what kdiff has written."""
    theirs, folder, model = stages[stage]
    interop.save(model, tmp_path)
    # The tokenizer is a tokenizer.json, of T5's fast class.
    names = {"safety_checker", "feature_extractor", "watermarker", "tokenizer"}
    index, wanted = (read_json(one / "model_index.json") for one in (tmp_path, folder))
    assert {name: index[name] for name in wanted if name[0] != "_" and name not in names} == {
        name: value for name, value in wanted.items() if name[0] != "_" and name not in names
    }
    again = getattr(diffusers, CLASSES[stage]).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    low = {"image": torch.tensor(LOW.transpose(0, 3, 1, 2))} if stage == 2 else {}
    one, other = (images_of(pipeline, stage, monkeypatch, **low) for pipeline in (theirs, again))
    np.testing.assert_allclose(one, other, atol=1e-5)
    read = interop.load(tmp_path)
    options = own_options(stage, guidance=5.0)
    np.testing.assert_allclose(
        read.sample(2, **options), model.sample(2, **own_options(stage, guidance=5.0)), atol=1e-5
    )


@pytest.mark.once
def test_a_network_that_is_not_told_the_step(stages, tmp_path):
    _, folder, model = stages[2]
    low = model.network.conditions["low"]
    broken = model.network.clone(conditions={**model.network.conditions, "low": Concat(noise=low.noise)})
    broken.build({"time": (None,), "image": (None, 8, 8, 3), "low": (None, 8, 8, 3), "text": (None, 77, 13)})
    with pytest.raises(ValueError, match=r"diffusers does not support this network:\n  .*low"):
        interop.save(broken, tmp_path)
    for part in ("unet", "image_noising_scheduler", "scheduler"):
        (tmp_path / part).symlink_to(folder / part)
    index = read_json(folder / "model_index.json")
    write_json(tmp_path / "model_index.json", index)
    config = {**read_json(folder / "unet" / "config.json"), "class_embed_type": None}
    (tmp_path / "unet").unlink()
    write_json(tmp_path / "unet" / "config.json", config)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").symlink_to(
        folder / "unet" / "diffusion_pytorch_model.safetensors"
    )
    with pytest.raises(ValueError, match="must take the step of the noise by `class_embed_type`"):
        interop.load(tmp_path)
