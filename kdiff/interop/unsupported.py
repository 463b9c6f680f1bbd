"""What files and folders are that kdiff's loaders do not take, in a line each, for errors that say what to do.

All tables are read in order, and the first that fits is said.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

__all__ = ["ENDINGS", "FOLDERS", "NAMES", "about_file", "about_folder", "about_names", "check_is_itself", "listing"]

_ONE_FILE = "kdiff.interop.single_files reads Stable Diffusion 1, 2, XL and 3"
_FLAX = "Flax's weights; diffusers' `from_pretrained(folder, from_flax=True)` and `save_pretrained` convert them"
# By a pattern of the names of arrays.
NAMES = {
    r"lora_(up|down|A|B)\b|\.lora\.|hada_w\d": "a LoRA's: changes of another model's weights",
    r"^(model\.diffusion_model\.)?(double_blocks|single_blocks)\b": "those of the transformer of Flux",
    r"^joint_blocks\b": f"those of the transformer of Stable Diffusion 3, of one file without its prefix; {_ONE_FILE}",
    r"^transformer_blocks\.0\.ff_context\b": "those of the transformer of Stable Diffusion 3, as diffusers has them",
    r"^model\.diffusion_model\.": f"those of Stable Diffusion in one file; {_ONE_FILE}",
    r"^(controlnet_|input_hint_block\.)": "a ControlNet's",
    r"^(emb_params|string_to_param)": "a textual inversion's: vectors for new words of a text encoder",
    r"^(model\.)?(init_conv\.|downs\.\d+\.\d+\.(block1|fn)\.)": "those of denoising-diffusion-pytorch's U-Net, whose "
    "linear attention kdiff's networks do not have; train one of kdiff.networks instead",
    r"^all_modules\.\d+\.": "those of score_sde_pytorch's networks, which number their layers; diffusers has some of "
    "them as folders, such as google/ncsnpp-ffhq-256",
    r"^(model\.)?(enc|dec)\.\d+x\d+_": "those of EDM's networks (NVlabs)",
    r"\.(absmax|quant_state|SCB|qweight|scale_weight|weight_scale)\b": "numbers with scales beside them, quantised by "
    "another library; use the weights as they were before",
}
# By the end of a file's name.
ENDINGS = {
    ".h5": "weights of Keras (`model.load_weights`) or of keras-cv",
    ".keras": "a whole model of Keras: `keras.saving.load_model` reads it",
    ".onnx": "ONNX, a compiled graph",
    ".msgpack": _FLAX,
    ".gguf": "GGUF, quantised weights",
    ".pkl": "a pickle of any Python objects; save its `state_dict()` with `torch.save` to a `.pt` file",
    ".zip": "an archive; unpack it",
}
# By files that a folder has.
FOLDERS = {
    "pytorch_lora_weights.*": "a LoRA: changes of another model's weights; `interop.lora.load(model, folder)` adds it",
    "adapter_config.json": "PEFT's adapter: changes of another model's weights",
    "learned_embeds.*": "a textual inversion: vectors for new words of a text encoder",
    "*.onnx": "ONNX, a compiled graph",
    "*/model.onnx": "ONNX, compiled graphs",
    "openvino_*.xml": "OpenVINO, a compiled graph",
    "*/openvino_*.xml": "OpenVINO, compiled graphs",
    "*.msgpack": _FLAX,
    "model.weights.h5": "a preset of KerasHub or weights of Keras",
    "*.keras": "a whole model of Keras: `keras.saving.load_model` reads it",
    "*.h5": "weights of Keras or of keras-cv",
    "saved_model.pb": "a SavedModel of TensorFlow",
    "random_states_*.pkl": "a checkpoint of training by Accelerate; its weights are those in `{inner}`",
    "checkpoint-*": "the output of a training script; load a folder with `model_index.json` or `config.json`",
    "tokenizer_config.json": "a tokenizer, which has no weights",
    "scheduler_config.json": "a scheduler, which has no weights",
    "preprocessor_config.json": "a processor of images, which has no weights",
    "*.gguf": "GGUF, quantised weights",
    "*.ckpt": f"a model in one file; {_ONE_FILE}",
    "*/config.json": "a folder of models without `model_index.json`; load one of {inner}",
}
_LFS = b"version https://git-lfs"
_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def about_names(names: Iterable[str]) -> str:
    """What weights with such names are, to go on with "; they look like"; or nothing."""
    names = list(names)
    words = (words for pattern, words in NAMES.items() if any(re.search(pattern, name) for name in names))
    return next((f"; by their names they are {one}" for one in words), "")


def about_file(path: Path) -> str:
    """What a file with such a name is, as the end of a sentence; or nothing."""
    return f"; this is {ENDINGS[path.suffix]}" if path.suffix in ENDINGS else ""


def about_folder(folder: Path) -> str:
    """What a folder with such files is, as the end of a sentence; or nothing."""
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
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):  # not there, or no such file
        return ""


def check_is_itself(path: Path) -> None:
    """Raises a ValueError for a file that is not there, with what is there, or is but a pointer to itself elsewhere."""
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise ValueError(
                    f"{path}: a pointer of git-LFS stands in place of the file; `git lfs pull` in its folder fetches it"
                )
        return
    folder = path.parent
    if folder.is_file():
        ending = about_file(folder) or "; a file of weights alone is read by kdiff.interop.original, or single_files"
        raise ValueError(f"{folder}: must be a folder; it is a file{ending}")
    if not folder.exists():
        name = folder.as_posix()
        fetch = f"from huggingface_hub import snapshot_download; folder = snapshot_download({name!r})"
        hint = (
            f"; kdiff fetches nothing. If this is a name on the Hugging Face hub: {fetch}"
            if _HUB.fullmatch(name)
            else ""
        )
        raise ValueError(f"{path}: no such file, nor its folder{hint}")
    raise ValueError(f"{path}: no such file; its folder holds: {listing(folder)}{about_folder(folder)}")


def listing(folder: Path) -> list[str]:
    """The names in a folder, at most twenty."""
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return [*names[:20], f"... {len(names) - 20} more"] if len(names) > 20 else names
