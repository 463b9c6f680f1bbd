import keras
import numpy as np
import pytest
from keras import layers

from kdiff.evaluation import InceptionFID
from kdiff.evaluation.inception import BLOCKS, inception
from tests.toys import numpy

# The ends of the stages of pytorch-fid's network, in its order.
ENDS = ("convolution", "convolution", "convolution", "pool", "convolution", "convolution", "pool", *BLOCKS)


@pytest.fixture(scope="module")
def theirs():
    """(images, what each stage of pytorch-fid's network gives, the state dict), of random weights."""
    pytest.importorskip("torch")
    from tests import helpers_peers  # noqa: F401

    module = pytest.importorskip("pytorch_fid.inception", reason="pytorch-fid is not installed")
    import torch
    from torchvision.models import inception_v3

    generator, state = torch.Generator().manual_seed(0), {}

    def drawn(url, progress=True):
        plain = inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
        for name, width, pool in (("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)):
            setattr(plain, name, module.FIDInceptionA(width, pool))
        for name, weight in plain.state_dict().items():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                state[name] = noise * (2 / np.prod(weight.shape[1:])) ** 0.5
            elif name.endswith("running_var"):
                state[name] = 0.5 + noise.abs()
            else:
                state[name] = (0.2 * noise + name.endswith("bn.weight")).to(weight.dtype)
        return state

    kept, module.load_state_dict_from_url = module.load_state_dict_from_url, drawn
    network = module.InceptionV3([3], resize_input=False, normalize_input=False).eval()
    module.load_state_dict_from_url = kept
    ends = []
    for block in network.blocks:
        for part in block:
            part.register_forward_hook(lambda part, given, made: ends.append(made.numpy().transpose(0, 2, 3, 1)))
    images = np.random.default_rng(0).uniform(-1, 1, (2, 91, 107, 3)).astype("float32")
    with torch.no_grad():
        network(torch.tensor(images.transpose(0, 3, 1, 2)))
    return images, ends, {name: weight.numpy() for name, weight in state.items()}


def stages(network):
    relus, pools, joined = (
        [layer.output for layer in network.layers if isinstance(layer, kind)]
        for kind in (layers.ReLU, layers.MaxPooling2D, layers.Concatenate)
    )
    return [*relus[:3], pools[0], *relus[3:5], pools[1], *joined]


def test_every_stage_is_that_of_pytorch_fid(theirs):
    images, ends, state = theirs
    network = inception(state)
    outputs = [*stages(network), network.output["pool"], network.output["logits"]]
    found = [numpy(made) for made in keras.Model(network.input, outputs)(images, training=False)]
    pool = ends[-1][:, 0, 0]
    expected = [*ends[:-1], pool, pool @ state["fc.weight"].T]
    assert len(found) == len(expected) == len(ENDS) + 2
    for made, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(made, right, atol=1e-5 * np.abs(right).max())


@pytest.mark.once
def test_weights_that_do_not_match_are_named():

    with pytest.raises(ValueError, match=r"(?s)470 arrays.*Conv2d_1a_3x3.conv.weight"):
        inception({"fc.weight": np.zeros((1008, 2048), "float32")})
    with pytest.raises(ValueError, match="`output` must be one of"):
        InceptionFID({}, output="softmax")
