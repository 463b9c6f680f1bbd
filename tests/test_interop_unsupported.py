"""What belongs to someone else, or is not there, is said in one line."""

import json

import numpy as np
import pytest

from kdiff.interop import diffusers, files, original, weights
from tests.test_interop import unet
from tests.test_interop_checkpoints import weights as simple

pytestmark = pytest.mark.once
pytest.importorskip("safetensors", reason="the extra `interop` is not installed")


def message(function, *arguments):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        function(*arguments)
    return str(raised.value)


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}" if name.endswith("json") else "")
    return folder


LAYOUTS = {
    "pytorch_lora_weights.safetensors": "a LoRA",
    "adapter_config.json": "an adapter of PEFT",
    "learned_embeds.bin": "a textual inversion",
    "tokenizer_config.json": "a tokenizer",
    "checkpoint-500/model.safetensors": "the output of a training script",
    "random_states_0.pkl": r"a checkpoint of training by Accelerate; its weights are in `model\.safetensors`",
    "unet/model.onnx": "ONNX",
    "diffusion_flax_model.msgpack": "weights of Flax",
    "openvino_model.xml": "OpenVINO",
    "weights.h5": "weights of Keras or of keras-cv",
    "v1-5-pruned.ckpt": r"a model in one file; kdiff\.interop\.single_files reads",
    "saved_model.pb": "a SavedModel of TensorFlow",
    "scheduler_config.json": "a scheduler",
    "unet/config.json": r"a folder of models without `model_index\.json`; load one of \['unet'\]",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_folders_of_others(name, tmp_path):
    words = message(diffusers.load, touch(tmp_path, name))
    assert "\n" not in words
    with pytest.raises(ValueError, match=f"no such file; its folder holds: .*; this is {LAYOUTS[name]}"):
        diffusers.load(tmp_path)


def test_folders_of_others_with_a_configuration(tmp_path):
    touch(tmp_path, "config.json", "model.weights.h5", "metadata.json")
    assert "this is a preset of KerasHub" in message(diffusers.load, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["CLIPTextModel"], "model_type": "clip"}))
    assert "this is a model of transformers, CLIPTextModel" in message(diffusers.load, tmp_path)


def test_weights_of_others_in_the_right_folder(tmp_path):
    diffusers.save(unet(), tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    touch(tmp_path, "diffusion_flax_model.msgpack")
    assert "no weights; expected one of" in message(diffusers.load, tmp_path)
    assert "this is weights of Flax" in message(diffusers.load, tmp_path)


def test_names_of_the_hub_and_files_in_place_of_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = message(diffusers.load, "google/ddpm-cifar10-32")
    assert "neither the file nor its folder exists; kdiff downloads nothing" in words
    assert "snapshot_download('google/ddpm-cifar10-32')" in words
    assert "snapshot" not in message(diffusers.load, tmp_path / "no" / "where")
    touch(tmp_path, "model.safetensors", "model.keras")
    assert "must be a folder; it is a file; use kdiff.interop.original" in message(diffusers.load, "model.safetensors")
    assert "it is a file; this is a full model of Keras" in message(diffusers.load, "model.keras")
    assert "received: '.keras'; this is a full model of Keras" in message(files.read_state, "model.keras")


def test_pointers_of_git_lfs(tmp_path):
    diffusers.save(unet(), tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / "diffusion_pytorch_model.safetensors").write_text(pointer)
    words = message(diffusers.load, tmp_path)
    assert "diffusion_pytorch_model.safetensors: the file is only a pointer of git-LFS" in words
    (tmp_path / "weights.pt").write_text(pointer)
    assert "`git lfs pull`" in message(original.dit, tmp_path / "weights.pt")


STATES = {
    "lora_unet_down_blocks_0.lora_down.weight": "those of a LoRA",
    "unet.down_blocks.0.to_q.lora.up.weight": "those of a LoRA",
    "model.diffusion_model.input_blocks.0.0.weight": "those of Stable Diffusion in one file",
    "controlnet_cond_embedding.conv_in.weight": "those of a ControlNet",
    "emb_params": "those of a textual inversion",
    "model.init_conv.weight": "those of denoising-diffusion-pytorch's U-Net",
    "all_modules.0.weight": "those of score_sde_pytorch's networks",
    "model.enc.64x64_conv.weight": "those of EDM's networks",
    "double_blocks.0.img_attn.qkv.weight": "those of the transformer of Flux",
    "blocks.0.weight.absmax": "quantised values with scales",
}


@pytest.mark.parametrize("name", STATES)
def test_weights_of_others(name):
    state = {name: np.ones((2, 2), "float32")}
    assert f"; by their names they are {STATES[name]}" in message(original.dit, state)
    assert f"; by their names they are {STATES[name]}" in message(weights.assign, [weights.Slot("w", None)], state, "x")


def test_a_prefix_is_named():
    state = {f"net.{name}": array for name, array in simple().items()}
    network = original.simple_unet(simple())
    words = message(weights.assign, original.simple_slots(network), state, "file")
    assert "arrays do not match the network, whose names have the prefix 'net.' in the file" in words


def test_long_lists_are_cut_by_kind():
    network = original.simple_unet(simple())
    words = message(weights.assign, original.simple_slots(network), {"a": np.ones(3, "float32")}, "file")
    count = len(simple())
    assert f"file: {count + 1} arrays do not match" in words
    assert f"\n  missing: {count - weights.LISTED} more" in words
    assert "\n  not expected: a (3,)" in words
    assert len(words.splitlines()) == weights.LISTED + 3
