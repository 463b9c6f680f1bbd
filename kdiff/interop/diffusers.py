"""diffusers' folders: `load` makes a network or a model of one, `save` writes one that diffusers reads.

    network = load("ddpm-cifar10/unet")     # config.json, diffusion_pytorch_model.safetensors
    model = load("ddpm-cifar10")            # model_index.json, unet/, scheduler/
    images = model.sample(16)
    save(model, "mine")                         # diffusers.DDPMPipeline.from_pretrained("mine")

    process = load_scheduler("sd-turbo")        # a schedule, a prediction, a time label and a sampler
    model = DiffusionModel(network, **process._asdict())

A network takes what it took there, channels last: `network({"image": x, "time": t})`. A model has the schedule, the
prediction and the sampler of its scheduler. A pipeline on latents gives latents: its autoencoder is not loaded, nor is
its text encoder; the condition "context" takes what that gives.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import keras

from kdiff.interop import saving, schedulers, transformers, unets
from kdiff.interop.configs import Described, explained, kind
from kdiff.interop.files import read_folder, read_json, write_json, write_safetensors
from kdiff.interop.scheduler_saving import scheduler_config
from kdiff.interop.weights import Slot, export, fill
from kdiff.model import DiffusionModel

__all__ = [
    "AUTOENCODERS",
    "MODELS",
    "NETWORKS",
    "SCHEDULER",
    "Model",
    "load",
    "load_scheduler",
    "save",
    "save_scheduler",
]


class Model(NamedTuple):
    """How one class of diffusers is translated.

    Attributes:
        network: the network and the shapes of its inputs, from the configuration and its source.
        slots: the names of its weights.
    """

    network: Callable[[dict[str, Any], Any], Described]
    slots: Callable[[keras.Model], Iterator[Slot]]


MODELS = {
    "UNet2DModel": Model(unets.unet_2d, unets.unet_slots),
    "UNet2DConditionModel": Model(unets.unet_2d_condition, unets.unet_slots),
    "DiTTransformer2DModel": Model(transformers.dit, transformers.dit_slots),
    "Transformer2DModel": Model(transformers.dit, transformers.dit_slots),  # DiT's, in older files
}
NETWORKS = ("unet", "transformer")
SCHEDULER = "scheduler_config.json"
AUTOENCODERS = ("vae", "vqvae", "movq")


def load(folder: str | Path, strict: bool = True, **options: Any) -> keras.Model:
    """What a folder of diffusers holds.

    Args:
        folder: of a model, with `config.json`, which makes a network; or of a pipeline, with `model_index.json`, which
            makes a `DiffusionModel` whose `sample` is by the pipeline's scheduler.
        strict: whether weights that do not match are an error; otherwise a warning.
        options: for a pipeline, arguments of `DiffusionModel`, in place of what the folder says; such as `ema`, which
            is None if not given.

    Raises:
        ValueError: if a file is missing or damaged; if a configuration says what kdiff cannot do; if the weights do
            not match, with a list of all that do not.
    """
    folder = Path(folder)
    if (folder / "model_index.json").exists():
        return _load_pipeline(folder, strict, options)
    if options:
        raise ValueError(f"{folder}: {sorted(options)} are arguments for a pipeline, and this is a model's folder")
    return _load_network(folder, strict).network


def _load_network(folder: Path, strict: bool) -> Described:
    source = folder / "config.json"
    config = read_json(source)
    model = kind(MODELS, config.get("_class_name"), source, "_class_name")
    with explained(source):
        described = model.network(config, source)
    shapes, state = {"time": (None,), **described.shapes}, unets.renamed(read_folder(folder))
    fill(described.network, shapes, model.slots, state, folder, strict)
    return described


def _load_pipeline(folder: Path, strict: bool, options: dict[str, Any]) -> DiffusionModel:
    index = read_json(folder / "model_index.json")
    parts = [name for name in NETWORKS if name in index]
    if len(parts) != 1:
        raise ValueError(f"{folder}: must have one of {list(NETWORKS)} in `model_index.json`; it has: {sorted(index)}")
    network, shapes = _load_network(folder / parts[0], strict)
    source = folder / "scheduler" / "scheduler_config.json"
    learned = network.out_channels == 2 * shapes["image"][-1]
    process = schedulers.process(read_json(source), source, learned)
    codec = "identity" if any(name in index for name in AUTOENCODERS) else "pixels"
    times = "stratified" if process.schedule.num_steps is None else "discrete"
    model = DiffusionModel(network, **{**process._asdict(), "codec": codec, "times": times, "ema": None, **options})
    model.build(shapes)
    return model


def save(model: keras.Model, folder: str | Path, averages: bool = True) -> None:
    """Writes a folder that diffusers reads.

    Args:
        model: a network, for `from_pretrained` of its class; or a `DiffusionModel`, for that of a pipeline. Of a model
            of latents `unet` or `transformer` and `scheduler` are written; the autoencoder has to be put beside them.
        folder: to write to; files of the same names are replaced.
        averages: whether to write the averaged weights of a model that has them.

    Raises:
        ValueError: if diffusers has no such network, schedule, prediction or sampler.
    """
    folder = Path(folder)
    if not isinstance(model, DiffusionModel):
        _save_network(model, folder, {})
        return
    process = schedulers.Process(model.schedule, model.prediction, model.time_label, model.sampler)
    scheduler = scheduler_config(process)
    averaged = model.averages.pairs(model.network) if model.averages and model.averages.moved else ()
    values = {id(weight): average for weight, average in averaged} if averages else {}
    config = saving.network_config(model.network)
    part = "transformer" if "Transformer" in config["_class_name"] else "unet"
    _save_network(model.network, folder / part, values)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    if config["_class_name"] == "UNet2DModel":
        _save_index(folder, part, config["_class_name"], scheduler["_class_name"])


def _save_network(network: keras.Model, folder: Path, values: dict[int, Any]) -> None:
    config = saving.network_config(network)
    model = MODELS[config["_class_name"]]
    saving.check_same(network, model.network(config, folder).network)
    state = export(model.slots(network), values)
    write_json(folder / "config.json", config)
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", state)


def _save_index(folder: Path, part: str, network: str, scheduler: str) -> None:
    pipeline = "DDIMPipeline" if scheduler == "DDIMScheduler" else "DDPMPipeline"
    write_json(
        folder / "model_index.json",
        {"_class_name": pipeline, part: ["diffusers", network], "scheduler": ["diffusers", scheduler]},
    )


def load_scheduler(path: str | Path, learned: bool = False, tokens: int | None = None) -> schedulers.Process:
    """What a scheduler's file says: a schedule, a prediction, a time label and a sampler.

    Args:
        path: the file; or its folder, with `scheduler_config.json`; or a pipeline's, with the folder `scheduler`.
        learned: whether the network predicts the variance as well.
        tokens: the length of the transformer's sequence, (height / patch) (width / patch), on which the times depend
            where `use_dynamic_shifting` is true.

    Raises:
        ValueError: if the file is missing or damaged, or says what kdiff cannot do.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "scheduler" / SCHEDULER if (path / "scheduler" / SCHEDULER).exists() else path / SCHEDULER
    return schedulers.process(read_json(path), path, learned, tokens)


def save_scheduler(process: Any, path: str | Path) -> None:
    """Writes a file that diffusers' `from_pretrained` of the class reads.

    Args:
        process: what `load_scheduler` gives; or anything that has its four parts, as a `DiffusionModel`.
        path: the file, if it ends in ".json"; or its folder. Files of the same name are replaced.

    Raises:
        ValueError: if diffusers has no such scheduler.
    """
    path = Path(path)
    process = schedulers.Process(*(getattr(process, name) for name in schedulers.Process._fields))
    write_json(path if path.suffix == ".json" else path / SCHEDULER, scheduler_config(process))
