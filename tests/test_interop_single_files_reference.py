"""Stable Diffusion in one file: the weights of diffusers' pipelines under the names of latent diffusion's code.

The names are written here anew, and diffusers' own `from_single_file` must read the files, too.
"""

import os
import re

import numpy as np
import pytest
from keras import ops

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from kdiff import predictions
from kdiff.interop import diffusers as interop
from kdiff.interop import maps, prompts, schedulers, single_files, tokenizers
from tests.test_interop_prompts_reference import LENGTH, TABLE, TEXTS, check, embeddings, perturbed, text_encoder, words
from tests.toys import mostly_once

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # diffusers mixes NumPy 2 and tensors
    pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks.*"),
]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TOLERANCE = 1e-5
SIZE, LATENTS = 16, 8
UNET = {"sample_size": LATENTS, "layers_per_block": 1, "norm_num_groups": 32}
VAE = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
}
CLIP = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "eos_token_id": 2}
OPEN_CLIP = {**CLIP, "hidden_act": "gelu", "projection_dim": 96}
SPREAD = {name: value for name, value in TABLE.items() if name.startswith("beta")} | {"steps_offset": 1}


def unet(widths, plain, **options):
    """`plain`: which levels have no attention."""
    kinds = ["" if level in plain else "CrossAttn" for level in range(len(widths))]
    options |= {"down_block_types": [f"{one}DownBlock2D" for one in kinds]}
    options |= {"up_block_types": [f"{one}UpBlock2D" for one in kinds[::-1]], "block_out_channels": widths}
    return perturbed(diffusers.UNet2DConditionModel(**{**UNET, **options}))


def plain(folder, network, scheduler, padding, kind="", **text):
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return getattr(diffusers, f"StableDiffusion{kind}Pipeline")(
        vae=perturbed(diffusers.AutoencoderKL(**VAE)),
        text_encoder=text_encoder(**text),
        tokenizer=words(folder / "words", padding),
        unet=network,
        scheduler=scheduler,
        **parts,
    )


def sd_1(folder, kind="", channels=4):
    network = unet((32, 32, 64), {2}, cross_attention_dim=128, attention_head_dim=8, in_channels=channels)
    return plain(folder, network, diffusers.PNDMScheduler(**SPREAD, skip_prk_steps=True), "<|endoftext|>", kind, **CLIP)


def inpaint(folder):
    return sd_1(folder, "Inpaint", 9)


def sd_2(folder):
    network = unet(
        (64, 64, 128), {2}, cross_attention_dim=128, attention_head_dim=(1, 1, 2), use_linear_projection=True
    )
    scheduler = diffusers.DDIMScheduler(**TABLE, prediction_type="v_prediction")
    return plain(folder, network, scheduler, "!", **{**OPEN_CLIP, "num_hidden_layers": 23})


def xl_unet(widths, plain, heads, **options):
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256, "use_linear_projection": True}
    return unet(widths, plain, attention_head_dim=heads, **added, **options)


def xl(folder):
    return diffusers.StableDiffusionXLPipeline(
        vae=perturbed(diffusers.AutoencoderKL(**VAE, scaling_factor=0.13025)),
        text_encoder=text_encoder(**{**CLIP, "hidden_size": 64, "num_attention_heads": 1}),  # diffusers looks at widths
        text_encoder_2=text_encoder("CLIPTextModelWithProjection", **OPEN_CLIP),
        tokenizer=words(folder / "words", "<|endoftext|>"),
        tokenizer_2=words(folder / "words_2", "!"),
        unet=xl_unet(
            (64, 64, 128),
            {0},
            (1, 1, 2),
            layers_per_block=2,
            cross_attention_dim=64 + 128,
            transformer_layers_per_block=(1, 1, 2),
            projection_class_embeddings_input_dim=6 * 256 + 96,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(**SPREAD, timestep_spacing="leading"),
        add_watermarker=False,
    )


def refiner(folder):
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=perturbed(diffusers.AutoencoderKL(**VAE, scaling_factor=0.13025)),
        text_encoder=None,
        text_encoder_2=text_encoder("CLIPTextModelWithProjection", **{**OPEN_CLIP, "projection_dim": 128}),
        tokenizer=None,
        tokenizer_2=words(folder / "words", "!"),
        unet=xl_unet(
            (64, 64, 64),
            {0, 2},
            1,
            cross_attention_dim=128,
            transformer_layers_per_block=2,
            projection_class_embeddings_input_dim=5 * 256 + 128,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(**SPREAD, timestep_spacing="leading"),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


PIPELINES = {"xl": xl, "sd_1": sd_1, "sd_2": sd_2, "refiner": refiner, "inpaint": inpaint}


# --- the names of latent diffusion

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_in_ldm(model):
    names, count = set(model.state_dict()), model.config.layers_per_block + 1
    state = {}
    for name, tensor in model.state_dict().items():
        path, kind = name.rsplit(".", 1)
        found = re.match(r"(down|up|mid)_blocks?\.(?:(\d+)\.)?(resnets|attentions|\w+samplers)\.(\d+)\.(.*)", path)
        if found is None:
            new = ENDS[path]
        else:
            way, level, what, number, rest = found.groups()
            level, number = int(level or 0), int(number)
            rest = RESNET.get(rest, rest)
            if way == "mid":
                new = f"middle_block.{2 * number if what == 'resnets' else 1}.{rest}"
            elif what == "downsamplers":
                new = f"input_blocks.{count * (level + 1)}.0.op"
            elif what == "upsamplers":
                after = any(one.startswith(f"up_blocks.{level}.attentions") for one in names)
                new = f"output_blocks.{count * level + count - 1}.{1 + after}.conv"
            else:
                block = (
                    f"input_blocks.{count * level + number + 1}"
                    if way == "down"
                    else f"output_blocks.{count * level + number}"
                )
                new = f"{block}.{int(what == 'attentions')}.{rest}"
        state[f"{new}.{kind}"] = tensor
    return state


def vae_in_ldm(model):
    state, last = {}, len(model.config.block_out_channels) - 1
    for name, tensor in model.state_dict().items():
        new = re.sub(r"encoder\.down_blocks\.", "encoder.down.", name)
        new = re.sub(r"decoder\.up_blocks\.(\d)", lambda one: f"decoder.up.{last - int(one[1])}", new)
        new = re.sub(r"(down|up)samplers\.0\.", r"\1sample.", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda one: f"mid.block_{1 + int(one[1])}", new)
        new = new.replace("mid_block.attentions.0", "mid.attn_1").replace("resnets", "block")
        new = new.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "attn_1" in new:
            new = new.replace("group_norm", "norm").replace("to_out.0", "proj_out")
            new = re.sub(r"to_([qkv])\.", r"\1.", new)
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        state[new] = tensor
    return state


def without_wrapper(model):
    return {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}


def open_clip(model, last=False):
    """`last`: with one block more, and a projection, as version 2 has them and does not use them."""
    theirs = without_wrapper(model)
    depth, width = model.config.num_hidden_layers, model.config.hidden_size
    state = {
        "token_embedding.weight": theirs["embeddings.token_embedding.weight"],
        "positional_embedding": theirs["embeddings.position_embedding.weight"],
        "ln_final.weight": theirs["final_layer_norm.weight"],
        "ln_final.bias": theirs["final_layer_norm.bias"],
        "logit_scale": torch.tensor(4.6),
        "text_projection": torch.ones(width, 48) if last else theirs["text_projection.weight"].T.contiguous(),
    }
    layers = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    layers["self_attn.out_proj"] = "attn.out_proj"
    for i in range(depth):
        here, there = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            state |= {f"{there}{new}.{kind}": theirs[f"{here}{old}.{kind}"] for old, new in layers.items()}
            parts = [theirs[f"{here}self_attn.{one}_proj.{kind}"] for one in "qkv"]
            state[f"{there}attn.in_proj_{kind}"] = torch.cat(parts)
    if last:
        old, new = f"resblocks.{depth - 1}.", f"resblocks.{depth}."
        state |= {name.replace(old, new): torch.ones_like(one) for name, one in state.items() if old in name}
    return state


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def whole(pipeline, name):
    """The state dict of the file, with some of what else there is in those that people have."""
    state = prefixed("model.diffusion_model.", unet_in_ldm(pipeline.unet))
    state |= prefixed("first_stage_model.", vae_in_ldm(pipeline.vae))
    if name == "sd_2":
        state |= prefixed("cond_stage_model.model.", open_clip(pipeline.text_encoder, last=True))
    elif name == "xl":
        state |= prefixed("conditioner.embedders.0.transformer.text_model.", without_wrapper(pipeline.text_encoder))
        state |= prefixed("conditioner.embedders.1.model.", open_clip(pipeline.text_encoder_2))
        state["denoiser.sigmas"] = torch.ones(1000)
    elif name == "refiner":
        state |= prefixed("conditioner.embedders.0.model.", open_clip(pipeline.text_encoder_2))
    else:
        inner = "cond_stage_model.transformer.text_model."
        state |= prefixed(inner, without_wrapper(pipeline.text_encoder))
        state[f"{inner}embeddings.position_ids"] = torch.arange(LENGTH)[None]
        constants = ("betas", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef1", "log_one_minus_alphas_cumprod")
        state |= {one: torch.ones(1000) for one in ("alphas_cumprod", "alphas_cumprod_prev", *constants)}
        state |= {"model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.ones((), dtype=torch.int64)}
    return {key: tensor.contiguous().clone() for key, tensor in state.items()}


def written(state, file):
    from safetensors.torch import save_file

    if file.suffix == ".ckpt":
        torch.save({"state_dict": state, "global_step": 470000, "callbacks": {object: {"best": None}}}, file)
    else:
        save_file(state, file)
    return file


class Case:
    def __init__(self, name, folder):
        self.name = name
        made = PIPELINES[name](folder)
        made.save_pretrained(folder / "saved")
        self.folder = folder / "saved"
        self.state = whole(made, name)
        self.file = written(self.state, folder / "any.safetensors")
        self.pipeline = made
        self.options = {"velocity": True} if name == "sd_2" else {}
        self.options["tokenizer"] = self.folder / ("tokenizer_2" if name == "refiner" else "tokenizer")

    def load(self, source=None, **options):
        return single_files.load(source or self.file, **{"image_size": SIZE, **self.options, **options})


@pytest.fixture(scope="module", params=mostly_once(PIPELINES, everywhere=1))
def case(request, tmp_path_factory):
    made = Case(request.param, tmp_path_factory.mktemp(request.param))
    pickled = written(made.state, made.file.with_suffix(".ckpt")) if made.name == "sd_1" else None  # not diffusers'
    made.model = made.load(pickled)
    return made


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return Case("sd_1", tmp_path_factory.mktemp("first"))


def same_weights(ours, theirs):
    for one, other in zip(ours.weights, theirs.weights, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(one), ops.convert_to_numpy(other), one.path)


@pytest.mark.once
def test_it_is_the_model_of_the_folder(case):
    """Weight for weight, with its process, its inputs and its tokens."""
    theirs = interop.load(case.folder)
    ours = case.model
    same_weights(ours.network, theirs.network)
    same_weights(ours.codec.autoencoder, theirs.codec.autoencoder)
    for part in ("schedule", "prediction", "time_label", "sampler"):
        assert getattr(ours, part) == getattr(theirs, part), part
    for part in ("scale", "shift", "upcast"):
        assert getattr(ours.codec, part) == getattr(theirs.codec, part), part
    one, other = (prompts.prompt_of(model.network) for model in (ours, theirs))
    assert one.zeros == other.zeros
    for a, b in zip(one.tokenizers, other.tokenizers, strict=True):
        np.testing.assert_array_equal(a(TEXTS), b(TEXTS))
    assert ours.get_build_config() == theirs.get_build_config()


@pytest.mark.once
def test_it_gives_what_diffusers_makes_of_the_file(case):
    """Embeddings, an evaluation of the U-Net, and decoded latents."""
    kind = type(case.pipeline)
    theirs = kind.from_single_file(str(case.file), config=str(case.folder), local_files_only=True)
    prompt = prompts.prompt_of(case.model.network)
    (tokens, vector), _ = embeddings(theirs, TEXTS)
    rows = prompt.prepare(TEXTS)
    check(rows[:, :LENGTH], tokens, TOLERANCE)
    if vector is not None:
        check(rows[:, LENGTH, : prompt.vector], vector, TOLERANCE)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, LATENTS, LATENTS, case.pipeline.unet.config.in_channels)).astype("float32")
    time, numbers = np.array([7.0, 900.0], "float32"), 5 if case.name == "refiner" else 6
    ids = np.tile(np.float32([64, 64, 0, 0, 64, 64])[:numbers], (2, 1))
    inputs, added = {"image": x[..., :4], "time": time, "text": rows}, None
    if case.name == "inpaint":
        inputs |= {"mask_image": x[..., 4:5], "masked_image": x[..., 5:]}
    if vector is not None:
        inputs, added = (
            {**inputs, "time_ids": ids},
            {"text_embeds": torch.tensor(vector), "time_ids": torch.tensor(ids)},
        )
    with torch.no_grad():
        given = torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(time), torch.tensor(tokens)
        wanted = theirs.unet(*given, added_cond_kwargs=added).sample.numpy().transpose(0, 2, 3, 1)
        latents = torch.tensor(x[..., :4].transpose(0, 3, 1, 2))
        images = theirs.vae.decode(latents / theirs.vae.config.scaling_factor).sample.numpy().transpose(0, 2, 3, 1)
    assert min(wanted.std(), images.std()) > 0.05
    check(ops.convert_to_numpy(case.model.network(inputs)), wanted, TOLERANCE)
    check(ops.convert_to_numpy(case.model.codec.decode(x[..., :4])), images.clip(-1.0, 1.0), TOLERANCE)


# --- without diffusers' pipelines: what is told by names and shapes, and errors


@pytest.fixture(scope="module")
def states():
    """U-Nets alone, as a state dict."""
    context = {"cross_attention_dim": 16}
    linear = {**context, "attention_head_dim": 1, "use_linear_projection": True}
    made = {
        "sd_1": unet((32, 64), {1}, attention_head_dim=8, **context),
        "sd_2": unet((64, 64), {1}, **linear),
        "xl": xl_unet((64, 64), {0}, 1, projection_class_embeddings_input_dim=6 * 256 + 8, **context),
    }
    return {name: prefixed("model.diffusion_model.", unet_in_ldm(one)) for name, one in made.items()}


EMPTY = torch.zeros(0)
KINDS = [
    ("sd_1", (), {}, predictions.Noise, 64, "PNDM"),
    ("sd_1", ("v_pred", "ztsnr"), {}, predictions.Velocity, 64, "DDIM"),
    ("sd_2", (), {"velocity": False}, predictions.Noise, 64, "PNDM"),
    ("sd_2", (), {"velocity": True}, predictions.Velocity, 96, "DDIM"),
    ("sd_2", ("v_pred",), {}, predictions.Velocity, 96, "DDIM"),
    ("xl", (), {}, predictions.Noise, 128, "Euler"),
    ("xl", ("v_pred", "ztsnr"), {}, predictions.Velocity, 128, "Euler"),
    (
        "xl",
        ("v_pred", "ztsnr"),
        {"velocity": False, "zero_snr": False, "image_size": 64},
        predictions.Noise,
        8,
        "Euler",
    ),
]


@pytest.mark.once
@pytest.mark.parametrize(("name", "keys", "options", "prediction", "size", "solver"), KINDS)
def test_the_kind_is_told(states, name, keys, options, prediction, size, solver):
    """The betas are as diffusers' scheduler has them, and so is whether the first step knows of the data."""
    model = single_files.load({**states[name], **dict.fromkeys(keys, EMPTY)}, **options)
    assert type(model.prediction) is prediction
    context = {"context": (None, None, 16), "text_embeds": (None, 8), "time_ids": (None, 6)}
    context = context if name == "xl" else {"context": (None, None, 16)}
    shapes = maps.input_shapes(model.network)
    assert shapes == {"image": (None, size, size, 4), "time": (None,), **context}
    classes = {"PNDM": "PNDMScheduler", "DDIM": "DDIMScheduler", "Euler": "EulerDiscreteScheduler"}
    zero = "ztsnr" in keys and options.get("zero_snr", True)
    told = {"prediction_type": "v_prediction" if prediction is predictions.Velocity else "epsilon"}
    told |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero else {}
    told |= {"PNDM": {"skip_prk_steps": True}, "DDIM": {"set_alpha_to_one": False, "clip_sample": False}}.get(
        solver, {}
    )
    told = {"timestep_spacing": "leading", **told} if solver == "Euler" else told
    theirs = getattr(diffusers, classes[solver])(**SPREAD, **told)
    process = schedulers.process({**theirs.config, "_class_name": classes[solver]}, "test")
    assert (process.schedule, process.sampler) == (model.schedule, model.sampler)
    at = model.schedule.at(np.float32([1e-3, 0.5, 1.0]))
    wanted = theirs.alphas_cumprod[[0, 499, 999]].numpy()
    np.testing.assert_allclose(ops.convert_to_numpy(at.alpha) ** 2, wanted, rtol=1e-3, atol=1e-6)
    assert (float(at.alpha[-1]) < 1e-3) == zero


@pytest.mark.once
def test_version_2_must_say_what_it_predicts(states):
    with pytest.raises(ValueError, match=r"the state dict: .* Stable Diffusion 2, .*; give `velocity=True`"):
        single_files.load(states["sd_2"])
    key = "model.diffusion_model.input_blocks.0.0.weight"
    inpaint = {**states["sd_2"], key: torch.randn(64, 9, 3, 3)}
    assert type(single_files.load(inpaint).prediction) is predictions.Noise


@pytest.mark.once
def test_averages(states):
    """Those of `LitEma`, under names without dots, in place of the others."""
    plain = states["sd_1"]
    averages = {"model_ema." + name.removeprefix("model.").replace(".", ""): one + 1.0 for name, one in plain.items()}
    both = {**plain, **averages, "model_ema.decay": torch.ones(())}
    given = single_files.load(both), single_files.load(both, ema=False), single_files.load(plain)
    found, without, wanted = (ops.convert_to_numpy(model.network.head.kernel) for model in given)
    np.testing.assert_array_equal(without, wanted)
    np.testing.assert_allclose(found, wanted + 1.0, rtol=1e-6)
    del both["model_ema.diffusion_modelout2weight"]
    with pytest.raises(ValueError, match=r"missing: model_ema\.diffusion_modelout2weight"):
        single_files.load(both)


U, V, T = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."
WRONG = {
    f"missing: {U}out.0.bias": {f"{U}out.0.bias": None},
    f"`{U}out.2.weight` is missing": {f"{U}out.2.weight": None},
    f"shape: {U}time_embed.2.bias is (7,)": {f"{U}time_embed.2.bias": torch.zeros(7)},
    f"not finite: {U}middle_block.1.norm.weight": {f"{U}middle_block.1.norm.weight": torch.full((64,), torch.nan)},
    "not expected: control_model.input_blocks.0.0.weight (3,)": {
        "control_model.input_blocks.0.0.weight": torch.ones(3)
    },
    "not expected: edm_mean (4,)": {"edm_mean": torch.ones(4)},
    f"[0, 1, 4, 5] more input than output channels; received: 7 in (`{U}input": {
        f"{U}input_blocks.0.0.weight": torch.ones(32, 7, 3, 3)
    },
    f"missing: {V}quant_conv.bias": {f"{V}quant_conv.bias": None},
    f"shape: {V}decoder.conv_in.bias is (3,)": {f"{V}decoder.conv_in.bias": torch.zeros(3)},
    f"missing: {T}encoder.layers.1.mlp.fc1.bias": {f"{T}encoder.layers.1.mlp.fc1.bias": None},
    f"`{T}embeddings.token_embedding.weight` is missing": {f"{T}embeddings.token_embedding.weight": None},
    f"not expected: {T}encoder.layers.0.mlp.fc3.bias (2,)": {f"{T}encoder.layers.0.mlp.fc3.bias": torch.ones(2)},
}


@pytest.mark.once
@pytest.mark.parametrize("message", WRONG)
def test_an_error_names_file_and_key(first, tmp_path, message):
    changed = {**first.state, **WRONG[message]}
    file = written({name: one for name, one in changed.items() if one is not None}, tmp_path / "changed.safetensors")
    with pytest.raises(ValueError, match=rf"(?s)^{re.escape(str(file))}: .*{re.escape(message)}"):
        first.load(file)


@pytest.mark.once
def test_other_files_are_refused(first, states, tmp_path):
    flux = {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=r"not a single file of Stable Diffusion.* of Flux"):
        single_files.load(flux)
    with pytest.raises(ValueError, match=r"no text encoder was found under \['cond_stage_model\."):
        single_files.load(states["sd_1"], first.options["tokenizer"])
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(first.file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"damaged\.safetensors: not a complete safetensors file"):
        first.load(damaged)
    with pytest.warns(UserWarning, match=r"not expected: edm_mean"):
        single_files.load({**states["sd_1"], "edm_mean": torch.ones(4)}, strict=False)


@pytest.mark.once
def test_strings_in_images_out_and_a_folder_of_it(first, tmp_path):
    """A list of tokenizers is used as it is; what is loaded is saved as a folder that diffusers reads."""
    given = tokenizers.load(first.options["tokenizer"])
    model = first.load(tokenizer=[given])
    assert prompts.prompt_of(model.network).tokenizers == [given]
    images = model.sample(2, text=TEXTS, guidance=4.0, steps=2)
    assert images.shape == (2, SIZE, SIZE, 3)
    assert np.isfinite(images).all()
    interop.save(model, tmp_path)
    saved = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet").state_dict()
    for name, tensor in first.pipeline.unet.state_dict().items():
        assert torch.equal(saved[name].reshape(tensor.shape), tensor), name
    assert (tmp_path / "text_encoder" / "model.safetensors").exists()


@pytest.mark.once
def test_clip_skip(first):
    """In place of that of diffusers' pipeline, which fails at it with transformers 5."""
    prompt = prompts.prompt_of(first.load(clip_skip=1).network)
    wanted = prompts.load(first.folder, {"_class_name": "StableDiffusionPipeline", "text_encoder": ["a", "b"]}, skip=1)
    np.testing.assert_array_equal(prompt.prepare(TEXTS), wanted.prepare(TEXTS))


@pytest.mark.once
def test_padded(tmp_path):
    """As if the folder had said so: "!" is found in a text where it fills up, and there alone."""
    words(tmp_path / "end", "<|endoftext|>").save_pretrained(tmp_path / "end")
    words(tmp_path / "mark", "!").save_pretrained(tmp_path / "mark")
    end, mark = (tokenizers.load(tmp_path / name) for name in ("end", "mark"))
    for made, wanted in (
        (tokenizers.padded(end, 0), mark),
        (tokenizers.padded(mark, end.padding), end),
        (tokenizers.padded(end, end.padding), end),
    ):
        np.testing.assert_array_equal(made(TEXTS), wanted(TEXTS))
    assert not np.array_equal(end(TEXTS), mark(TEXTS))
    with pytest.raises(ValueError, match="the id of one of 56 tokens is expected; received: 99"):
        tokenizers.padded(end, 99)
