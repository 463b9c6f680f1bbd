"""The prior of Karlo and Kandinsky, made and saved by diffusers, gives the same embeddings in kdiff."""

import math

import keras
import numpy as np
import pytest

from kdiff import backend
from kdiff.interop import diffusers as interop
from kdiff.interop import priors
from tests.helpers_gradients import run

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 6,
    "num_layers": 2,
    "embedding_dim": 10,
    "num_embeddings": 7,
}
KARLO, KANDINSKY = {}, {"embedding_dim": 1280}
PARAMETERS = 1_022_030_080


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def perturbed(model, seed=0):
    """No weight is zero, or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
        model.clip_std.copy_(model.clip_std.abs() + 0.1)
    return model.eval()


def inputs():
    mask = np.arange(7) < np.array([[7], [3], [5]])
    given = {"image": normal(3, 10), "context": normal(3, 7, 10, seed=1), "text_embeds": normal(3, 10, seed=2)}
    return {**given, "time": np.array([0.0, 250.0, 999.0], "float32")}, mask


def theirs(model, given, mask):
    tensors = {name: torch.tensor(value) for name, value in given.items()}
    with torch.no_grad():
        return model(
            tensors["image"],
            tensors["time"],
            proj_embedding=tensors["text_embeds"],
            encoder_hidden_states=tensors["context"],
            attention_mask=torch.tensor(mask),
        ).predicted_image_embedding.numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("prior")
    model = perturbed(diffusers.PriorTransformer(**SMALL))
    model.save_pretrained(path)
    return path, model


def test_the_network(folder):
    """With padding, whose tokens change nothing."""
    path, model = folder
    network = interop.load(path)
    given, mask = inputs()
    ours = run(network, {**given, "context_mask": mask.astype("int32")})
    np.testing.assert_allclose(ours, theirs(model, given, mask), atol=2e-5, rtol=2e-5)
    given["context"] = np.where(mask[..., None], given["context"], 7.0)
    np.testing.assert_allclose(run(network, {**given, "context_mask": mask.astype("int32")}), ours, atol=1e-6)


@pytest.mark.once
def test_the_codec(folder):
    path, model = folder
    codec = priors.prior_codec(interop.folders.read_weights(path))
    x = normal(2, 10)
    with torch.no_grad():
        wanted = model.post_process_latents(torch.tensor(x)).numpy()
    np.testing.assert_allclose(keras.ops.convert_to_numpy(codec.decode(x)), wanted, atol=1e-6)


@pytest.mark.once
@pytest.mark.parametrize("config", [KARLO, KANDINSKY], ids=["karlo", "kandinsky"])
def test_the_published_sizes(config):
    """Without memory for them."""
    with torch.device("meta"):
        state = diffusers.PriorTransformer(**config).state_dict()
    described = priors.prior(config, "config.json")
    with backend.unallocated():
        described.network.build({"time": (None,), **described.shapes})
    found = {slot.name: math.prod(slot.variable.shape) for slot in priors.prior_slots(described.network)}
    assert found == {name: value.numel() for name, value in state.items() if name not in priors.OF_CODEC}
    if not config:
        assert sum(value.numel() for value in state.values()) == PARAMETERS
        assert sum(found.values()) + 2 * 768 == PARAMETERS


@pytest.mark.once
def test_what_it_refuses():
    with pytest.raises(ValueError, match="`norm_in_type` must be one of"):
        priors.prior({"norm_in_type": "layer"}, "config.json")
    with pytest.raises(ValueError, match="`time_embed_dim` must be the token width, 2048"):
        priors.prior({"time_embed_dim": 5}, "config.json")
