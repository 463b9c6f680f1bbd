"""Files and folders that the loaders do not support, described in one line each, for error messages with advice.

Tables are searched in order, and the first match is used.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

__all__ = ["ENDINGS", "FOLDERS", "NAMES", "about_file", "about_folder", "about_names", "check_is_itself", "listing"]

_ONE_FILE = "kdiff.interop.single_files reads Stable Diffusion 1, 2, XL and 3"
_FLAX = "weights of Flax; diffusers' `from_pretrained(folder, from_flax=True)` and `save_pretrained` convert them"
# By a pattern in the names of arrays.
NAMES = {
    r"lora_(up|down|A|B)\b|\.lora\.|hada_w\d": "those of a LoRA: changes of the weights of another model",
    r"^(model\.diffusion_model\.)?(double_blocks|single_blocks)\b": "those of the transformer of Flux",
    r"^joint_blocks\b": f"those of the transformer of Stable Diffusion 3, in one file without its prefix; {_ONE_FILE}",
    r"^transformer_blocks\.0\.ff_context\b": "those of Stable Diffusion 3's transformer, in the layout of diffusers",
    r"^model\.diffusion_model\.": f"those of Stable Diffusion in one file; {_ONE_FILE}",
    r"^(controlnet_|input_hint_block\.)": "those of a ControlNet",
    r"^(emb_params|string_to_param)": "those of a textual inversion: vectors for new words of a text encoder",
    r"^(model\.)?(init_conv\.|downs\.\d+\.\d+\.(block1|fn)\.)": "those of denoising-diffusion-pytorch's U-Net, whose "
    "linear attention kdiff's networks do not have; train one of kdiff.networks instead",
    r"^all_modules\.\d+\.": "those of score_sde_pytorch's networks, which number their layers; diffusers has some of "
    "them as folders, such as google/ncsnpp-ffhq-256",
    r"^(model\.)?(enc|dec)\.\d+x\d+_": "those of EDM's networks (NVlabs)",
    r"\.(absmax|quant_state|SCB|qweight|scale_weight|weight_scale)\b": "quantised values with scales, from "
    "another library; use the original weights",
}
# By the suffix of a file.
ENDINGS = {
    ".h5": "weights of Keras (`model.load_weights`) or of keras-cv",
    ".keras": "a full model of Keras: `keras.saving.load_model` reads it",
    ".onnx": "ONNX, a compiled graph",
    ".msgpack": _FLAX,
    ".gguf": "GGUF, quantised weights",
    ".pkl": "a pickle of arbitrary Python objects; save its `state_dict()` with `torch.save` to a `.pt` file",
    ".zip": "an archive; unpack it",
}
# By the files in a folder.
FOLDERS = {
    "pytorch_lora_weights.*": "a LoRA, changes of another model's weights; `interop.lora.load(model, folder)` adds it",
    "adapter_config.json": "an adapter of PEFT: changes of the weights of another model",
    "learned_embeds.*": "a textual inversion: vectors for new words of a text encoder",
    "*.onnx": "ONNX, a compiled graph",
    "*/model.onnx": "ONNX, compiled graphs",
    "openvino_*.xml": "OpenVINO, a compiled graph",
    "*/openvino_*.xml": "OpenVINO, compiled graphs",
    "*.msgpack": _FLAX,
    "model.weights.h5": "a preset of KerasHub or weights of Keras",
    "*.keras": "a full model of Keras: `keras.saving.load_model` reads it",
    "*.h5": "weights of Keras or of keras-cv",
    "saved_model.pb": "a SavedModel of TensorFlow",
    "random_states_*.pkl": "a checkpoint of training by Accelerate; its weights are in `{inner}`",
    "checkpoint-*": "the output of a training script; load a folder with `model_index.json` or `config.json`",
    "tokenizer_config.json": "a tokenizer, which has no weights",
    "scheduler_config.json": "a scheduler, which has no weights",
    "preprocessor_config.json": "an image processor, which has no weights",
    "*.gguf": "GGUF, quantised weights",
    "*.ckpt": f"a model in one file; {_ONE_FILE}",
    "*/config.json": "a folder of models without `model_index.json`; load one of {inner}",
}
_LFS = b"version https://git-lfs"
_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def about_names(names: Iterable[str]) -> str:
    """A description of weights with such names, as the end of a sentence; or ""."""
    names = list(names)
    words = (words for pattern, words in NAMES.items() if any(re.search(pattern, name) for name in names))
    return next((f"; by their names they are {one}" for one in words), "")


def about_file(path: Path) -> str:
    """A description of a file with such a name, as the end of a sentence; or ""."""
    return f"; this is {ENDINGS[path.suffix]}" if path.suffix in ENDINGS else ""


def about_folder(folder: Path) -> str:
    """A description of a folder with such files, as the end of a sentence; or ""."""
    kinds = _architectures(folder / "config.json")
    if kinds:
        return f"; this is a model of transformers, {kinds}"
    for pattern, words in FOLDERS.items():
        if any(folder.glob(pattern)):
            inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
            return f"; this is {words.format(inner=inner or 'model.safetensors')}"
    return ""


def _architectures(path: Path) -> str:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return ", ".join(config.get("architectures") or ())
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):  # missing, or not such a file
        return ""


def check_is_itself(path: Path) -> None:
    """Raises a ValueError if a file is missing, with what was found, or is only a pointer of git-LFS."""
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise ValueError(
                    f"{path}: the file is only a pointer of git-LFS; `git lfs pull` in its folder fetches it"
                )
        return
    folder = path.parent
    if folder.is_file():
        ending = about_file(folder) or "; use kdiff.interop.original or single_files for a single file of weights"
        raise ValueError(f"{folder}: must be a folder; it is a file{ending}")
    if not folder.exists():
        name = folder.as_posix()
        fetch = f"from huggingface_hub import snapshot_download; folder = snapshot_download({name!r})"
        hint = (
            f"; kdiff downloads nothing. If this is a name on the Hugging Face hub: {fetch}"
            if _HUB.fullmatch(name)
            else ""
        )
        raise ValueError(f"{path}: neither the file nor its folder exists{hint}")
    raise ValueError(f"{path}: no such file; its folder holds: {listing(folder)}{about_folder(folder)}")


def listing(folder: Path) -> list[str]:
    """The names in a folder, at most twenty."""
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return [*names[:20], f"... {len(names) - 20} more"] if len(names) > 20 else names
