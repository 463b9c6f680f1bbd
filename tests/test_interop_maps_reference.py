"""Networks of diffusers with more channels in than data has: the rest is a condition, a map; the output is the same."""

import json

import numpy as np
import pytest
from keras import ops

from kdiff import predictions
from kdiff.interop import diffusers as interop
from kdiff.interop import maps
from tests.test_interop_networks_reference import CROSS, PLAIN, SIZE, SMALL, normal, one_thread, perturbed, theirs  # noqa: F401
from tests.toys import mostly_once

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

T = np.array([3.0, 977.0], "float32")
CONTEXT = normal(2, 5, 12, seed=9)
# Pipeline: channels in, out; whether the variance is learned; the channels of what is concatenated, in its order, with
# None for x_t.
PIPELINES = {
    "StableDiffusionInpaintPipeline": (9, 4, False, {None: 4, "mask_image": 1, "masked_image": 4}),
    "KandinskyV22InpaintPipeline": (9, 8, True, {None: 4, "masked_image": 4, "mask_image": 1}),
    "StableDiffusionInstructPix2PixPipeline": (8, 4, False, {None: 4, "source": 4}),
    "StableDiffusionUpscalePipeline": (7, 4, False, {None: 4, "low": 3}),
    "MarigoldDepthPipeline": (8, 4, False, {"picture": 4, None: 4}),
    "MarigoldIntrinsicsPipeline": (12, 8, False, {"picture": 4, None: 8}),
    "IFSuperResolutionPipeline": (6, 6, True, {None: 3, "low": 3}),
    "DDPMPipeline": (6, 3, False, {None: 3, "beside": 3}),
    "SR3Pipeline": (6, 6, True, {None: 3, "beside": 3}),
}


def saved(folder, pipeline, inputs, outputs, learned, crossed):
    kind = diffusers.UNet2DConditionModel if crossed else diffusers.UNet2DModel
    types = CROSS if crossed else PLAIN
    unet = perturbed(kind(**{**SMALL, **types, "in_channels": inputs, "out_channels": outputs}))
    unet.save_pretrained(folder / "unet")
    options = {"variance_type": "learned_range"} if learned else {}
    diffusers.DDPMScheduler(**options).save_pretrained(folder / "scheduler")
    index = {"_class_name": pipeline, "unet": ["diffusers", kind.__name__], "scheduler": ["diffusers", "DDPMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return unet


@pytest.mark.parametrize("pipeline", mostly_once(PIPELINES))
def test_maps(pipeline, tmp_path):
    inputs, outputs, learned, parts = PIPELINES[pipeline]
    crossed = pipeline not in ("DDPMPipeline", "SR3Pipeline")
    unet = saved(tmp_path, pipeline, inputs, outputs, learned, crossed)
    model = interop.load(tmp_path)
    arrays = {name: normal(2, SIZE, SIZE, n, seed=i) for i, (name, n) in enumerate(parts.items())}
    context = {"encoder_hidden_states": CONTEXT} if crossed else {}
    wanted = theirs(unet, np.concatenate(list(arrays.values()), -1), T, **context)
    conditions = {"context": CONTEXT} if crossed else {}
    given = {"image": arrays.pop(None), "time": T, **arrays, **conditions}
    np.testing.assert_allclose(ops.convert_to_numpy(model.network(given)), wanted, atol=1e-5)
    assert isinstance(model.prediction, predictions.LearnedVariance) == learned
    assert model.sample(2, steps=1, **arrays, **conditions).shape == (2, SIZE, SIZE, parts[None])
    interop.save(model, tmp_path / "again")
    assert not (tmp_path / "again" / "model_index.json").exists()  # nothing of diffusers would run it
    again = type(unet).from_pretrained(tmp_path / "again" / "unet").eval()
    ours = np.concatenate([given["image"], *arrays.values()], -1)
    np.testing.assert_allclose(theirs(again, ours, T, **context), wanted, atol=1e-5)


@pytest.mark.once
def test_a_network_alone_is_what_it_was(tmp_path):
    unet = saved(tmp_path, "DDPMPipeline", 6, 3, False, False)
    x = normal(2, SIZE, SIZE, 6)
    given = interop.load(tmp_path / "unet")({"image": x, "time": T})
    np.testing.assert_allclose(ops.convert_to_numpy(given), theirs(unet, x, T), atol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize(
    ("numbers", "wanted"),
    [
        (("StableDiffusionInpaintPipeline", 4, 4, False), {}),
        (("", 4, 8, False), {}),
        (("", 6, 6, False), {}),
        (("", 6, 6, True), {"beside": 3}),
        (("IFSuperResolutionPipeline", 6, 6, False), {"low": 3}),
    ],
)
def test_channels(numbers, wanted):
    assert maps.maps_of(*numbers, "file") == wanted


@pytest.mark.once
def test_channels_of_no_network():
    with pytest.raises(ValueError, match=r"^file: the network has 4 channels in and 5 out"):
        maps.maps_of("", 4, 5, False, "file")
