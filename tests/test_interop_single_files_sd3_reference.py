"""Stable Diffusion 3 in one file, against diffusers' own conversion of its names, and the folder of the same."""

import numpy as np
import pytest
from keras import ops

from kdiff.interop import autoencoders, prompts, single_files, single_files_sd3
from kdiff.interop import diffusers as interop
from kdiff.interop.autoencoder_names import original_slots
from kdiff.interop.weights import export
from tests.test_interop_mmdit_reference import KINDS, TEXTS, VAE, X, check, ours_of, pipeline, transformer

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
conversion = pytest.importorskip("diffusers.loaders.single_file_utils")

WIDE = {"attention_head_dim": 64, "num_attention_heads": 1, "caption_projection_dim": 64}  # heads of 64, as published


def options_of(kind):
    return {**KINDS[kind], **({} if "qk_norm" in KINDS[kind] else WIDE)}


@pytest.mark.once
@pytest.mark.parametrize("kind", KINDS)
def test_transformer(kind, tmp_path):
    """By our names, diffusers' conversion gives its arrays; and a file of these is the same network."""
    theirs = transformer(**options_of(kind))
    theirs.save_pretrained(tmp_path)
    network = interop.load(tmp_path)
    state = export(single_files_sd3.sd3_slots(network))
    given = {name: torch.tensor(array) for name, array in state.items()}
    converted = conversion.convert_sd3_transformer_checkpoint_to_diffusers(given)
    wanted = theirs.state_dict()
    assert converted.keys() == wanted.keys()
    for name, one in converted.items():
        assert torch.equal(one, wanted[name]), name
    model = single_files.load(state, image_size=64)
    assert model.network.condition_inputs.keys() == {"context", "text_embeds"}
    np.testing.assert_array_equal(ours_of(model.network), ours_of(network))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(the model of the folder, the arrays of one file, the folder)."""
    folder = tmp_path_factory.mktemp("sd3")
    theirs = pipeline(folder, third=True, heads=1, **WIDE)
    theirs.save_pretrained(folder / "saved")
    model = interop.load(folder / "saved")
    state = export(single_files_sd3.sd3_slots(model.network))
    slots = original_slots(model.codec.autoencoder)
    state |= export(slot._replace(name=autoencoders.FIRST_STAGE + slot.name) for slot in slots)
    encoders = (theirs.text_encoder, theirs.text_encoder_2, theirs.text_encoder_3)
    for place, encoder in zip(single_files_sd3.TEXT, encoders, strict=True):
        state |= {place + name: array.numpy() for name, array in encoder.state_dict().items()}
    return model, state, folder


def tokenizers_of(folder, count):
    return [folder / "saved" / f"tokenizer{end}" for end in ("", "_2", "_3")[:count]]


@pytest.mark.once
@pytest.mark.parametrize("third", [True, False])
def test_whole_file(whole, third, monkeypatch):
    """The images of the folder; with two tokenizers T5 is left out."""
    model, state, folder = whole
    codec = model.codec.clone()
    for name, value in {"SCALE": codec.scale, "SHIFT": codec.shift}.items():
        monkeypatch.setattr(single_files_sd3, name, value)
    monkeypatch.setattr(
        autoencoders,
        "_measured",
        lambda state, groups, made=autoencoders._measured: made(state, VAE["norm_num_groups"]),
    )
    found = single_files.load(state, tokenizers_of(folder, 3 if third else 2), image_size=16)
    rows, wanted = (prompts.prompt_of(one.network).prepare(TEXTS) for one in (found, model))
    length = 16
    check(rows[:, :length], wanted[:, :length], 1e-6)
    check(rows[:, -1], wanted[:, -1], 1e-6)
    check(rows[:, length:-1], wanted[:, length:-1] * third, 1e-6)
    if third:
        images = [one.sample(2, text=TEXTS, guidance=6.0, steps=2, x=X) for one in (found, model)]
        np.testing.assert_allclose(*images, atol=1e-5)


@pytest.mark.once
def test_clip_without_a_projection(whole):
    """The published file has none in its first encoder: the identity stands for it."""
    _, state, folder = whole
    prefix = single_files_sd3.TEXT[0]
    changed = dict(state)
    projection = changed.pop(f"{prefix}text_projection.weight")
    width = projection.shape[1]
    changed[f"{single_files_sd3.UNET}y_embedder.mlp.0.weight"] = np.zeros((64, width + 12), "float32")
    found = single_files.load(changed, tokenizers_of(folder, 2), codec="identity", image_size=16)
    encoder = prompts.prompt_of(found.network).encoders[0]
    np.testing.assert_array_equal(ops.convert_to_numpy(encoder.projection_layer.kernel), np.eye(width))


@pytest.mark.once
def test_what_does_not_fit_is_refused(whole):
    _, state, folder = whole
    with pytest.raises(ValueError, match="`velocity` and `zero_snr` do not apply"):
        single_files.load(state, velocity=True)
    bare = {name: array for name, array in state.items() if not name.startswith("text_encoders.")}
    with pytest.raises(ValueError, match="no text encoders were found under"):
        single_files.load(bare, tokenizers_of(folder, 2), codec="identity")
    name = f"{single_files_sd3.UNET}joint_blocks.1.context_block.attn.qkv.weight"
    with pytest.raises(ValueError, match=f"missing: {name}"):
        single_files.load({key: array for key, array in bare.items() if key != name}, codec="identity", image_size=64)
    without = {key: array for key, array in state.items() if not key.startswith(single_files_sd3.TEXT[2])}
    with pytest.raises(ValueError, match="tokenizer of T5 was given, but there is no encoder"):
        single_files.load(without, tokenizers_of(folder, 3), codec="identity")
