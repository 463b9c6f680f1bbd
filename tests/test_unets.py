"""The family of U-Nets: NCSN++, the teaching network, the published sizes, and what holds for each."""

import math

import keras
import numpy as np
import pytest

from kdiff import blocks, networks
from kdiff.networks import InputResidual, InputSkip, Level, NCSNpp, OutputSkip, SimpleUNet, UNet, published
from tests.helpers_gradients import perturb, run, value_and_gradients
from tests.toys import mostly_once


def label():
    return {"label": blocks.LabelEmbedding(3, dropout=0.5)}


def score(**options):
    """A small NCSN++ for score matching."""
    options = {"levels": 2, "depth": 1, "progressive_input": InputSkip(), "progressive_output": OutputSkip(), **options}
    return published.ncsnpp_256(8, divide=True, **options)


NETWORKS = {
    "ncsnpp_skips": lambda: score(conditions=label()),
    "ncsnpp_residual": lambda: published.ncsnpp_cifar10(8, 2, depth=1, seed=3),
    "ddpmpp": lambda: published.ddpmpp_cifar10(8, 2, depth=1, out_channels=3),
    "simple": lambda: SimpleUNet((8, 16), 24, 12, conditions=label(), out_channels=1),
    "adm": lambda: published.adm(64, 32, 2, depth=1, conditions=label(), multipliers=(0.5, 2)),
    "symmetric": lambda: UNet.residual(8, 2, 1, 0.2, downsample=blocks.Downsample(padding="symmetric"), stem_width=4),
    "convnext": lambda: UNet.composed(blocks.ConvNeXtBlock(kernel_size=3, ratio=2), None, 8, 2, 1),
    "magnitude": lambda: UNet.composed(
        blocks.MagnitudePreservingBlock(dropout=0.2),
        None,
        8,
        2,
        1,
        downsample=blocks.MagnitudePreservingBlock(resample=blocks.Downsample("average")),
        upsample=blocks.MagnitudePreservingBlock(resample=blocks.Upsample(convolution=False), normalize=False),
        normalization=keras.layers.Identity(),
    ),
    "stable_diffusion": lambda: published.stable_diffusion_1(16, 2),
    "efficient": lambda: published.efficient(8, 2),
}


def inputs_of(network, batch=2):
    rng = np.random.default_rng(0)
    conditions = {
        "label": np.arange(batch, dtype="int32") % 3,
        "context": rng.standard_normal((batch, 3, 5)).astype("float32"),
    }
    return {
        "image": rng.standard_normal((batch, 8, 4, 2)).astype("float32"),
        "time": np.linspace(-0.5, 1, batch).astype("float32"),
        **{name: conditions[name] for name in network.conditions},
    }


def built(name, **changes):
    keras.utils.set_random_seed(1)
    network = NETWORKS[name]().clone(**changes)
    inputs = inputs_of(network)
    network.build({key: (None, *value.shape[1:]) for key, value in inputs.items()})
    return network, inputs


@pytest.fixture(
    scope="module",
    params=mostly_once(NETWORKS, ("ncsnpp_skips", "simple", "adm", "convnext", "magnitude", "stable_diffusion")),
)
def perturbed(request):
    network, inputs = built(request.param)
    zero = run(network, inputs)
    perturb(network)
    return network, inputs, zero, *value_and_gradients(network, inputs)


def test_shape(perturbed):
    network, inputs, zero, y, _ = perturbed
    assert y.shape == (2, 8, 4, network.out_channels or 2)
    assert network.compute_output_spec({k: keras.KerasTensor(v.shape) for k, v in inputs.items()}).shape == y.shape
    assert np.all(zero == 0)
    assert np.isfinite(y).all()
    assert np.ptp(y) > 0


def test_a_gradient_reaches_every_weight(perturbed):
    for path, gradient in perturbed[4].items():
        if not path.endswith("key/bias"):  # a constant in every logit
            assert np.abs(gradient).max() > 1e-7, path


def test_every_input_is_seen(perturbed):
    network, inputs, _, y, _ = perturbed
    np.testing.assert_allclose(run(network, inputs), y, rtol=1e-5, atol=1e-5)
    for name, value in inputs.items():
        other = (value + 1) % 3 if name == "label" else value * 0.5
        assert np.abs(run(network, {**inputs, name: other}) - y).max() > 1e-5, name


def test_save_and_load(perturbed, tmp_path):
    network, inputs, _, y, _ = perturbed
    network.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras")
    assert repr(loaded) == repr(network)
    np.testing.assert_allclose(run(loaded, inputs), y, rtol=1e-5, atol=1e-5)


def test_mixed_precision(perturbed):
    network, inputs, _, y, _ = perturbed
    lower = network.clone(dtype="mixed_bfloat16")
    lower.build({name: value.shape for name, value in inputs.items()})
    lower.set_weights(network.get_weights())
    assert keras.backend.standardize_dtype(lower(inputs).dtype) == "float32"
    assert np.abs(run(lower, inputs) - y).max() < 0.1 * max(1, np.abs(y).max())


def trained(name, remat):
    """The losses of two steps and the weights after them: dropout, and labels dropped, are a part of both."""
    network, inputs = built(name, remat=remat)
    perturb(network)
    network.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=keras.backend.backend() == "jax")
    target = np.ones((2, 8, 4, network.out_channels or 2), "float32")
    losses = network.fit(inputs, target, epochs=2, batch_size=2, verbose=0, shuffle=False).history["loss"]
    return losses, network.get_weights()


@pytest.mark.once  # test_networks_family.py has others on every backend
@pytest.mark.parametrize("name", ["simple", "ncsnpp_skips"])  # those whose body is their own
def test_remat_trains_the_same(name):
    (losses, weights), (others, other_weights) = trained(name, False), trained(name, True)
    np.testing.assert_allclose(others, losses, rtol=1e-4)
    for weight, other in zip(weights, other_weights, strict=True):
        np.testing.assert_allclose(other, weight, rtol=1e-3, atol=1e-4)


@pytest.mark.once
def test_a_score_is_divided_by_sigma():
    network, inputs = built("ncsnpp_skips")
    whole = network.clone(divide=False)
    whole.build({name: value.shape for name, value in inputs.items()})
    perturb(network)
    whole.set_weights(network.get_weights())
    sigma = np.exp(inputs["time"].astype("float64"))[:, None, None, None]
    np.testing.assert_allclose(run(network, inputs), run(whole, inputs) / sigma, rtol=1e-4, atol=1e-5)


@pytest.mark.once
def test_attention_on_the_way_up_once_a_level():
    level = Level(8, 2, mixer="self_attention", up_mixers=1)
    units = [[type(layer).__name__ for layer in unit] for unit in level.units_up(blocks.Upsample())]
    assert units == [["ResidualBlock"], ["ResidualBlock"], ["ResidualBlock", "SelfAttention", "Upsample"]]
    assert [len(unit) for unit in Level(8, 1, mixer="self_attention").units_up()] == [2, 2]
    assert [len(unit) for unit in level.clone(up_mixers=0).units_up()] == [1, 1, 1]


@pytest.mark.once
def test_errors():
    cases = [
        (lambda: SimpleUNet((8, 4)), "a width.*at least 8; received: 4"),
        (lambda: SimpleUNet(embed_width=2), "`embed_width`.*at least 4; received: 2"),
        (lambda: SimpleUNet((8, 8))({"image": np.ones((1, 6, 8, 3)), "time": np.ones(1)}), "2 halvings need a height"),
        (lambda: NCSNpp([]), "`levels` must be at least one `Level`"),
        (lambda: InputResidual(rescale=0), "`rescale`.*received: 0"),
        (lambda: Level(8, up_mixers=-1), "`up_mixers`.*received: -1"),
        (lambda: UNet.basic(stem_width=0), "`stem_width`.*received: 0"),
        (lambda: UNet([Level(8, 1)], shrink="downsample"), "`shrink` and `grow` must be given together; received"),
        (lambda: published.efficient(levels=5), r"`levels` must be one of \[1, 2, 3, 4\]"),
        (lambda: published.adm(96), r"`size` must be one of \[64, 128, 256, 512\]; received: 96"),
        (lambda: published.improved_ddpm(16), r"\[32, 64\]; received: 16"),
        (lambda: published.ddpm_cifar10(levels=5), "`multipliers` must be 5 numbers"),
    ]
    for function, message in cases:
        with pytest.raises(ValueError, match=message):
            function()


# --- the published sizes

RGB = {"image": (None, None, 3), "time": ()}
LATENT = {"image": (None, None, 4), "time": ()}

# name: (network, shapes of the inputs, parameters). Counts in full are those of the published weights (DDPM:
# diffusers' conversions; Stable Diffusion: the checkpoints); others, in millions, those that the papers state.
SIZES = {
    "ddpm_cifar10": (published.ddpm_cifar10, RGB, 35_746_307),
    "ddpm_256": (published.ddpm_256, RGB, 113_673_219),
    "adm_64": (lambda: published.adm(64), {**RGB, "label": ()}, 295.9),
    "adm_128": (lambda: published.adm(128), {**RGB, "label": ()}, 422),
    "adm_256": (lambda: published.adm(256), {**RGB, "label": ()}, 554),
    "adm_512": (lambda: published.adm(512), {**RGB, "label": ()}, 559),
    "ddpmpp_cifar10": (published.ddpmpp_cifar10, RGB, 55.7),
    "simple": (SimpleUNet, RGB, 3_872_579),  # of the module of this name in PyTorch tutorials, with its defaults
    "stable_diffusion_1": (published.stable_diffusion_1, {**LATENT, "context": (77, 768)}, 859_520_964),
    "stable_diffusion_2": (published.stable_diffusion_2, {**LATENT, "context": (77, 1024)}, 865_910_724),
    "stable_diffusion_xl": (
        published.stable_diffusion_xl,
        {**LATENT, "context": (77, 2048), "text_embeds": (1280,), "time_ids": (6,)},
        2_567_463_684,
    ),
}


def parameters(network, shapes):
    others = {name: shape for name, shape in shapes.items() if name not in ("image", "time")}
    return networks.parameters(network, shapes["image"], **others)


@pytest.mark.once
@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_as_published(name):
    make, shapes, expected = SIZES[name]
    count = parameters(make(), shapes)
    if isinstance(expected, int) and expected > 10_000:
        assert count == expected
    else:
        digits = 1 if isinstance(expected, float) else 0
        assert round(count / 1e6, digits) == expected


@pytest.mark.once
@pytest.mark.parametrize(
    "make",
    [
        published.ddpm_cifar10,
        published.ddpm_256,
        published.improved_ddpm,
        published.adm,
        published.ddpmpp_cifar10,
        published.ncsnpp_cifar10,
        published.ncsnpp_256,
        published.stable_diffusion_1,
        published.stable_diffusion_2,
        published.stable_diffusion_xl,
    ],
)
def test_a_published_network_made_small(make):
    network = make(width=64, levels=1, conditions=label(), out_channels=5, remat=True)
    assert (network.levels[0].width <= 128, len(network.levels), network.remat) == (True, 1, True)
    assert type(network).from_config(network.get_config()).out_channels == 5
    assert parameters(network, {**RGB, "label": ()}) < 1e7


# --- diffusers


def _load(layer, theirs):
    """A convolution, a dense layer or a normalisation."""
    weight, bias = theirs.weight.detach().numpy(), theirs.bias.detach().numpy()
    if hasattr(layer, "gamma"):
        weights = [weight, bias]
    else:
        weights = [weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T, bias]
    layer.set_weights(weights)


def _load_block(block, theirs):
    names = {"normalization": "norm1", "first": "conv1", "second_normalization": "norm2", "second": "conv2"}
    for name, other in {**names, "projection": "time_emb_proj", "shortcut": "conv_shortcut"}.items():
        assert (getattr(block, name) is None) == (getattr(theirs, other) is None)
        if getattr(block, name) is not None:
            _load(getattr(block, name), getattr(theirs, other))


def _load_attention(layer, theirs):
    _load(layer.normalization, theirs.group_norm)
    for name, other in {"query": "to_q", "key": "to_k", "value": "to_v"}.items():
        _load(getattr(layer.attention, name), getattr(theirs, other))
    _load(layer.attention.output_layer, theirs.to_out[0])


def _load_unit(unit, block, index, attentions):
    _load_block(unit.layers[0], block.resnets[index])
    for layer, theirs in zip(unit.layers[1:], attentions, strict=True):
        _load_attention(layer, theirs)


def _load_ncsnpp(network, theirs):
    network.embedding.embedding.frequencies.assign(theirs.time_proj.weight.numpy())
    _load(network.stem, theirs.conv_in)
    _load(network.embedding.hidden, theirs.time_embedding.linear_1)
    _load(network.embedding.output_layer, theirs.time_embedding.linear_2)
    down, up, last = iter(network.down), iter(network.up), len(network.levels) - 1
    for i, (level, block) in enumerate(zip(network.levels, theirs.down_blocks, strict=True)):
        for j in range(level.depth):
            _load_unit(next(down), block, j, [block.attentions[j]] if level.mixer else [])
        if i < last:
            _load_block(next(down).layers[0], block.resnet_down)
            _load(network.inputs_down[i].convolution, block.skip_conv)
    first, attention, second = network.bridge.layers
    _load_block(first, theirs.mid_block.resnets[0])
    _load_attention(attention, theirs.mid_block.attentions[0])
    _load_block(second, theirs.mid_block.resnets[1])
    for i, block in zip(range(last, -1, -1), theirs.up_blocks, strict=True):
        depth = network.levels[i].depth
        for j in range(depth + 1):
            _load_unit(next(up), block, j, block.attentions if j == depth and network.levels[i].mixer else [])
        if i:
            _load_block(network.grow[i - 1].layers[0], block.resnet_up)
            _load(network.outputs_up[i - 1].normalization, block.skip_norm)
            _load(network.outputs_up[i - 1].convolution, block.skip_conv)
    _load(network.normalization, theirs.conv_norm_out)
    _load(network.head, theirs.conv_out)


@pytest.mark.once
@pytest.mark.reference
def test_ncsnpp_is_that_of_diffusers():
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(
        block_out_channels=(128, 128, 256),  # fewer, and diffusers' numbers of groups are not one rule
        layers_per_block=1,
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
        up_block_types=("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
        time_embedding_type="fourier",
        flip_sin_to_cos=False,
        norm_eps=1e-6,
        mid_block_scale_factor=math.sqrt(2),
        attention_head_dim=None,
    )
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    network = published.ncsnpp_256(multipliers=(1, 1, 2), depth=1, at=(1,))
    rng = np.random.default_rng(0)
    image, sigma = rng.standard_normal((2, 16, 8, 3)).astype("float32"), np.array([0.3, 7.0], "float32")
    inputs = {"image": image, "time": np.log(sigma)}
    network.build({name: value.shape for name, value in inputs.items()})
    assert sum(math.prod(w.shape) for w in network.trainable_weights) == sum(
        p.numel() for n, p in theirs.named_parameters() if p.requires_grad and n != "time_proj.weight"
    )
    _load_ncsnpp(network, theirs.eval())
    with torch.no_grad():
        expected = theirs(torch.tensor(image.transpose(0, 3, 1, 2)), torch.tensor(sigma)).sample.numpy()
    np.testing.assert_allclose(run(network, inputs), expected.transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.once
@pytest.mark.reference
def test_ncsnpp_has_the_size_of_diffusers():
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.UNet2DModel(
            block_out_channels=(128, 128, 256, 256, 256, 256, 256),
            down_block_types=(*["SkipDownBlock2D"] * 4, "AttnSkipDownBlock2D", *["SkipDownBlock2D"] * 2),
            up_block_types=(*["SkipUpBlock2D"] * 2, "AttnSkipUpBlock2D", *["SkipUpBlock2D"] * 4),
            time_embedding_type="fourier",
            attention_head_dim=None,
        )
    assert parameters(published.ncsnpp_256(), RGB) == sum(p.numel() for p in theirs.parameters())
