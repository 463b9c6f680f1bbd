import keras
import numpy as np
import pytest

from kdiff.evaluation import EfficientNetLite0
from kdiff.evaluation.efficientnet import STAGES, efficientnet_lite0


def drawn_state():
    """Random weights in the layout of the published file."""
    generator, state = np.random.default_rng(0), {}

    def convolution(name, *shape):
        state[f"{name}.weight"] = generator.normal(size=shape) * (2 / np.prod(shape[1:])) ** 0.5

    def norm(name, width):
        state[f"{name}.weight"], state[f"{name}.bias"] = generator.normal([[1.0], [0.0]], 0.2, (2, width))
        state[f"{name}.running_mean"] = generator.normal(0, 0.2, width)
        state[f"{name}.running_var"] = 0.5 + np.abs(generator.normal(size=width))
        state[f"{name}.num_batches_tracked"] = np.array(1)

    convolution("_conv_stem", 32, 3, 3, 3)
    norm("_bn0", 32)
    block, width = 0, 32
    for count, kernel, _, expansion, channels in STAGES:
        for _ in range(count):
            name, wide = f"_blocks.{block}", expansion * width
            if expansion > 1:
                convolution(f"{name}._expand_conv", wide, width, 1, 1)
                norm(f"{name}._bn0", wide)
            convolution(f"{name}._depthwise_conv", wide, 1, kernel, kernel)
            norm(f"{name}._bn1", wide)
            convolution(f"{name}._project_conv", channels, wide, 1, 1)
            norm(f"{name}._bn2", channels)
            block, width = block + 1, channels
    convolution("_conv_head", 1280, width, 1, 1)
    norm("_bn1", 1280)
    state["_fc.weight"], state["_fc.bias"] = generator.normal(0, 0.05, (1000, 1280)), generator.normal(size=1000)
    return {name: np.asarray(array, "float32") for name, array in state.items()}


def derived(state, images):
    """The features and the logits by PyTorch's functions, with the padding of TensorFlow."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    state = {name: torch.tensor(array, dtype=torch.float64) for name, array in state.items()}

    def unit(x, convolution, norm, stride=1, active=True):
        kernel = state[f"{convolution}.weight"]
        side, missing = kernel.shape[-1], []
        for size in (x.shape[3], x.shape[2]):
            whole = max((-(-size // stride) - 1) * stride + side - size, 0)
            missing += [whole // 2, whole - whole // 2]
        groups = x.shape[1] if kernel.shape[1] == 1 else 1
        x = torch.conv2d(torch.nn.functional.pad(x, missing), kernel, stride=stride, groups=groups)
        scale, shift, mean, variance = (
            state[f"{norm}.{end}"][:, None, None] for end in ("weight", "bias", "running_mean", "running_var")
        )
        x = (x - mean) / torch.sqrt(variance + 1e-3) * scale + shift
        return x.clamp(0, 6) if active else x

    x = unit(torch.tensor(images, dtype=torch.float64).permute(0, 3, 1, 2), "_conv_stem", "_bn0", 2)
    for block in range(16):
        before, name = x, f"_blocks.{block}"
        if block:
            x = unit(x, f"{name}._expand_conv", f"{name}._bn0")
        stride = 2 if block in (1, 3, 5, 11) else 1
        x = unit(x, f"{name}._depthwise_conv", f"{name}._bn1", stride)
        x = unit(x, f"{name}._project_conv", f"{name}._bn2", active=False)
        x = x + before if x.shape == before.shape else x
    pool = unit(x, "_conv_head", "_bn1").mean((2, 3))
    return pool.numpy(), (pool @ state["_fc.weight"].T + state["_fc.bias"]).numpy()


def test_it_computes_what_pytorch_computes_of_the_same_file():
    state = drawn_state()
    images = np.random.default_rng(1).uniform(-1, 1, (2, 75, 96, 3)).astype("float32")  # odd sizes pad unequally
    network = efficientnet_lite0(state)
    assert sum(np.prod(weight.shape) for weight in network.weights) == 4_694_073 - 49  # less the counters of batches
    made = network.predict(images, verbose=0)
    for name, right in zip(("pool", "logits"), derived(state, images), strict=True):
        np.testing.assert_allclose(made[name], right, atol=1e-4 * np.abs(right).max())


@pytest.mark.once
def test_the_features_are_those_of_pictures_from_minus_127_to_128_over_128():
    state = drawn_state()
    images = np.random.default_rng(2).integers(0, 256, (3, 64, 64, 3)).astype("uint8")
    features = EfficientNetLite0(state, size=64, batch_size=2)(images)
    right = efficientnet_lite0(state).predict((images.astype("float32") - 127) / 128, verbose=0)["pool"]
    np.testing.assert_allclose(features, right, atol=1e-4 * np.abs(right).max())
    assert features.shape == (3, 1280)
    assert not efficientnet_lite0().trainable_variables


@pytest.mark.once
def test_weights_that_do_not_match_are_named():
    with pytest.raises(ValueError, match=r"(?s)_conv_stem.weight"):
        efficientnet_lite0({"_fc.weight": np.zeros((1000, 1280), "float32")})
    with pytest.raises(ValueError, match="`output` must be one of"):
        EfficientNetLite0({}, output="softmax")
    assert isinstance(efficientnet_lite0(), keras.Model)
