"""Autoencoders of diffusers, made and saved by it with random weights, give the same latents and images, and back."""

import keras
import numpy as np
import pytest
from keras import ops

from kdiff import codecs, networks
from kdiff.interop import autoencoders
from kdiff.interop import diffusers as interop
from kdiff.interop.autoencoder_configs import KINDS
from kdiff.interop.files import read_json, write_json
from kdiff.interop.weights import assign
from tests.toys import mostly_once

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TOLERANCE = 2e-5  # of the largest number: float32 rounding through ten layers
SMALL = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "sample_size": 16,
}
THREE = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (4, 8, 12),
    "layers_per_block": 2,
}
ATTENTION = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
}
KL = {
    "plain": {},
    "no_quant": {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.06, "latent_channels": 6},
    "three_levels": THREE,
    "attention": {**ATTENTION, "mid_block_add_attention": False},
    "statistics": {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 1.0, 2.0, 3.0], "force_upcast": False},
    "grey": {"in_channels": 1, "out_channels": 2},
}
VQS = {"plain": {}, "width": {"vq_embed_dim": 5, "num_vq_embeddings": 9}, "attention": ATTENTION}
VQS["spatial"] = {**ATTENTION, "norm_type": "spatial", "block_out_channels": (32, 32), "norm_num_groups": 32}
TINY = {
    "encoder_block_out_channels": (8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8),
    "num_encoder_blocks": (1, 2, 1),
    "num_decoder_blocks": (2, 1, 1),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For networks as small as these several threads wait for each other more than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)  # of diffusers' own weights
    yield
    torch.set_num_threads(threads)


def perturbed(model, scale=0.05):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(scale * torch.randn(weight.shape, generator=generator))
    return model.eval()


def images(channels, size=16, count=2):
    return np.random.default_rng(0).uniform(-1, 1, (count, size, size, channels)).astype("float32")


def first(x):
    return torch.tensor(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def last(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


def close(ours, theirs, what, tolerance=TOLERANCE):
    error = np.abs(ops.convert_to_numpy(ours) - theirs).max() / np.abs(theirs).max()
    assert error < tolerance, f"{what}: {error:.1e}"


def _plain(value):
    return list(value) if isinstance(value, (list, tuple)) else value


def compare(model, folder):
    """The codec of the folder; mean, log-variance and images are theirs, and again after saving."""
    perturbed(model).save_pretrained(folder / "saved")
    x = images(model.config.in_channels)
    posterior = model.encode(first(x))
    if hasattr(posterior, "latent_dist"):
        mean, log_variance = last(posterior.latent_dist.mean), last(posterior.latent_dist.logvar)
    else:
        mean, log_variance = last(posterior.latents), None
    decoded = last(model.decode(first(mean)).sample)
    codec = autoencoders.load(folder / "saved")
    ours = codec.autoencoder.encode(x)
    close(ours[0], mean, "mean")
    assert (ours[1] is None) == (log_variance is None)
    if log_variance is not None:
        close(ours[1], log_variance, "log-variance")
    close(codec.autoencoder.decode(mean), decoded, "images")
    autoencoders.save(codec, folder / "again")
    again = type(model).from_pretrained(folder / "again").eval()
    np.testing.assert_array_equal(last(again.decode(first(mean)).sample), decoded)
    return codec, again.config


@pytest.mark.parametrize("name", mostly_once(KL, ["no_quant"]))
def test_kl(name, tmp_path):
    config = {**SMALL, "scaling_factor": 0.3, **KL[name]}
    model = diffusers.AutoencoderKL(**config)
    codec, again = compare(model, tmp_path)
    for key, value in model.config.items():
        if not key.startswith("_") and key not in ("sample_size", "scaling_factor", "latents_mean", "latents_std"):
            assert _plain(again[key]) == _plain(value), key
    x = images(config.get("in_channels", 3))
    mean = last(model.encode(first(x)).latent_dist.mean)
    if name == "statistics":
        expected = (mean - np.array(config["latents_mean"])) * 0.3 / np.array(config["latents_std"])
        ratio = np.array(again["latents_std"]) / again["scaling_factor"]
        np.testing.assert_allclose(ratio, np.array(config["latents_std"]) / 0.3)
    else:
        expected = (mean - config.get("shift_factor", 0.0)) * 0.3
        assert again["scaling_factor"] == 0.3
    close(codec.encode(x), expected, "scaled")
    close(codec.decode(expected), np.clip(last(model.decode(first(mean)).sample), -1, 1), "decoded")
    assert codec.upcast is (name != "statistics")


@pytest.mark.once
@pytest.mark.parametrize("name", VQS)
def test_vq(name, tmp_path):
    model = diffusers.VQModel(**{**SMALL, "num_vq_embeddings": 16, **VQS[name]})
    with torch.no_grad():  # codes as far apart as the latents
        latents = last(perturbed(model).encode(first(images(3))).latents)
        table = latents.reshape(-1, latents.shape[-1])[:: 128 // len(model.quantize.embedding.weight)]
        model.quantize.embedding.weight.copy_(torch.tensor(table[: len(model.quantize.embedding.weight)]))
    codec, again = compare(model, tmp_path)
    assert again["num_vq_embeddings"] == codec.autoencoder.codes
    latents = codec.autoencoder.encode(images(3))[0]
    codes, index = codec.autoencoder.nearest(latents)
    table = model.quantize.embedding.weight.detach().numpy()
    np.testing.assert_allclose(ops.convert_to_numpy(codes), table[ops.convert_to_numpy(index)], atol=1e-6)
    assert len(np.unique(ops.convert_to_numpy(index))) > 2


@pytest.mark.once
def test_tiny(tmp_path):
    codec, again = compare(diffusers.AutoencoderTiny(**TINY), tmp_path)
    assert codec.scale == 1.0
    assert tuple(again["num_encoder_blocks"]) == (1, 2, 1)


@pytest.mark.once
@pytest.mark.parametrize(("name", "size"), [("kl", (48, 32)), ("kl", (40, 60)), ("vq", (40, 60))])
def test_tiles(name, size):
    """As `tiled_encode` and `tiled_decode`, with tiles of 16 pixels; also where the last tiles are cut off."""
    model = perturbed(diffusers.AutoencoderKL(**{**SMALL, **KL["plain"]}))
    network = networks.AutoencoderKL((8, 16), 4, 1, groups=4)
    network.build()
    model_state = {key: value.numpy() for key, value in model.state_dict().items()}
    assign(KINDS["AutoencoderKL"].slots(network), model_state, "model")
    if name == "vq":  # any network with one latent an image
        network.encode_pair, network.encode = network.encode, lambda x, training=None: (network.encode_pair(x)[0], None)
    codec = codecs.Latent(network, tiles=16)
    x = np.random.default_rng(0).uniform(-1, 1, (1, *size, 3)).astype("float32")
    model.enable_tiling()
    posterior = model.encode(first(x)).latent_dist
    mean, std = codec.moments(x)
    close(mean, last(posterior.mean), "mean", 1e-5)
    assert (std is None) == (name == "vq")
    if std is not None:
        close(std, last(posterior.std), "std", 1e-5)
    latents = last(posterior.mean)
    decoded = last(model.decode(first(latents)).sample)
    close(codec.decode(latents), np.clip(decoded, -1, 1), "images", 1e-5)
    whole = ops.convert_to_numpy(codecs.Latent(network).decode(latents))
    assert np.abs(whole - np.clip(decoded, -1, 1)).max() > 1e-3


# The layout of latent diffusion


def in_original_layout(state, levels):
    """The names of diffusers' own converter, the other way round (scripts/convert_vae_pt_to_diffusers.py)."""
    changed = {}
    for key, value in state.items():
        for there, here in (
            ("conv_norm_out", "norm_out"),
            ("mid_block.resnets.0", "mid.block_1"),
            ("mid_block.resnets.1", "mid.block_2"),
            ("mid_block.attentions.0", "mid.attn_1"),
            ("group_norm", "norm"),
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "proj_out"),
            ("conv_shortcut", "nin_shortcut"),
            ("resnets", "block"),
            ("attentions", "attn"),
            ("downsamplers.0", "downsample"),
            ("upsamplers.0", "upsample"),
        ):
            key = key.replace(there, here)
        for level in range(levels):
            key = key.replace(f"down_blocks.{level}.", f"down.{level}.")
            key = key.replace(f"up_blocks.{level}.", f"up.{levels - 1 - level}.")
        if ".attn" in key and value.ndim == 2:
            value = value[:, :, None, None]
        changed[key] = value
    return changed


@pytest.mark.once
@pytest.mark.parametrize("name", ["kl", "attention", "no_quant", "vq"])
def test_original_layout(name):
    if name == "vq":
        model = diffusers.VQModel(**{**SMALL, **THREE, "num_vq_embeddings": 16, "vq_embed_dim": 5})
    else:
        model = diffusers.AutoencoderKL(**{**SMALL, **(THREE if name == "kl" else KL[name])})
    perturbed(model)
    state = in_original_layout(model.state_dict(), len(model.config.block_out_channels))
    if name == "kl":  # a whole checkpoint
        state = {f"first_stage_model.{key}": value for key, value in state.items()}
        state["model.diffusion_model.out.2.bias"] = torch.zeros(3)
    else:
        state["loss.logvar"] = torch.zeros(())
    codec = autoencoders.original(state, 0.2, groups=4)
    x = images(3)
    out = model.encode(first(x))
    mean = last(out.latents if name == "vq" else out.latent_dist.mean)
    close(codec.encode(x), 0.2 * mean, "mean")
    close(codec.autoencoder.decode(mean), last(model.decode(first(mean)).sample), "images")
    assert codec.autoencoder.depth == model.config.layers_per_block
    state = {key: value for key, value in state.items() if "mid.block_2.conv1.bias" not in key}
    with pytest.raises(ValueError, match=r"missing: (first_stage_model\.)?(de|en)coder\.mid\.block_2\.conv1\.bias"):
        autoencoders.original(state, groups=4)


# Pipelines


@pytest.mark.once
def test_pipeline(tmp_path):
    """Of a folder with an autoencoder `sample` gives the pictures of the pipeline; and back."""
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    vqvae = perturbed(diffusers.VQModel(**SMALL, num_vq_embeddings=16, scaling_factor=0.7))
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    pipeline = diffusers.LDMPipeline(vqvae, perturbed(unet), scheduler)
    pipeline.save_pretrained(tmp_path / "saved")
    model = interop.load(tmp_path / "saved")
    assert isinstance(model.codec, codecs.Latent)
    assert model.sample(2, steps=2).shape == (2, 16, 16, 3)
    x = images(3, 8)
    steps = list(model.sample_steps(1, steps=1, noise=x[:1]))
    latents = interop.load(tmp_path / "saved", codec="identity").sample(1, steps=1, noise=x[:1])
    expected = np.clip(last(vqvae.decode(first(latents / 0.7)).sample), -1, 1)
    close(steps[-1].x, expected, "images")
    interop.save(model, tmp_path / "again")
    again = diffusers.VQModel.from_pretrained(tmp_path / "again" / "vqvae")
    np.testing.assert_array_equal(last(again.decode(first(x)).sample), last(vqvae.decode(first(x)).sample))
    assert isinstance(interop.load(tmp_path / "again" / "vqvae"), codecs.Latent)


# What cannot be loaded


@pytest.mark.once
@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("AutoencoderKL", {"act_fn": "relu"}, "`act_fn` must be one of"),
        ("AutoencoderKL", {"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]}, "must mirror"),
        ("AutoencoderKL", {"latent_channels": 0}, "`latent_channels` must be a whole number"),
        ("VQModel", {"norm_type": "spatial"}, "with `norm_type` 'spatial', `norm_num_groups` must be 32 .*received: 4"),
        ("AutoencoderTiny", {"decoder_block_out_channels": [4, 8, 8]}, "one width"),
        ("AutoencoderOobleck", {}, "`_class_name` must be one of"),
    ],
)
def test_wrong_configurations(tmp_path, kind, change, message):
    small = TINY if kind == "AutoencoderTiny" else SMALL
    write_json(tmp_path / "config.json", {"_class_name": kind, **small, **change})
    with pytest.raises(ValueError, match=message) as error:
        autoencoders.load(tmp_path)
    assert str(error.value).startswith(str(tmp_path))


@pytest.mark.once
def test_wrong_weights_and_networks(tmp_path):
    diffusers.AutoencoderKL(**SMALL).save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", {**config, "block_out_channels": [8, 8]})
    with pytest.raises(ValueError, match=r"shape: encoder\.conv_norm_out\.weight is"):
        autoencoders.load(tmp_path)
    network = networks.AutoencoderKL((8, 32), depth=1)
    network.build()
    with pytest.raises(ValueError, match="one `groups` for all norms"):
        autoencoders.save(network, tmp_path / "again")
    with pytest.raises(ValueError, match="only a built AutoencoderKL"):
        autoencoders.save(networks.AutoencoderTiny(), tmp_path / "again")
    tiny = networks.AutoencoderTiny(8, depths=(1, 1), up_depths=(1, 1))
    tiny.build()
    with pytest.raises(ValueError, match=r"diffusers does not support \['latents_mean', 'latents_std'\]"):
        autoencoders.save(codecs.Latent(tiny, [1.0, 2.0, 3.0, 4.0]), tmp_path / "again")


@pytest.mark.once
def test_half_precision():
    """`force_upcast`: under a policy of half precision the autoencoder computes in float32."""
    network = networks.AutoencoderKL((8, 16), 4, 1, groups=4, dtype="mixed_bfloat16")
    twin = networks.AutoencoderKL((8, 16), 4, 1, groups=4)
    codec, plain = codecs.Latent(network, upcast=True), codecs.Latent(twin)
    codec.freeze(), plain.freeze()
    for mine, theirs in zip(network.weights, twin.weights, strict=True):
        mine.assign(theirs)
    assert {layer.compute_dtype for layer in network._flatten_layers()} == {"float32"}
    close(codec.encode(images(3)), ops.convert_to_numpy(plain.encode(images(3))), "encoded", 1e-6)
    with pytest.raises(ValueError, match="`upcast` needs weights in float32"):
        codecs.Latent(networks.AutoencoderKL((8, 16), 4, 1, dtype=keras.DTypePolicy("bfloat16")), upcast=True)
