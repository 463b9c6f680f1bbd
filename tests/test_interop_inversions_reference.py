"""Textual inversions and LoRAs of text against diffusers': ids, embeddings, and the files that are written."""

import numpy as np
import pytest
from keras import ops

from kdiff import inversion, lora
from kdiff.interop import diffusers as interop
from kdiff.interop import inversions, prompts
from kdiff.interop import lora as files
from tests.test_interop_lora_reference import merge
from tests.test_interop_networks_reference import SMALL_DIT, perturbed
from tests.test_interop_prompts_reference import LENGTH, check, embeddings, sd_1, xl
from tests.toys import mostly_once

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
library = pytest.importorskip("safetensors.torch")

VECTORS = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
TEXTS = ["a <toy> b", "<toy>s, a<toy>"]


def one(folder):
    library.save_file({"<toy>": VECTORS[0].clone()}, folder / "learned_embeds.safetensors")
    return folder, {}


def several(folder):
    torch.save({"<toy>": VECTORS}, folder / "learned_embeds.bin")
    return folder, {}


def a1111(folder, parameters=dict):
    content = {"string_to_token": {"*": 265}, "string_to_param": parameters({"*": VECTORS[:2]}), "name": "<toy>"}
    torch.save({**content, "step": 5, "sd_checkpoint": None}, folder / "file.pt")
    return folder / "file.pt", {"weight_name": "file.pt"}


def renamed(folder):
    library.save_file({"emb_params": VECTORS}, folder / "file.safetensors")
    return folder / "file.safetensors", {"weight_name": "file.safetensors", "token": "<toy>"}


def ids_of(pipeline, tokenizer):
    texts = pipeline.maybe_convert_prompt(TEXTS, tokenizer)
    return tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True).input_ids


@pytest.mark.parametrize("kind", mostly_once([several, one, a1111, renamed]))
def test_against_load_textual_inversion(kind, tmp_path):
    """And of the folder that is saved then diffusers makes the same."""
    pipeline = sd_1(tmp_path)
    pipeline.save_pretrained(tmp_path / "saved")
    model = interop.load(tmp_path / "saved")
    path, options = kind(tmp_path)
    token = {"token": options["token"]} if "token" in options else {}
    assert inversions.load(model, path, **token) == "<toy>"
    pipeline.load_textual_inversion(tmp_path, **options)
    prompt = prompts.prompt_of(model.network)
    np.testing.assert_array_equal(prompt.tokenizers[0](TEXTS), ids_of(pipeline, pipeline.tokenizer))
    (tokens, _), _ = embeddings(pipeline, TEXTS)
    check(prompt.prepare(TEXTS), tokens, 2e-6)
    interop.save(model, tmp_path / "again")
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "again")
    check(prompt.prepare(TEXTS), embeddings(again, TEXTS)[0][0], 2e-6)
    loaded = prompts.prompt_of(interop.load(tmp_path / "again").network)
    np.testing.assert_array_equal(loaded.tokenizers[0](TEXTS), prompt.tokenizers[0](TEXTS))


@pytest.mark.once
def test_a_dictionary_of_parameters(tmp_path):
    """As the code of the paper has it: a module of PyTorch in the file."""
    path, _ = a1111(tmp_path, torch.nn.ParameterDict)
    token, (vectors,) = inversions.read(path)
    assert token == "<toy>"
    np.testing.assert_array_equal(vectors, VECTORS[:2].numpy())


@pytest.mark.once
def test_of_xl(tmp_path):
    """One file for both encoders, which diffusers is told to read twice; and what is trained is written so."""
    pipeline = xl(tmp_path)
    pipeline.save_pretrained(tmp_path / "saved")
    model = interop.load(tmp_path / "saved")
    state = {"clip_l": VECTORS[:2].clone(), "clip_g": VECTORS[1:].clone()}
    library.save_file(state, tmp_path / "mine.safetensors")
    inversions.load(model, tmp_path / "mine.safetensors", "<toy>")
    for name, part in (("clip_l", ""), ("clip_g", "_2")):
        parts = {"text_encoder": getattr(pipeline, f"text_encoder{part}")}
        tokenizer = getattr(pipeline, f"tokenizer{part}")
        pipeline.load_textual_inversion({"<toy>": state[name]}, token="<toy>", tokenizer=tokenizer, **parts)
    prompt = prompts.prompt_of(model.network)
    np.testing.assert_array_equal(prompt.tokenizers[1](TEXTS), ids_of(pipeline, pipeline.tokenizer_2))
    (tokens, vector), _ = embeddings(pipeline, TEXTS)
    rows = prompt.prepare(TEXTS)
    check(rows[:, :LENGTH], tokens, 2e-6)
    check(rows[:, LENGTH, : prompt.vector], vector, 2e-6)
    inversion.enable(model, "<toy>")
    for encoder in prompt.encoders:
        encoder.table.rows.assign(VECTORS[:2].numpy())
    inversions.save(model, "<toy>", tmp_path / "out")
    written = library.load_file(tmp_path / "out" / "learned_embeds.safetensors")
    assert {name: tuple(array.shape) for name, array in written.items()} == {"clip_l": (2, 16), "clip_g": (2, 16)}
    assert torch.equal(written["clip_g"], VECTORS[:2])


@pytest.mark.once
def test_files_that_do_not_fit(tmp_path):
    pipeline = sd_1(tmp_path)
    pipeline.save_pretrained(tmp_path / "saved")
    model = interop.load(tmp_path / "saved")
    wide = np.zeros((2, 9), "float32")
    with pytest.raises(ValueError, match=r"the mapping: a vector must be as wide as an encoder's, \[16\]; received: 9"):
        inversions.load(model, {"<toy>": wide})
    with pytest.raises(ValueError, match="must be finite"):
        inversions.load(model, {"<toy>": np.full((2, 16), np.nan, "float32")})
    with pytest.raises(ValueError, match="must hold one token, A1111's"):
        inversions.load(model, {"<a>": wide, "<b>": wide})
    with pytest.raises(ValueError, match="has no name for its token"):
        inversions.load(model, {"emb_params": np.zeros((2, 16), "float32")})
    with pytest.raises(ValueError, match=r"must have one of \['learned_embeds.safetensors'"):
        inversions.load(model, tmp_path)
    with pytest.raises(ValueError, match="not in the vocabulary"):
        inversions.load(model, {"<|endoftext|>": np.zeros((2, 16), "float32")})
    assert prompts.prompt_of(model.network).encoders[0].vocabulary_size == pipeline.text_encoder.config.vocab_size


@pytest.mark.once
@pytest.mark.parametrize("pipe", [xl, sd_1])
def test_lora_of_text_that_kdiff_has_trained(pipe, tmp_path):
    """Its file has diffusers' names, and W + up down in the modules of transformers gives kdiff's embeddings."""
    pipeline = pipe(tmp_path)
    pipeline.save_pretrained(tmp_path / "saved")
    model = interop.load(tmp_path / "saved")
    prompt = prompts.prompt_of(model.network)
    plain = prompt.prepare(["a b"])
    lora.enable(model, 2, alpha=6.0, text=True)
    generator = np.random.default_rng(5)
    for layer in lora.enabled(model):
        for weight in (layer.lora_kernel_a, layer.lora_kernel_b):
            weight.assign(0.2 * generator.standard_normal(weight.shape))
    files.save(model, tmp_path)
    state = library.load_file(tmp_path / files.FILE)
    stems = {name.rpartition(".lora_")[0] for name in state}
    assert {stem.partition(".")[0] for stem in stems} == {"unet", *prompts.encoders_of(prompt)}
    assert all("text_encoder" not in stem or ".text_model.encoder.layers." in stem for stem in stems)
    for part in prompts.encoders_of(prompt):
        module, found = getattr(pipeline, part), {}
        inside = "" if hasattr(module, "text_model") else "text_model."
        for stem in stems:
            if stem.startswith(f"{part}.text_model."):
                name = stem.removeprefix(f"{part}.").removeprefix(inside)
                found[name] = (state[f"{stem}.lora_A.weight"], state[f"{stem}.lora_B.weight"])
        assert len(found) == 4 * 3
        merge(module, found, 1.0)
    lora.merge(model)
    rows = prompt.prepare(["a b"])
    assert np.abs(rows - plain).max() > 0.01 * np.abs(plain).max()
    check(rows[:, :LENGTH], embeddings(pipeline, ["a b"])[0][0], 1e-5)
    again = interop.load(tmp_path / "saved")
    files.load(again, tmp_path)
    check(prompts.prompt_of(again.network).prepare(["a b"]), rows, 1e-5)


@pytest.mark.once
def test_a_lora_of_text_changes_the_negative_of_a_step_that_is_compiled(tmp_path):
    """The empty text is a constant of the step."""
    pipeline = sd_1(tmp_path)
    pipeline.save_pretrained(tmp_path / "saved")
    model, other = (interop.load(tmp_path / "saved") for _ in range(2))
    options = {"text": "a b", "guidance": 5.0, "steps": 2, "height": 16, "width": 16}
    model.sample(1, **options)
    down, up = 0.3 * VECTORS[:2].numpy(), 0.3 * VECTORS[1:].numpy().T.copy()
    name = "text_encoder.text_model.encoder.layers.{}.self_attn.v_proj.lora_{}.weight"
    state = {name.format(i, kind): array for i in range(3) for kind, array in (("A", down), ("B", up))}
    for one in (model, other):
        files.load(one, state)
    np.testing.assert_allclose(model.sample(1, **options), other.sample(1, **options), atol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_lora_of_a_dit(prefix, tmp_path):
    """By the names of diffusers' module; saved by kdiff, it is the same file."""
    module = perturbed(diffusers.DiTTransformer2DModel(**SMALL_DIT))
    module.save_pretrained(tmp_path / "dit")
    network = interop.load(tmp_path / "dit")
    names = [name for name, one in module.named_modules() if isinstance(one, torch.nn.Linear)]
    names = [name for name in names if name.endswith(("to_q", "to_v", "to_out.0", "proj_out_1", "net.0.proj"))]
    generator, factors = torch.Generator().manual_seed(0), {}
    for name in names:
        outputs, inputs = module.get_submodule(name).weight.shape
        factors[name] = tuple(0.2 * torch.randn(*shape, generator=generator) for shape in ((2, inputs), (outputs, 2)))
    kinds = ("lora_A", "lora_B")
    state = {
        f"{prefix}{name}.{kind}.weight": x for name, ab in factors.items() for kind, x in zip(kinds, ab, strict=True)
    }
    library.save_file(state, tmp_path / "lora.safetensors")
    change = files.load(network, tmp_path / "lora.safetensors")
    assert len(change.names["transformer"]) == len(names)
    merge(module, factors, 1.0)
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype("float32")
    inputs = {"image": x, "time": np.array([7.0, 300.0], "float32"), "label": np.array([1, 3])}
    with torch.no_grad():
        labels = torch.tensor(inputs["label"])
        image = torch.tensor(x.transpose(0, 3, 1, 2))
        wanted = module(image, torch.tensor(inputs["time"]), labels).sample.numpy().transpose(0, 2, 3, 1)
    found = ops.convert_to_numpy(ops.stop_gradient(network(inputs)))
    check(found, wanted, 1e-5)
