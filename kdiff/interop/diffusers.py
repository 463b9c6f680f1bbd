"""Folders of diffusers: `load` reads a network or a model, `save` writes one that diffusers reads.

    network = load("ddpm-cifar10/unet")     # config.json, diffusion_pytorch_model.safetensors
    model = load("ddpm-cifar10")            # model_index.json, unet/, scheduler/
    images = model.sample(16)
    save(model, "mine")                         # diffusers.DDPMPipeline.from_pretrained("mine")

    process = load_scheduler("sd-turbo")        # a schedule, a prediction, a time label and a sampler
    model = DiffusionModel(network, **process._asdict())

A network has the inputs that it has in diffusers, channels last: `network({"image": x, "time": t})`. A model has the
schedule, the prediction and the sampler of its scheduler, for latents its autoencoder as codec, and the text encoders
of Stable Diffusion and DeepFloyd IF: `model.sample(4, text="a red circle", guidance=7.5)`; for other pipelines
"context" is the output of their encoder. The two stages of IF form one `Cascade([load("IF-I"), load("IF-II")])`. The
folder of an autoencoder alone gives a `codecs.Latent`.

| pipeline of diffusers | further arguments of `sample`, or those that replace the text |
|---|---|
| LatentConsistencyModel | `timestep_cond=8.5`, the guidance scale, an input of the network |
| SD-turbo, SDXL-turbo | no guidance; `steps=1` |
| StableDiffusionXL | `time_ids`, six numbers, by default the size of the samples without a crop; five for the refiner |
| ...Inpaint, of 9 channels | `mask_image`, 1 where it is repainted; `masked_image`, latents: `model.codec.encode` |
| ...Inpaint, of 4 channels | `x=noise, guidance=[ClassifierFree(7.5), Inpaint(picture, mask[::8, ::8], noise)]` |
| ...InstructPix2Pix | `source`, unscaled latents, with `guidance=Successive({"text": 7.5, "source": 1.5})` |
| ...Upscale | `low`, the low-resolution picture, noised at level `label` |
| ...Depth2Img | `depth`, from -1 to 1; and `image`, `strength` |
| ...ImageVariation | `picture`, of any size |
| StableUnCLIPImg2Img | `picture`, of any size; `picture_level`, from 0 to 1, and `picture_noise` may be given |
| StableUnCLIP, UnCLIP, UnCLIPImageVariation, KandinskyV22 | see `UnCLIP` |
| IFSuperResolution | `low`, the low-resolution picture |
| DiT | `label` |

Here a `strength` is a time. diffusers starts at the first of its last int(steps strength) steps, whose time is
`model.sampler.replaced(steps=steps).times(model.schedule)[steps - int(steps * strength)]`.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import keras

from kdiff import deprecated
from kdiff.codecs import Latent, Standard
from kdiff.encoders import Prompt
from kdiff.interop import (
    autoencoders,
    control,
    folders,
    kandinsky,
    maps,
    mmdit,
    priors,
    prompts,
    saving_embeddings,
    saving_networks,
    saving_unclip,
    schedulers,
    stable_unclip,
    transformers,
    unclip,
    unet_names,
    unets,
)
from kdiff.interop.autoencoder_configs import CLASSES, KINDS
from kdiff.interop.configs import Described, explained, kind
from kdiff.interop.files import State, read_json, write_json, write_safetensors
from kdiff.interop.pipelines import pipeline_of
from kdiff.interop.scheduler_saving import scheduler_config
from kdiff.interop.weights import Slot, export, fill
from kdiff.lora import ema_of
from kdiff.model import DiffusionModel
from kdiff.networks import Autoencoder, Controlled, ControlNet
from kdiff.predictions import Noise
from kdiff.sampling import Sampler
from kdiff.times import Index
from kdiff.unclip import UnCLIP

__all__ = [
    "MODELS",
    "MOVQ",
    "SCHEDULER",
    "UNIT_PIXELS",
    "UNIT_SCHEDULERS",
    "Model",
    "assembled",
    "load",
    "load_scheduler",
    "save",
    "save_scheduler",
]


def _nothing(state: State, index: Mapping[str, Any]) -> dict[str, Any]:
    return {}


class Model(NamedTuple):
    """The translation of one class of diffusers.

    Attributes:
        network: the network and the shapes of its inputs, from the configuration, its source and `told`.
        slots: the names of the weights.
        told: options of `network` that are not in the configuration, from the weights and `model_index.json`.
        others: arrays that do not belong to the network.
    """

    network: Callable[..., Described]
    slots: Callable[[keras.Model], Iterator[Slot]]
    told: Callable[[State, Mapping[str, Any]], dict[str, Any]] = _nothing
    others: tuple[str, ...] = ()


MODELS = {
    "UNet2DModel": Model(unets.unet_2d, unet_names.unet_slots),
    "UNet2DConditionModel": Model(unets.unet_2d_condition, unet_names.unet_slots, unets.told),
    "ControlNetModel": Model(control.control_net, control.control_slots),
    "DiTTransformer2DModel": Model(transformers.dit, transformers.dit_slots, transformers.told),
    "SD3Transformer2DModel": Model(mmdit.mmdit, mmdit.mmdit_slots),
    "Transformer2DModel": Model(transformers.dit, transformers.dit_slots, transformers.told),  # DiT's, in older files
    "PriorTransformer": Model(priors.prior, priors.prior_slots, others=priors.OF_CODEC),
}
SCHEDULER, MOVQ = "scheduler_config.json", "movq"

UNIT_SCHEDULERS = ("ScoreSdeVeScheduler",)  # whose networks use pictures in [0, 1], not [-1, 1]
UNIT_PIXELS = Standard(-1.0, 2.0)


def load(
    folder: str | Path,
    strict: bool = True,
    variant: str | None = None,
    text: bool = True,
    clip_skip: int = 0,
    tokens: int | None = None,
    controlnet: control.Controls | None = None,
    prior: str | Path | None = None,
    **options: Any,
) -> keras.Model | Latent:
    """Loads a folder of diffusers.

    Args:
        folder: of a model, with `config.json`, which gives a network (for an autoencoder, a codec); or of a pipeline,
            with `model_index.json`, which gives a `DiffusionModel` that samples by the scheduler of the pipeline; for
            Karlo an `UnCLIP` (`interop.unclip`), with the arguments `strict` and `variant` only; and for a decoder with
            its prior too (`interop.stable_unclip`, `interop.kandinsky`), unless `text` is false.
        strict: whether weights that do not match are an error; otherwise a warning.
        variant: of the weights, such as "fp16" or "non_ema"; None for the file without a variant or, if there is none,
            for the only variant.
        text: whether the text encoders of a pipeline in `prompts.PIPELINES` are loaded; otherwise their outputs are the
            conditions "context" and, for Stable Diffusion XL, "text_embeds".
        clip_skip: the number of final blocks of the text encoders to skip.
        tokens: for a pipeline, as in `load_scheduler`: the times of the sampler are those for samples of that size.
        controlnet: folders of ControlNets for a pipeline with a U-Net, by the names of their pictures: with
            `{"edges": folder}` `sample` accepts `edges=picture`, see `networks.Controlled`. For a single folder the
            name is "control", for a list "control", "control_1" and so on. None for those of the pipeline itself.
        prior: for the decoder of Kandinsky 2.2, the folder of its prior; the result is then an `UnCLIP`.
        options: for a pipeline, arguments of `DiffusionModel` that replace those of the folder; also `ema`, which
            defaults to None.
    Raises:
        ValueError: if a file is missing or damaged; if a configuration is not supported; if the pipeline has a further
            network, such as a T2I-Adapter; if the weights do not match, with a list of all mismatches.
    """
    folder = Path(folder)
    if (folder / "model_index.json").exists():
        index = read_json(folder / "model_index.json")
        if index.get("_class_name") in unclip.PIPELINES:
            return unclip.load(folder, strict, variant)
        prompt = prompts.load(folder, index, clip_skip, variant) if text else None
        if index.get("_class_name") in kandinsky.PRIORS:
            return kandinsky.prior_of(folder, strict, variant)
        before = _before(folder, index, prior, text, strict, variant)
        model = _load_pipeline(folder, strict, variant, options, prompt, tokens, controlnet, before)
        return model if before is None else before.joined(model)
    others = {"tokens": tokens, "controlnet": controlnet, "prior": prior}
    options |= {name: one for name, one in others.items() if one is not None}
    if options:
        raise ValueError(f"{folder}: {sorted(options)} are arguments for a pipeline, but this is the folder of a model")
    if read_json(folder / "config.json").get("_class_name") in KINDS:
        return autoencoders.load(folder, strict, variant)
    return _load_network(folder, strict, variant).network


def _before(folder, index, prior, text, strict, variant) -> unclip.Before | None:
    """The models before the network; without a requested prior, only if the text is loaded."""
    if prior is None and not text:
        return None
    given = None if prior is not None else stable_unclip.before(folder, index, strict, variant)
    return given or kandinsky.before(folder, index, prior, strict, variant)


def _load_network(
    folder: Path,
    strict: bool,
    variant: str | None,
    index: Mapping[str, Any] | None = None,
    prompt: Prompt | None = None,
    before: unclip.Before | None = None,
) -> Described:
    """The network of a folder; its maps concatenated to x_t become conditions if the pipeline is known."""
    source, index = folder / "config.json", index or {}
    config = {name: value for name, value in read_json(source).items() if name not in folders.EMA_NOTES}
    model = kind(MODELS, config.get("_class_name"), source, "_class_name")
    state = unet_names.renamed(folders.read_weights(folder, variant))
    state = {name: array for name, array in state.items() if name not in model.others}
    with explained(source):
        described = model.network(config, source, **model.told(state, index))
        if index:
            beside = _maps_of(index, described, source)
            described = maps.with_maps(described, beside, noise=index.get("noising"))
            state = maps.maps_first(state, index["_class_name"], beside)
        described = described if prompt is None else prompts.conditioned(described, prompt)
        described = described if before is None else before.change(described)
    fill(described.network, {"time": (None,), **described.shapes}, model.slots, state, folder, strict)
    return described


def _maps_of(index: Mapping[str, Any], described: Described, source: Path) -> dict[str, int]:
    inputs, learned = described.shapes["image"][-1], index["learned"]
    return maps.maps_of(index["_class_name"], inputs, described.network.out_channels or inputs, learned, source)


def _load_pipeline(
    folder: Path,
    strict: bool,
    variant: str | None,
    options: dict[str, Any],
    prompt: Prompt | None,
    tokens: int | None,
    controlnet: control.Controls | None,
    before: unclip.Before | None,
) -> DiffusionModel:
    index, source = read_json(folder / "model_index.json"), folders.scheduler_of(folder)
    part, scheduler = folders.check_parts(index, folder), read_json(source)
    learned = str(scheduler.get("variance_type")).startswith("learned")
    about = {"_class_name": "", **index, "learned": learned, "noising": _noising(folder, index)}
    described = _load_network(folders.config_of(folder, part), strict, variant, about, prompt, before)
    learned_too = described.network.out_channels == 2 * described.shapes["image"][-1]
    process = schedulers.process(scheduler, source, learned_too, tokens)
    unit = scheduler["_class_name"] in UNIT_SCHEDULERS
    codec = options["codec"] if "codec" in options else _codec(folder, index, strict, variant)
    codec = UNIT_PIXELS if unit and codec == "pixels" else codec
    pictures = control.folders_of(folder, index, controlnet)
    described = control.with_controls(described, pictures, strict, variant, prompt)
    return assembled(described, process, codec, options)


def _noising(folder: Path, index: Mapping[str, Any]) -> Any:
    """The schedule that noises a picture concatenated to x_t; None if it is not noised."""
    source = folder / maps.NOISING / SCHEDULER
    return load_scheduler(source).schedule if folders.has(index, maps.NOISING) else None


def assembled(
    described: Described, process: schedulers.Process, codec: Any, options: Mapping[str, Any]
) -> DiffusionModel:
    """The model of a network with its weights.

    Args:
        described: the network, and the shapes of its inputs.
        process: its schedule, prediction, time label and sampler.
        codec: the codec of the model; with a `codecs.Latent` the network works on its latents.
        options: arguments of `DiffusionModel` that replace those.
    """
    network, shapes = described
    times = "stratified" if process.schedule.num_steps is None else "discrete"
    model = DiffusionModel(network, **{**process._asdict(), "codec": codec, "times": times, "ema": None, **options})
    if isinstance(model.codec, Latent):
        latents = shapes["image"]
        shapes = {**shapes, "encoded": latents, "image": autoencoders.image_shape(model.codec, latents)}
    model.build(shapes)
    return model


def _codec(folder: Path, index: Mapping[str, Any], strict: bool, variant: str | None) -> Any:
    """The autoencoder of a pipeline; "identity" if it has no folder."""
    parts = [name for name in folders.AUTOENCODERS if folders.has(index, name)]
    if not parts:
        return "pixels"
    part = folder / parts[0]
    if not (part / "config.json").exists():
        return "identity"
    raw = part.name == MOVQ  # pipelines of Kandinsky neither scale nor quantise its latents
    codec = autoencoders.load(part, strict, folders.variant_of(part, variant), **({"scale": 1.0} if raw else {}))
    if raw:
        codec.autoencoder.quantize_latents = False
    return codec


@deprecated.arguments(averages="ema")
def save(model: keras.Model, folder: str | Path, ema: bool = True) -> None:
    """Writes a folder that diffusers reads.

    Args:
        model: a network, for `from_pretrained` of its class; or a `DiffusionModel`, for that of a pipeline: `unet` or
            `transformer`, `scheduler`, the autoencoder, ControlNets and the encoders with their tokenizers. The index
            of the pipeline is written if diffusers has one, by the table of `interop.pipelines`; without it `load`
            cannot recover the names of images concatenated to x_t. A `codecs.Latent` alone is written as its
            autoencoder, and an `UnCLIP` as the pipeline of Karlo, of Stable unCLIP or of Kandinsky 2.2.
        folder: to write to; files of the same names are replaced.
        ema: whether to write averaged weights, if the model has averages that have been updated. In either case a
            kernel with LoRA is written with its change, as after `lora.merge`, and the model is not modified.

    Raises:
        ValueError: if diffusers does not support the network, schedule, prediction or sampler.
    """
    folder = Path(folder)
    if isinstance(model, (Latent, Autoencoder)):
        autoencoders.save(model, folder)
        return
    if isinstance(model, ControlNet):
        control.save(model, folder)
        return
    if isinstance(model, UnCLIP) and not isinstance(model.decoder.codec, Latent):
        saving_unclip.save(model, folder, ema)
        return
    if isinstance(model, UnCLIP):
        saving_embeddings.check(model)
        save(model.decoder, folder, ema)
        saving_embeddings.save_before(model, folder, ema)
        return
    if not isinstance(model, DiffusionModel):
        _save_network(model, folder, {})
        return
    process = schedulers.Process(model.schedule, model.prediction, model.time_label, model.sampler)
    scheduler = scheduler_config(process)
    values = ema_of(model) if ema else {}
    network = model.network.network if isinstance(model.network, Controlled) else model.network
    config = saving_networks.network_config(network)
    part = "transformer" if "Transformer" in config["_class_name"] else "unet"
    _save_network(network, folder / part, values)
    controls = control.save_all(model.network, folder, values)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    parts = {part: ["diffusers", config["_class_name"]], "scheduler": ["diffusers", scheduler["_class_name"]]}
    classes = (config["_class_name"], scheduler["_class_name"])
    index, autoencoder = pipeline_of(network, *classes, model.codec, controlled=bool(controls))
    if isinstance(model.codec, Latent):
        autoencoders.save(model.codec, folder / autoencoder)
        parts[autoencoder] = ["diffusers", CLASSES[type(model.codec.autoencoder)]]
    for noise in (*(one.noise for one in maps.map_conditions(network).values()), saving_embeddings.noise_of(network)):
        if noise is not None:
            added = schedulers.Process(noise, Noise(), Index(), Sampler("ddpm", "leading", noise.num_steps))
            save_scheduler(added, folder / maps.NOISING)
            parts[maps.NOISING] = ["diffusers", read_json(folder / maps.NOISING / SCHEDULER)["_class_name"]]
    parts |= saving_embeddings.save_normalizer(network, folder)
    prompt = prompts.prompt_of(network)
    parts |= {} if prompt is None else prompts.save(prompt, folder)
    if "_class_name" in index:
        write_json(folder / "model_index.json", {**index, **parts, **controls})


def _save_network(network: keras.Model, folder: Path, values: dict[int, Any]) -> None:
    config = saving_networks.network_config(network)
    model, beside = MODELS[config["_class_name"]], maps.channels_of(network)
    state = export(model.slots(network), values)
    again = maps.with_maps(model.network(config, folder, **model.told(state, {})), beside, maps.map_conditions(network))
    prompt = prompts.prompt_of(network)
    again = again if prompt is None else prompts.conditioned(again, prompt)
    again = saving_embeddings.conditioned_as(again, network)
    saving_networks.check_same(network, again.network)
    write_json(folder / "config.json", config)
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", state)


def load_scheduler(path: str | Path, learned: bool = False, tokens: int | None = None) -> schedulers.Process:
    """Reads the file of a scheduler: a schedule, a prediction, a time label and a sampler.

    Args:
        path: the file; or its folder, with `scheduler_config.json`; or that of a pipeline, with the folder `scheduler`.
        learned: whether the network also predicts the variance.
        tokens: the length of the sequence of the transformer, (height / patch) (width / patch), on which the times
            depend if `use_dynamic_shifting` is true.

    Raises:
        ValueError: if the file is missing or damaged, or is not supported.
    """
    path = Path(path)
    if path.is_dir():
        path = folders.scheduler_of(path)
    return schedulers.process(read_json(path), path, learned, tokens)


def save_scheduler(process: Any, path: str | Path) -> None:
    """Writes a file for `from_pretrained` of the diffusers class.

    Args:
        process: the result of `load_scheduler`, or an object with its four parts, such as a `DiffusionModel`.
        path: the file, if it ends in ".json"; or its folder. Files of the same name are replaced.

    Raises:
        ValueError: if diffusers does not support the scheduler.
    """
    path = Path(path)
    process = schedulers.Process(*(getattr(process, name) for name in schedulers.Process._fields))
    write_json(path if path.suffix == ".json" else path / SCHEDULER, scheduler_config(process))
