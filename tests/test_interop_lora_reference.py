"""Files of LoRA of every kind, against diffusers' and transformers' own modules with W + scale up down in them."""

import json
import math

import numpy as np
import pytest
from keras import ops

from kdiff import backend, lora
from kdiff.interop import diffusers as interop
from kdiff.interop import lora as files
from kdiff.interop import prompts
from tests.test_interop_prompts_reference import LENGTH, TEXTS, check, embeddings, sd_1, unet, xl
from tests.toys import mostly_once

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
library = pytest.importorskip("safetensors.torch")

RANK = 3
X = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype("float32")
TIME = np.array([7.0, 300.0], "float32")
CONTEXT = np.random.default_rng(1).standard_normal((2, 5, 16)).astype("float32")
# What each kind of file is of: attention alone, or all that PEFT can take, LoCon.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "v_proj")


def targets(module, names):
    """The layers of a module of PyTorch whose names end so."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {name: one for name, one in module.named_modules() if isinstance(one, kinds) and name.endswith(names)}


def random_factors(module, seed=0, names=ATTENTION, middle=False):
    """(down, up, middle) for each layer, whose shapes are PEFT's."""
    generator, made = torch.Generator().manual_seed(seed), {}
    for name, layer in targets(module, names).items():
        outputs, inputs, *size = layer.weight.shape
        inner, ones = [], [1] * len(size)
        if middle and size and max(size) > 1:
            inner, size = [torch.randn(RANK, RANK, *size, generator=generator)], ones
        down = torch.randn(RANK, inputs, *size, generator=generator)
        made[name] = (0.2 * down, 0.2 * torch.randn(outputs, RANK, *ones, generator=generator), *inner)
    assert made
    return made


def product(down, up, middle=None):
    """up down, as the kernel of one convolution after another, or of one layer after another."""
    if middle is not None:
        return torch.einsum("or,rshw,si->oihw", up[:, :, 0, 0], middle, down[:, :, 0, 0])
    return torch.einsum("or...,ri...->oi...", up.expand(*up.shape[:2], *down.shape[2:]), down)


def merge(module, factors, scale):
    with torch.no_grad():
        for name, layer in targets(module, "").items():
            if name in factors:
                layer.weight += scale * product(*factors[name])


# --- files as they are found


def peft(factors, part, alpha):
    state = {}
    for name, (down, up, *_) in factors.items():
        state |= {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}
    about = {"r": RANK, "lora_alpha": alpha, "target_modules": list(factors)}
    return state, {f"{part}.{name}": value for name, value in about.items()}


def before(factors, part, alpha):
    """diffusers before PEFT, with the attention's processors."""
    state = {}
    for name, (down, up, *_) in factors.items():
        stem = f"{part}.{name.removesuffix('.0')}".replace(".to_", ".processor.to_")
        state |= {f"{stem}_lora.down.weight": down, f"{stem}_lora.up.weight": up}
        state |= {f"{stem}.alpha": torch.tensor(alpha)}
    return state, {}


def kohya(factors, part, alpha):
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_", "text_encoder_2": "lora_te2_text_model_"}
    state = {}
    for name, (down, up, *middle) in factors.items():
        stem = prefix[part] + name.removeprefix("text_model.").replace(".", "_")
        state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(alpha)}
        state |= {f"{stem}.lora_mid.weight": one for one in middle}
    return state, {}


KINDS = {
    "peft": (peft, ATTENTION, False),
    "before": (before, ATTENTION, False),
    "kohya": (kohya, ATTENTION, False),
    "locon": (kohya, ("conv1", "conv_shortcut", "conv", "to_q", "proj_in", "ff.net.0.proj", "linear_1"), False),
    "locon with a middle": (kohya, ("conv1", "conv_in"), True),
}


def written(path, state, about):
    metadata = {"format": "pt"} | ({"lora_adapter_metadata": json.dumps(about)} if about else {})
    library.save_file({name: array.contiguous() for name, array in state.items()}, path, metadata=metadata)
    return path


def outputs_of(network, **more):
    inputs = {"image": X, "time": TIME, "context": CONTEXT, **more}
    return ops.convert_to_numpy(backend.compiled(lambda x: network(x), network)(inputs))


def outputs_of_theirs(module, **more):
    given = {"encoder_hidden_states": torch.tensor(CONTEXT), **more}
    with torch.no_grad():
        y = module(torch.tensor(X.transpose(0, 3, 1, 2)), torch.tensor(TIME), **given).sample
    return y.numpy().transpose(0, 2, 3, 1)


@pytest.fixture
def theirs(tmp_path):
    module = unet()
    module.save_pretrained(tmp_path / "unet")
    return module


@pytest.mark.parametrize("kind", mostly_once(KINDS))
def test_of_a_unet(kind, theirs, tmp_path):
    """Loaded, the network gives diffusers' output; removed, what it gave before."""
    write, names, middle = KINDS[kind]
    factors = random_factors(theirs, 0, names, middle)
    path = written(tmp_path / "lora.safetensors", *write(factors, "unet", 6.0))
    network = interop.load(tmp_path / "unet")
    kernels, plain = [ops.convert_to_numpy(weight).copy() for weight in network.weights], outputs_of_theirs(theirs)
    change = files.load(network, (path, 0.5))
    assert len(change.names["unet"]) == len(factors)
    merge(theirs, factors, 0.5 * 6.0 / RANK)
    wanted = outputs_of_theirs(theirs)
    assert np.abs(wanted - plain).max() > 0.02 * np.abs(plain).max()
    check(outputs_of(network), wanted, 1e-5)
    change.remove()
    for weight, kernel in zip(network.weights, kernels, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(weight), kernel)


@pytest.mark.once
def test_several(theirs, tmp_path):
    """With weights; and one after the other, which are removed in the order of a stack."""
    factors = [random_factors(theirs, seed, names) for seed, names in enumerate((ATTENTION, ("to_q", "conv2")))]
    paths = [written(tmp_path / f"{i}.safetensors", *kohya(one, "unet", RANK)) for i, one in enumerate(factors)]
    together, apart = interop.load(tmp_path / "unet"), interop.load(tmp_path / "unet")
    weights = (0.7, -0.4)
    files.load(together, *zip(paths, weights, strict=True))
    for one, weight in zip(factors, weights, strict=True):
        merge(theirs, one, weight)
    wanted = outputs_of_theirs(theirs)
    check(outputs_of(together), wanted, 1e-5)
    plain = outputs_of(apart)
    first, second = (files.load(apart, (path, weight)) for path, weight in zip(paths, weights, strict=True))
    check(outputs_of(apart), wanted, 1e-5)
    with pytest.raises(ValueError, match="have changed since"):
        first.remove()
    second.remove()
    first.remove()
    np.testing.assert_array_equal(outputs_of(apart), plain)


def one_file(name):
    """The name of a layer of a U-Net with one block a level in the code of latent diffusion, by hand for this test."""
    words = name.split(".")
    inner = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
    inner |= {"conv_shortcut": "skip_connection"}
    if words[0] == "mid_block":
        place = 1 if words[1] == "attentions" else 2 * int(words[2])
        return ".".join([f"middle_block.{place}", *(inner.get(word, word) for word in words[3:])])
    if words[0] in ("down_blocks", "up_blocks"):
        down, i, j = words[0] == "down_blocks", int(words[1]), int(words[3])
        if words[2] == "downsamplers":
            return f"input_blocks.{2 * i + 2}.0.op"
        if words[2] == "upsamplers":
            return f"output_blocks.{2 * i + 1}.1.conv"  # after a block without attention
        first = f"input_blocks.{2 * i + 1}" if down else f"output_blocks.{2 * i + j}"
        return ".".join([first, "1" if words[2] == "attentions" else "0", *(inner.get(w, w) for w in words[4:])])
    known = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    return {**known, "conv_in": "input_blocks.0.0", "conv_out": "out.2"}[name]


@pytest.mark.once
def test_names_of_one_file(theirs, tmp_path):
    """kohya's of Stable Diffusion XL: all layers."""
    factors = random_factors(theirs, 0, ("",))
    state, _ = kohya({one_file(name): one for name, one in factors.items()}, "unet", RANK)
    network = interop.load(tmp_path / "unet")
    files.load(network, (state, 0.1))
    merge(theirs, factors, 0.1)
    check(outputs_of(network), outputs_of_theirs(theirs), 1e-5)


@pytest.mark.once
@pytest.mark.parametrize("kind", ["peft", "kohya"])
def test_with_text_encoders(kind, tmp_path):
    """Both of Stable Diffusion XL; the empty text is another, too, and the averages of a model change with it."""
    pipeline = xl(tmp_path, zeros=False)
    pipeline.save_pretrained(tmp_path / "saved")
    model = interop.load(tmp_path / "saved", ema=0.9)
    model.ema_weights.updates.assign(1)
    prompt = prompts.prompt_of(model.network)
    plain, _ = prompt.prepare(TEXTS), prompt.null
    state, about, parts = {}, {}, {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        parts[part] = random_factors(getattr(pipeline, part))
        arrays, more = KINDS[kind][0](parts[part], part, 6.0)
        state, about = state | arrays, about | more
    change = files.load(model, written(tmp_path / "lora.safetensors", state, about))
    assert set(change.names) == set(parts)
    for part, factors in parts.items():
        merge(getattr(pipeline, part), factors, 6.0 / RANK)
    (tokens, _), (no_tokens, _) = embeddings(pipeline, TEXTS)
    check(prompt.prepare(TEXTS)[:, :LENGTH], tokens, 5e-6)
    check(np.stack([prompt.null] * 2)[:, :LENGTH], no_tokens, 5e-6)
    wanted = pipeline.unet.state_dict()["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].T
    layer = model.network.bridge.layers[1].blocks[0].cross_attention.attention.key
    averages = dict((id(weight), average) for weight, average in model.ema_weights.pairs(model.network))
    for variable in (layer.kernel, averages[id(layer.kernel)]):
        np.testing.assert_allclose(ops.convert_to_numpy(variable), wanted, atol=1e-6)
    change.remove()
    np.testing.assert_array_equal(prompt.prepare(TEXTS), plain)


def trained(folder, where=lora.ATTENTION):
    """A network with LoRA whose A and B are no longer what they were."""
    network = interop.load(folder)
    lora.enable(network, RANK, where, 6.0)
    generator = np.random.default_rng(5)
    for layer in lora.enabled(network):
        for weight in (layer.lora_kernel_a, layer.lora_kernel_b):
            weight.assign(0.2 * generator.standard_normal(weight.shape))
    return network


@pytest.mark.once
@pytest.mark.parametrize("where", [lora.ATTENTION, ""])
def test_saved(where, theirs, tmp_path):
    """A and B alone, by names of diffusers, whose module with them gives the network's output; so does ours."""
    network = trained(tmp_path / "unet", where)
    files.save(network, tmp_path, convolutions=True)
    state = library.load_file(tmp_path / files.FILE)
    stems = {name.rpartition(".lora_")[0] for name in state}
    assert len(state) == 2 * len(stems) == 2 * len(lora.enabled(network))
    factors = {
        stem.removeprefix("unet."): (state[f"{stem}.lora_A.weight"], state[f"{stem}.lora_B.weight"]) for stem in stems
    }
    again = interop.load(tmp_path / "unet")
    files.load(again, tmp_path)
    merge(theirs, factors, 1.0)
    wanted = outputs_of_theirs(theirs)
    check(outputs_of(network), wanted, 1e-5)
    check(outputs_of(again), wanted, 1e-5)
    files.save(network, tmp_path)
    dense = library.load_file(tmp_path / files.FILE)
    assert all(torch.equal(array.reshape(state[name].shape), state[name]) for name, array in dense.items())
    assert {array.ndim for name, array in dense.items() if "proj_in" in name} <= {2}


@pytest.mark.once
def test_saved_for_load_lora_weights(tmp_path):
    """diffusers' own loader, where PEFT is installed."""
    pytest.importorskip("peft")
    pipeline = sd_1(tmp_path)
    pipeline.unet.save_pretrained(tmp_path / "unet")
    network = trained(tmp_path / "unet", "")
    files.save(network, tmp_path, convolutions=True)
    pipeline.load_lora_weights(tmp_path)
    check(outputs_of(network), outputs_of_theirs(pipeline.unet), 1e-5)


@pytest.mark.once
@pytest.mark.parametrize("kind", ["peft", "before", "kohya", "locon"])
def test_of_a_unet_against_load_lora_weights(kind, tmp_path):
    """diffusers' own loader, where PEFT is installed."""
    pytest.importorskip("peft")
    pipeline = sd_1(tmp_path)
    pipeline.unet.save_pretrained(tmp_path / "unet")
    write, names, middle = KINDS[kind]
    names = tuple(name for name in names if name != "linear_1")
    state, about = write(random_factors(pipeline.unet, 0, names, middle), "unet", 6.0)
    state = {name: array for name, array in state.items() if not (name.startswith("unet.") and "alpha" in name)}
    path = written(tmp_path / "lora.safetensors", state, about)
    network = interop.load(tmp_path / "unet")
    files.load(network, path)
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    check(outputs_of(network), outputs_of_theirs(pipeline.unet), 1e-5)


@pytest.mark.once
def test_what_the_header_says(theirs):
    """PEFT's patterns, by the ends of names, and the scale alpha / sqrt(rank)."""
    down, up = torch.zeros(4, 2), torch.zeros(2, 4)
    entry = {"down": down.numpy(), "up": up.numpy()}
    about = {"unet.lora_alpha": 8, "unet.alpha_pattern": {"mid_block.attn1.to_q": 2, "to_k": 12}}
    scales = [
        files._factors(name, entry, about, "x").scale
        for name in (
            "unet.mid_block.attn1.to_q",
            "unet.mid_block.attn1.to_k",
            "unet.mid_block.attn1.to_v",
            "other.to_k",
        )
    ]
    assert scales[:3] == [0.5, 3.0, 2.0]
    assert files._factors("unet.to_v", entry, {**about, "unet.use_rslora": True}, "x").scale == 8 / math.sqrt(4)


def wrong(**changes):
    name = "unet.mid_block.attentions.0.proj_in"
    state = {f"{name}.lora_A.weight": np.ones((2, 16, 1, 1)), f"{name}.lora_B.weight": np.ones((16, 2, 1, 1))}
    return {**{key: array.astype("float32") for key, array in state.items()}, **changes}


NAME = "unet.mid_block.attentions.0.proj_in"
ERRORS = {
    "not in the model: unet.elsewhere": {
        "unet.elsewhere.lora_A.weight": np.ones((2, 3), "float32"),
        "unet.elsewhere.lora_B.weight": np.ones((3, 2), "float32"),
    },
    r"shape: .* is of \(16, 9, 1, 1\), which does not make \(16, 16\)": {
        f"{NAME}.lora_A.weight": np.ones((2, 9, 1, 1), "float32")
    },
    r"must be \(rank, inputs, ...\) and \(outputs, rank\)": {f"{NAME}.lora_A.weight": np.ones((3, 16), "float32")},
    "must be finite": {f"{NAME}.lora_A.weight": np.full((2, 16, 1, 1), np.nan, "float32")},
    r"missing: \['up'\]": {"unet.conv_in.lora_A.weight": np.ones((2, 4, 3, 3), "float32")},
    r"received: \['unet.conv_in.hada_w1_a'\]": {"unet.conv_in.hada_w1_a": np.ones((2, 4), "float32")},
}


@pytest.mark.once
@pytest.mark.parametrize("message", ERRORS)
def test_files_that_do_not_fit(message, theirs, tmp_path):
    network = interop.load(tmp_path / "unet")
    kernels = [ops.convert_to_numpy(weight).copy() for weight in network.weights]
    with pytest.raises(ValueError, match=message):
        files.load(network, wrong(**ERRORS[message]))
    for weight, kernel in zip(network.weights, kernels, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(weight), kernel)
    if message.startswith("not in"):
        assert files.load(network, wrong(**ERRORS[message]), strict=False).names == {
            "unet": [NAME.removeprefix("unet.")]
        }


@pytest.mark.once
def test_a_quantized_network_takes_no_file(theirs, tmp_path):
    """A change smaller than 1 would vanish in its whole numbers, a larger one be far too large."""
    network = interop.load(tmp_path / "unet")
    network.quantize("int8")
    path = written(tmp_path / "lora.safetensors", *kohya(random_factors(theirs), "unet", RANK))
    with pytest.raises(ValueError, match=r"int8: .* would be added to a quantized kernel; load it before"):
        files.load(network, path)


@pytest.mark.once
def test_arguments(theirs, tmp_path):
    network = interop.load(tmp_path / "unet")
    with pytest.raises(ValueError, match="received none"):
        files.load(network)
    with pytest.raises(TypeError, match="must be a file, or"):
        files.load(network, ("lora.safetensors", "0.5"))
    with pytest.raises(ValueError, match="must be finite"):
        files.load(network, ("lora.safetensors", math.inf))
    with pytest.raises(ValueError, match="has no LoRA"):
        files.save(network, tmp_path)
    with pytest.raises(ValueError, match=r"lora\.safetensors: no such file"):
        files.load(network, tmp_path / "lora.safetensors")
