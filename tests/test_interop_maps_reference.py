"""Networks of diffusers with more channels in than data has: the rest is a condition, a map; the output is the same."""

import json

import numpy as np
import pytest
from keras import ops

from kdiff import predictions
from kdiff.guidance import ClassifierFree
from kdiff.interop import diffusers as interop
from kdiff.interop import maps
from tests.test_interop_networks_reference import CROSS, PLAIN, SIZE, SMALL, normal, one_thread, perturbed, theirs  # noqa: F401

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


@pytest.mark.once
@pytest.mark.parametrize("pipeline", PIPELINES)
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
    with pytest.raises(ValueError, match=r"^file: the network has 4 input and 5 output channels"):
        maps.maps_of("", 4, 5, False, "file")


@pytest.mark.once
def test_a_whole_pipeline_of_inpainting(tmp_path):
    """Text, guidance, mask, masked image and autoencoder: the pictures of diffusers."""
    whole = pytest.importorskip("tests.test_interop_prompts_reference")
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = diffusers.StableDiffusionInpaintPipeline(
        vae=perturbed(diffusers.AutoencoderKL(**whole.VAE)),
        text_encoder=whole.text_encoder(eos_token_id=2),
        tokenizer=whole.words(tmp_path / "words", "<|endoftext|>"),
        unet=whole.unet(in_channels=9),
        scheduler=diffusers.DDIMScheduler(**whole.TABLE),
        **parts,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "saved")
    model = interop.load(tmp_path / "saved")
    mask, masked = (normal(2, SIZE, SIZE, 1, seed=5) > 0).astype("float32"), normal(2, SIZE, SIZE, 4, seed=6)
    wanted = pipeline(
        whole.TEXTS,
        image=torch.zeros(2, 3, 2 * SIZE, 2 * SIZE),
        mask_image=torch.tensor(mask.transpose(0, 3, 1, 2)).repeat_interleave(2, 2).repeat_interleave(2, 3),
        masked_image_latents=torch.tensor(masked.transpose(0, 3, 1, 2)),
        latents=torch.tensor(whole.X.transpose(0, 3, 1, 2)),
        **{"height": 16, "width": 16, "num_inference_steps": 4, "guidance_scale": 6.0, "strength": 1.0},
        output_type="np",
    ).images
    conditions = {"text": whole.TEXTS, "mask_image": mask, "masked_image": masked}
    found = model.sample(2, x=whole.X, guidance=ClassifierFree(6.0), steps=4, **conditions)
    assert wanted.std() > 0.05
    assert np.abs((found + 1.0) / 2.0 - wanted).max() < 1e-4
