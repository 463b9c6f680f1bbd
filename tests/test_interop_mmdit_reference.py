"""Stable Diffusion 3 against diffusers: its transformer, and whole pipelines with and without T5, in and out."""

import importlib
import io
import json
import os

import keras
import numpy as np
import pytest
from keras import ops

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from kdiff import backend, lora
from kdiff.encoders import JointPrompt, T5Text
from kdiff.guidance import ClassifierFree
from kdiff.interop import diffusers as interop
from kdiff.interop import lora as lora_files
from kdiff.interop import prompts
from tests.test_interop_lora_reference import merge, peft, random_factors, written
from tests.test_interop_prompts_reference import (
    LENGTH,
    NEGATIVE,
    TEXTS,
    VAE,
    X,
    check,
    perturbed,
    text_encoder,
    words,
)
from tests.toys import mostly_once

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # diffusers mixes NumPy 2 and tensors
]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")

WIDTH, VECTOR = 36, 24
SD3 = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "caption_projection_dim": 16,
    "pooled_projection_dim": VECTOR,
    "pos_embed_max_size": 6,
}
KINDS = {
    "3.5-medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    "3": {},
    "3.5-large": {"qk_norm": "rms_norm"},
}
INPUTS = {
    "image": np.random.default_rng(0).standard_normal((2, 12, 8, 4)).astype("float32"),
    "time": np.array([7.0, 300.0], "float32"),
    "context": np.random.default_rng(1).standard_normal((2, 5, WIDTH)).astype("float32"),
    "text_embeds": np.random.default_rng(2).standard_normal((2, VECTOR)).astype("float32"),
}


def transformer(**options):
    model = perturbed(diffusers.SD3Transformer2DModel(**{**SD3, **options}))
    model.pos_embed.pos_embed.mul_(1.5)  # a table of one's own is read as it stands
    return model


def theirs_of(model):
    given = {name: torch.tensor(value) for name, value in INPUTS.items()}
    with torch.no_grad():
        y = model(given["image"].permute(0, 3, 1, 2), given["context"], given["text_embeds"], given["time"])[0]
    return y.permute(0, 2, 3, 1).numpy()


def ours_of(network):
    return ops.convert_to_numpy(backend.compiled(lambda x: network(x), network)(INPUTS))


@pytest.mark.once
@pytest.mark.parametrize("kind", KINDS)
def test_transformer(kind, tmp_path):
    """Of a map that is neither square nor as large as the table; and written again, every array is the same."""
    model = transformer(**KINDS[kind])
    model.save_pretrained(tmp_path / "theirs")
    network = interop.load(tmp_path / "theirs")
    wanted = theirs_of(model)
    check(ours_of(network), wanted, 1e-5)
    assert wanted.std() > 0.1
    interop.save(network, tmp_path / "ours")
    again = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "ours")
    for key in {*SD3, "patch_size", "qk_norm"}:
        assert again.config[key] == model.config[key], key
    assert list(again.config.dual_attention_layers) == list(model.config.dual_attention_layers)
    for (name, one), (_, other) in zip(again.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.once
def test_a_map_larger_than_the_table_is_refused(tmp_path):
    transformer().save_pretrained(tmp_path)
    network = interop.load(tmp_path)
    with pytest.raises(ValueError, match="must be at most 6 x 6"):
        network({**INPUTS, "image": np.zeros((2, 14, 8, 4), "float32")})


@pytest.mark.once
def test_a_projection_of_another_width_is_refused(tmp_path):
    transformer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "caption_projection_dim": 8}))
    with pytest.raises(ValueError, match="`caption_projection_dim` must be the width of the blocks, 16; received: 8"):
        interop.load(tmp_path)


# --- pipelines


def t5_words(folder):
    """T5's tokenizer, of a vocabulary that is learned here."""
    model, lines = io.BytesIO(), ["a red cat on a disc of it", "dull abc def ghi jkl"] * 20
    ids = {"bos_id": -1, "pad_id": 0, "eos_id": 1, "unk_id": 2, "pad_piece": "<pad>", "minloglevel": 2}
    options = {"vocab_size": 40, "hard_vocab_limit": False, **ids}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **options)
    folder.mkdir()
    (folder / "spiece.model").write_bytes(model.getvalue())
    extra = [f"<extra_id_{i}>" for i in range(4)]
    config = {"model_max_length": 512, "extra_ids": 4, "additional_special_tokens": extra}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "T5Tokenizer"}))
    return transformers.T5Tokenizer.from_pretrained(folder)


def t5():
    sizes = {"vocab_size": 64, "d_model": WIDTH, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return perturbed(transformers.T5EncoderModel(transformers.T5Config(**sizes, feed_forward_proj="gated-gelu")))


def pipeline(folder, third, heads=2, **options):
    coder = {"scaling_factor": 1.5, "shift_factor": 0.06, "use_quant_conv": False, "use_post_quant_conv": False}
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer(**options),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=perturbed(diffusers.AutoencoderKL(**VAE, **coder)),
        text_encoder=text_encoder("CLIPTextModelWithProjection", num_attention_heads=heads),
        tokenizer=words(folder / "words", "<|endoftext|>"),
        text_encoder_2=text_encoder("CLIPTextModelWithProjection", hidden_act="gelu", num_attention_heads=heads),
        tokenizer_2=words(folder / "words_2", "!"),
        text_encoder_3=t5() if third else None,
        tokenizer_3=t5_words(folder / "words_3") if third else None,
    )


@pytest.fixture(scope="module", params=mostly_once([True, False]), ids=lambda third: "t5" if third else "no_t5")
def pair(request, tmp_path_factory):
    """(the pipeline, the folder that it has written, the model of that)."""
    folder = tmp_path_factory.mktemp("sd3")
    theirs = pipeline(folder, request.param)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(folder / "saved")
    return theirs, folder / "saved", interop.load(folder / "saved")


def drawn(pipe, negative=None):
    options = {"negative_prompt": negative, "num_inference_steps": 4, "guidance_scale": 6.0}
    latents = torch.tensor(X.transpose(0, 3, 1, 2))
    return pipe(TEXTS, latents=latents, output_type="np", height=16, width=16, **options).images


@pytest.mark.once
def test_embeddings(pair):
    """Tokens of both groups and the vectors, of texts and of the empty one; zeros where there is no T5."""
    theirs, _, model = pair
    prompt = prompts.prompt_of(model.network)
    given = theirs.encode_prompt(TEXTS, TEXTS, TEXTS, device="cpu")
    tokens, no_tokens, vector, no_vector = (one.detach().numpy() for one in given)
    for rows, wanted, wanted_vector in (
        (prompt.prepare(TEXTS), tokens, vector),
        (np.stack([prompt.null] * 2), no_tokens, no_vector),
    ):
        check(rows[:, :-1], wanted, 5e-6)
        check(rows[:, -1, : prompt.vector], wanted_vector, 2e-6)
        assert np.any(rows[:, LENGTH:-1]) == (theirs.text_encoder_3 is not None)


@pytest.mark.parametrize("negative", mostly_once([NEGATIVE, None]))
def test_images(pair, negative):
    """By the whole pipeline, decoder and all."""
    theirs, _, model = pair
    wanted = drawn(theirs, negative)
    guidance = ClassifierFree(6.0, negative=None if negative is None else {"text": negative})
    found = model.sample(2, text=TEXTS, guidance=guidance, steps=4, x=X)
    assert wanted.std() > 0.05
    assert np.abs((found + 1.0) / 2.0 - wanted).max() < 1e-4


def test_mixed_precision(tmp_path):
    """A folder read under a policy samples near what it samples in full precision: bfloat16 has 8 bits of mantissa."""
    pipeline(tmp_path, True, **KINDS["3.5-medium"]).save_pretrained(tmp_path / "saved")
    if keras.backend.backend() == "tensorflow":
        importlib.import_module("tensorflow").config.run_functions_eagerly(False)  # unlike the other tests here
    full, lower = (sampled_under(policy, tmp_path / "saved") for policy in ("float32", "mixed_bfloat16"))
    assert full.std() > 0.5
    assert 1e-4 < np.abs(lower - full).max() / np.abs(full).max() < 0.015


def sampled_under(policy, folder):
    """Latents, of a model that is read under this policy."""
    keras.config.set_dtype_policy(policy)
    try:
        model = interop.load(folder)
    finally:
        keras.config.set_dtype_policy("float32")
    assert {layer.compute_dtype for layer in model.network.blocks} == {policy.removeprefix("mixed_")}
    *_, end = model.sample_steps(2, text=TEXTS, guidance=2.0, steps=2, x=X, preview="identity")
    return end.x


@pytest.mark.once
def test_saved_again(pair, tmp_path):
    """diffusers makes the same images of the folder that kdiff has written."""
    theirs, folder, model = pair
    interop.save(model, tmp_path)
    wanted, found = (json.loads((one / "model_index.json").read_text()) for one in (folder, tmp_path))
    for entry in (wanted, found):
        entry.pop("_diffusers_version", None)
        entry["tokenizer_3"][1] = str(entry["tokenizer_3"][1]).removesuffix("Fast")
    assert found == wanted
    # Where an index says that there is no T5, diffusers asks for it in its own folders too.
    left_out = {} if theirs.text_encoder_3 else {"text_encoder_3": None, "tokenizer_3": None}
    again = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path, **left_out)
    again.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(drawn(again), drawn(theirs), atol=1e-5)


@pytest.mark.once
def test_t5_may_be_left_out(pair, tmp_path):
    """Its folder taken away, the model is that of diffusers' `text_encoder_3=None`."""
    theirs, folder, model = pair
    if theirs.text_encoder_3 is None:
        pytest.skip("there is none")
    for entry in folder.iterdir():
        if not entry.name.endswith("_3"):
            (tmp_path / entry.name).symlink_to(entry)
    found = prompts.prompt_of(interop.load(tmp_path).network)
    whole = prompts.prompt_of(model.network).prepare(TEXTS)
    assert np.array_equal(found.prepare(TEXTS)[:, :LENGTH], whole[:, :LENGTH])
    assert not np.any(found.prepare(TEXTS)[:, LENGTH:-1])


@pytest.mark.once
def test_lora(tmp_path):
    """PEFT's files reach the layers of both sides; and what kdiff trains, written, is the same change in diffusers."""
    model = transformer(**KINDS["3.5-medium"])
    model.save_pretrained(tmp_path)
    network = interop.load(tmp_path)
    before = theirs_of(model)
    names = ("to_q", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm1.linear")
    factors = random_factors(model, names=names)
    change = lora_files.load(network, written(tmp_path / "lora.safetensors", *peft(factors, "transformer", 6.0)))
    merge(model, factors, 2.0)
    wanted = theirs_of(model)
    assert np.abs(wanted - before).max() > 0.1
    check(ours_of(network), wanted, 1e-5)
    change.remove()
    paths = lora.enable(network, 2)
    assert len(paths) == 2 * 4 + 2 * 4 + 4 + 3  # image, dual, text, and text of the last block without an output
    rng = np.random.default_rng(3)
    for layer in lora.enabled(network):
        layer.lora_kernel_b.assign(rng.standard_normal(layer.lora_kernel_b.shape))
    trained = ours_of(network)
    lora_files.save(network, tmp_path / "mine.safetensors")
    fresh = interop.load(tmp_path)
    lora_files.load(fresh, tmp_path / "mine.safetensors")
    check(ours_of(fresh), trained, 1e-5)
    assert np.abs(trained - before).max() > 0.1


# --- what a prompt may be made of


@pytest.mark.once
def test_a_prompt_of_encoders_in_another_order_is_refused(pair):
    _, _, model = pair
    prompt = prompts.prompt_of(model.network)
    encoders, tokenizers = prompt.encoders, prompt.tokenizers
    if isinstance(encoders[-1], T5Text):
        with pytest.raises(ValueError, match="must be CLIPText, optionally followed by T5Text"):
            JointPrompt(encoders[::-1], tokenizers[::-1], WIDTH)
        with pytest.raises(ValueError, match="texts for T5Text must have 300 tokens"):
            JointPrompt(encoders, tokenizers, WIDTH, following=300)
    with pytest.raises(ValueError, match=r"`width` must be at least that of the tokens, (36|32); received: 20"):
        JointPrompt(encoders, tokenizers, 20)
