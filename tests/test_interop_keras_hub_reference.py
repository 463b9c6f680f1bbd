"""KerasHub's presets of Stable Diffusion 3: a tiny one that KerasHub writes, against KerasHub's own layers."""

import json
import shutil

import keras
import numpy as np
import pytest
from keras import ops

from kdiff.interop import keras_hub as interop
from kdiff.interop import prompts
from tests.test_interop_prompts_reference import END, LENGTH, TEXTS, WORDS, check, words

pytestmark = pytest.mark.reference
keras_hub = pytest.importorskip("keras_hub")

INPUTS = {
    "image": np.random.default_rng(0).standard_normal((2, 8, 4, 16)).astype("float32"),
    "time": np.array([7.0, 300.0], "float32"),
    "context": np.random.default_rng(1).standard_normal((2, 5, 4096)).astype("float32"),
    "text_embeds": np.random.default_rng(2).standard_normal((2, 20)).astype("float32"),
}
WIDTHS = [32, 32, 64]


def backbone():
    """Random, every weight of it."""
    from keras_hub.src.models.clip.clip_text_encoder import CLIPTextEncoder  # which KerasHub does not export
    from keras_hub.src.models.vae.vae_backbone import VAEBackbone

    sides = [WIDTHS, [1, 1, 1], WIDTHS[::-1], [2, 2, 2]]
    text = {"max_sequence_length": LENGTH, "intermediate_output_index": 0}
    made = keras_hub.models.StableDiffusion3Backbone(
        mmdit_patch_size=2,
        mmdit_hidden_dim=16,
        mmdit_num_layers=2,
        mmdit_num_heads=2,
        mmdit_position_size=6,
        mmdit_qk_norm="rms_norm",
        mmdit_dual_attention_indices=(0,),
        vae=VAEBackbone(*sides, sampler_method="mode", name="vae"),
        clip_l=CLIPTextEncoder(len(WORDS), 8, 8, 2, 1, 16, "quick_gelu", name="clip_l", **text),
        clip_g=CLIPTextEncoder(len(WORDS), 12, 12, 2, 1, 24, "gelu", name="clip_g", **text),
        image_shape=(64, 32, 3),
    )
    rng = np.random.default_rng(3)
    for weight in made.weights:
        weight.assign(ops.convert_to_numpy(weight) + 0.1 * rng.standard_normal(weight.shape))
    return made


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(KerasHub's, our model of the preset that it has written, the folder)."""
    folder = tmp_path_factory.mktemp("hub")
    theirs = backbone()
    theirs.save_to_preset(folder / "preset")
    words(folder / "words", "<|endoftext|>")
    return theirs, interop.load(folder / "preset", folder / "words", image_size=32), folder


@pytest.mark.once
def test_transformer(pair):
    theirs, model, _ = pair
    rows = np.zeros((2, *prompts.prompt_of(model.network).row), "float32")
    rows[:, :5], rows[:, -1, :20] = INPUTS["context"], INPUTS["text_embeds"]
    given = {"latent": INPUTS["image"], "context": rows[:, :-1], "pooled_projection": INPUTS["text_embeds"]}
    wanted = ops.convert_to_numpy(theirs.diffuser({**given, "timestep": INPUTS["time"]}, training=False))
    found = model.network({"image": INPUTS["image"], "time": INPUTS["time"], "text": rows})
    assert wanted.std() > 0.1
    check(ops.convert_to_numpy(found), wanted, 1e-5)


def test_text(pair):
    """But for the epsilon of CLIP's last norm, the vectors."""
    theirs, model, _ = pair
    prompt = prompts.prompt_of(model.network)
    ids = [tokenizer(TEXTS) for tokenizer in prompt.tokenizers]
    assert np.all(ids[0].max(axis=1) == END)
    given = dict(zip(("clip_l", "clip_g"), ids, strict=True))
    # KerasHub takes the first of the largest numbers for the end, which the tiny vocabulary has as the last word.
    tokens, _, vector, _ = map(ops.convert_to_numpy, theirs.encode_text_step(given, given))
    rows = prompt.prepare(TEXTS)
    assert rows.shape == (2, 2 * LENGTH + 1, 4096)
    check(rows[:, :-1], tokens, 1e-5)
    check(rows[:, -1, : prompt.vector], vector, 1e-4)


@pytest.mark.once
def test_autoencoder(pair):
    theirs, model, _ = pair
    images = np.random.default_rng(4).uniform(-1, 1, (2, 32, 16, 3)).astype("float32")
    latents = ops.convert_to_numpy(theirs.encode_image_step(images))
    check(ops.convert_to_numpy(model.codec.encode(images)), latents, 1e-5)
    wanted = ops.convert_to_numpy(theirs.decode_step(latents))
    check(ops.convert_to_numpy(model.codec.decode(latents)), np.clip(wanted, -1.0, 1.0), 1e-5)


@pytest.mark.once
def test_samples(pair):
    _, model, _ = pair
    assert model.sample(2, text=TEXTS, guidance=2.0, steps=2).shape == (2, 32, 32, 3)


@pytest.mark.once
def test_what_is_no_such_preset_is_refused(pair, tmp_path):
    _, _, folder = pair
    config = json.loads((folder / "preset" / "config.json").read_text())
    changes = {
        "`class_name` must be 'StableDiffusion3Backbone'": {"class_name": "CLIPBackbone"},
        "the preset has a T5": {"config": {**config["config"], "t5": {"class_name": "T5Encoder"}}},
        "missing or not a number: 'mmdit_num_heads'": {
            "config": {name: value for name, value in config["config"].items() if name != "mmdit_num_heads"}
        },
    }
    for message, change in changes.items():
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            interop.load(tmp_path)
    shutil.copy(folder / "preset" / "config.json", tmp_path)
    with pytest.raises(ValueError, match=r"model\.weights\.h5: no such file"):
        interop.load(tmp_path)
    (tmp_path / "model.weights.h5").write_bytes(b"no HDF5")
    with pytest.raises(ValueError, match="not a complete HDF5 file"):
        interop.load(tmp_path)
    keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(2)]).save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(ValueError, match="is not a weight of StableDiffusion3Backbone"):
        interop.load(tmp_path)
