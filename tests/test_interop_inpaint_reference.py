"""Inpainting by a network that takes no mask: `StableDiffusionInpaintPipeline` of diffusers makes the same pictures."""

import numpy as np
import pytest

from kdiff.guidance import ClassifierFree, Inpaint
from kdiff.interop import diffusers as interop
from tests import test_interop_prompts_reference as whole
from tests.test_interop_diffusers_reference import (
    PICTURES,
    draws,
    first,
    last,
    normal,
    one_thread,  # noqa: F401
    source_of,
    strength_of,
    without_draws,
)
from tests.toys import mostly_once

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # diffusers mixes NumPy 2 and tensors
]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

STEPS, X = 4, whole.X
TABLE = {name: whole.TABLE[name] for name in ("beta_start", "beta_end", "beta_schedule", "steps_offset")}
MASK = np.zeros((2, 16, 16, 1), "float32")  # 1 where it is painted; of pixels, not of latents, which are half as many
MASK[0, 3:12, 5:14] = MASK[1, :, 7:] = 1.0
LEADING = {**TABLE, "timestep_spacing": "leading"}
# Schedulers, and the strength. With PNDM and a strength below 1 diffusers begins within a step.
CASES = {
    "ddim": (diffusers.DDIMScheduler, whole.TABLE, 1.0),  # it ends at the first step of the process
    "ddim_half": (diffusers.DDIMScheduler, whole.TABLE, 0.5),
    "pndm": (diffusers.PNDMScheduler, {**TABLE, "skip_prk_steps": True}, 1.0),
    "euler": (diffusers.EulerDiscreteScheduler, LEADING, 1.0),
    "euler_half": (diffusers.EulerDiscreteScheduler, LEADING, 0.5),
    "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, LEADING, 1.0),
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Those of a folder of Stable Diffusion 1, whose network takes latents of 4 channels."""
    pipeline = whole.sd_1(tmp_path_factory.mktemp("parts"))
    return {**pipeline.components, "image_encoder": None}


@pytest.mark.parametrize("name", mostly_once(CASES, ("ddim",)))
def test_images(name, parts, tmp_path, monkeypatch):
    """Text, guidance, mask and autoencoder: the latents, and what they are decoded to."""
    kind, config, strength = CASES[name]
    parts = {**parts, "scheduler": kind(**config)}
    theirs = diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path)
    model = interop.load(tmp_path)

    noises, latents = [normal(2, 8, 8, 4, seed=10 + i) for i in range(STEPS)], []
    draws(monkeypatch, theirs, X, *noises)
    without_draws(monkeypatch)
    wanted = theirs(
        whole.TEXTS,
        image=source_of(PICTURES),
        mask_image=first(MASK),
        negative_prompt=whole.NEGATIVE,
        callback_on_step_end=lambda pipe, i, t, given: latents.append(last(given["latents"])) or given,
        **{"height": 16, "width": 16, "num_inference_steps": STEPS, "guidance_scale": 6.0, "strength": strength},
        output_type="np",
    ).images

    guidance = [ClassifierFree(6.0, negative={"text": whole.NEGATIVE}), Inpaint(PICTURES, MASK[:, ::2, ::2], X)]
    if strength < 1.0:
        begin = {"image": PICTURES, "noise": X, "strength": strength_of(model, STEPS, strength)}
    else:
        begin = {"x": X, "noise": (lambda step, shape: noises[step]) if name == "euler_ancestral" else None}
    options = {"text": whole.TEXTS, "guidance": guidance, "steps": STEPS, **begin}
    *_, end = model.sample_steps(2, preview="identity", **options)
    found = model.sample(2, **options)
    assert wanted.std() > 0.05
    assert np.abs(end.x - latents[-1]).max() <= 1e-5 * np.abs(latents[-1]).max()
    assert np.abs((found + 1.0) / 2.0 - wanted).max() < 1e-4
