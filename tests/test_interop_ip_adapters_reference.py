"""IP-Adapters of both kinds, in tiny pipelines of diffusers, which make the same images of a text and an image."""

import keras
import numpy as np
import pytest
from keras import ops

from kdiff import lora
from kdiff.encoders import ImagePrompt
from kdiff.encoders.pixels import prepared
from kdiff.interop import diffusers as interop
from kdiff.interop import encoders, ip_adapters
from tests.test_interop_prompts_reference import SIZES, TEXTS, TIME_IDS, X, perturbed, sd_1, xl
from tests.toys import mostly_once

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
library = pytest.importorskip("safetensors.torch")

VISION = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
    "projection_dim": 10,
}
IMAGES = np.random.default_rng(3).integers(0, 256, (2, 12, 12, 3), "uint8")


def arrays(shapes, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def base(width):
    norm = {"norm.weight": (width,), "norm.bias": (width,)}
    return arrays({"proj.weight": (4 * width, 10), "proj.bias": (4 * width,), **norm})


def plus(width, inner=16, count=3):
    """Of one head, whose 64 channels diffusers takes for granted, as it does the four layers."""
    shapes = {"latents": (1, count, inner), "proj_in.weight": (inner, 24), "proj_in.bias": (inner,)}
    shapes |= {"proj_out.weight": (width, inner), "proj_out.bias": (width,)}
    shapes |= {"norm_out.weight": (width,), "norm_out.bias": (width,)}
    for i in range(4):
        norms = {f"{name}.{kind}": (inner,) for name in ("0.norm1", "0.norm2", "1.0") for kind in ("weight", "bias")}
        own = {"0.to_q.weight": (64, inner), "0.to_kv.weight": (128, inner), "0.to_out.weight": (inner, 64)}
        hidden = {"1.1.weight": (4 * inner, inner), "1.3.weight": (inner, 4 * inner)}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in {**norms, **own, **hidden}.items()}
    return arrays(shapes)


def adapter(pipeline, make):
    """{"image_proj", "ip_adapter"} for the network of a pipeline."""
    width = pipeline.unet.config.cross_attention_dim
    attention = {}
    for i, name in enumerate(pipeline.unet.attn_processors):
        if name.endswith("attn2.processor"):
            own = pipeline.unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape
            attention |= {f"{i}.to_{one}_ip.weight": tuple(own) for one in "kv"}
    return {"image_proj": make(width), "ip_adapter": arrays(attention, 8)}


PIPELINES = {"sd_1": sd_1, "xl": xl}
KINDS = {"base": base, "plus": plus}


def given(name, kind, folder):
    """(diffusers' pipeline with the adapter, its file, kdiff's model, the folder of the encoder)."""
    pipeline = PIPELINES[name](folder)
    pipeline.save_pretrained(folder / "saved")
    model = interop.load(folder / "saved")
    vision = perturbed(transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION)))
    vision.save_pretrained(folder / "image_encoder")
    content = adapter(pipeline, KINDS[kind])
    flat = {f"{part}.{key}": array for part, state in content.items() for key, array in state.items()}
    library.save_file(flat, folder / "ip-adapter.safetensors")
    extractor = transformers.CLIPImageProcessor(size=12, crop_size=12)
    pipeline.register_modules(image_encoder=vision, feature_extractor=extractor)
    pipeline.load_ip_adapter(folder, subfolder="", weight_name="ip-adapter.safetensors", image_encoder_folder=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, folder / "ip-adapter.safetensors", model, folder / "image_encoder"


def theirs(pipeline, scale, name):
    from PIL import Image

    pipeline.set_ip_adapter_scale(scale)
    options = {"num_inference_steps": 2, "guidance_scale": 6.0, "output_type": "np"}
    options |= SIZES if name == "xl" else {"height": 16, "width": 16}
    latents = torch.tensor(X[:1].transpose(0, 3, 1, 2))
    picture = Image.fromarray(IMAGES[0])
    return 2.0 * pipeline(TEXTS[0], ip_adapter_image=picture, latents=latents, **options).images - 1.0


def ours(model, name, image=IMAGES[0], **options):
    ids = {"time_ids": TIME_IDS} if name == "xl" else {}
    given = {} if "image_prompt" not in model.network.conditions else {"image_prompt": image}
    return model.sample(1, text=TEXTS[0], guidance=6.0, steps=2, x=X[:1], **given, **ids, **options)


@pytest.mark.parametrize("case", mostly_once(["sd_1-base", "xl-plus", "sd_1-plus", "xl-base"]))
def test_images(case, tmp_path):
    """With scales; with a scale of 0 they are those of the text alone, and a saved model is what it was."""
    name, kind = case.split("-")
    pipeline, path, model, encoder = given(name, kind, tmp_path)
    plain = ours(model, name)
    ip_adapters.load(model, path, encoder, scale=0.7)
    wanted, found = theirs(pipeline, 0.7, name), ours(model, name)
    assert np.abs(found - plain).max() > 1e-3
    assert np.abs(found - wanted).max() < 2e-4  # 1e-4 of images in [0, 1]
    ip_adapters.set_scale(model, 0.0)
    np.testing.assert_allclose(ours(model, name), plain, atol=1e-5)
    if name == "sd_1":
        ip_adapters.set_scale(model, 0.7)
        assert np.abs(ours(model, name, None) - found).max() > 1e-3
        model.save(tmp_path / "model.keras")
        again = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_allclose(ours(again, name), found, atol=1e-5)
        assert len(again.trainable_variables) == len(model.trainable_variables)


@pytest.mark.once
def test_images_of_another_size(tmp_path):
    """Made smaller by the shorter side, and cut, as transformers' processor does it."""
    *_, folder = given("sd_1", "base", tmp_path)
    from PIL import Image

    encoder = encoders.load(folder)
    condition = ImagePrompt(keras.layers.Identity(), encoder)
    extractor = transformers.CLIPImageProcessor(size=12, crop_size=12)
    for sizes in ((40, 31), (12, 30), (7, 9)):
        image = np.random.default_rng(1).integers(0, 256, (*sizes, 3), "uint8")
        wanted = extractor(Image.fromarray(image), return_tensors="np").pixel_values.transpose(0, 2, 3, 1)
        found = prepared(image[None], condition.encoder.size)
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() < 1.1 / 255 / 0.26
        assert np.abs(found - wanted).mean() < 0.01 / 255 / 0.26
    floats = IMAGES / 127.5 - 1.0
    np.testing.assert_allclose(condition.rows(floats), condition.rows(IMAGES), atol=1e-4)
    np.testing.assert_allclose(condition.rows(IMAGES[0]), condition.rows(IMAGES)[0], atol=1e-5)
    np.testing.assert_array_equal(condition.rows(condition.rows(IMAGES)), condition.rows(IMAGES))


@pytest.mark.once
def test_nothing_of_it_learns_and_it_trains_in_mixed_precision(tmp_path):
    _, path, model, encoder = given("sd_1", "base", tmp_path)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        low = interop.load(tmp_path / "saved", ema=0.9)
        ip_adapters.load(low, path, encoder)
    finally:
        keras.config.set_dtype_policy("float32")
    ip_adapters.load(model, path, encoder)
    wanted, found = ours(model, "sd_1"), ours(low, "sd_1")
    assert np.abs(found - wanted).mean() < 0.05
    before = [(weight, ops.convert_to_numpy(weight).copy()) for weight in low.network.weights]
    lora.enable(low, 2)
    low.compile("adam")
    data = {"image": np.zeros((2, 16, 16, 3), "float32"), "text": TEXTS, "image_prompt": IMAGES}
    assert np.isfinite(low.fit(data, batch_size=2, verbose=0).history["loss"]).all()
    for weight, old in before:
        np.testing.assert_array_equal(ops.convert_to_numpy(weight), old, err_msg=weight.path)


@pytest.mark.once
def test_the_vector_of_an_image_without_an_encoder(tmp_path):
    """As diffusers takes `ip_adapter_image_embeds`."""
    _, path, model, encoder = given("sd_1", "base", tmp_path)
    other = interop.load(tmp_path / "saved")
    ip_adapters.load(model, path, encoder)
    ip_adapters.load(other, path)
    rows = model.network.conditions["image_prompt"].rows(IMAGES)
    assert rows.shape == (2, 10)
    np.testing.assert_allclose(ours(other, "sd_1", rows[0]), ours(model, "sd_1"), atol=1e-5)
    with pytest.raises(ValueError, match=r"rows of the shape \(10,\) are expected; received the shape: \(12, 12, 3\)"):
        ours(other, "sd_1")


@pytest.mark.once
@pytest.mark.parametrize("layer", ["perceiver_resampler.proj_in.weight", "proj.3.weight", "proj.2.weight"])
def test_other_kinds_are_refused_by_name(layer, tmp_path):
    _, path, model, encoder = given("sd_1", "base", tmp_path)
    state = library.load_file(path)
    state = {name: one for name, one in state.items() if not name.startswith("image_proj.")}
    with pytest.raises(ValueError, match=f"received the kind {ip_adapters.UNKNOWN[layer]}"):
        ip_adapters.load(model, {**state, f"image_proj.{layer}": torch.ones(2, 2)}, encoder)
    assert "image_prompt" not in model.network.conditions


@pytest.mark.once
def test_files_that_do_not_fit(tmp_path):
    _, path, model, folder = given("sd_1", "plus", tmp_path)
    state = library.load_file(path)
    with pytest.raises(ValueError, match="needs an `encoder`"):
        ip_adapters.load(model, path)
    with pytest.raises(ValueError, match=r"`skip=1`; received 24, and skip=0"):
        ip_adapters.load(model, path, encoders.load(folder))
    few = {name: one for name, one in state.items() if not name.startswith("ip_adapter.") or ".1." in name}
    with pytest.raises(ValueError, match="with 1 layers of attention to text; this one has 4"):
        ip_adapters.load(model, few, folder)
    with pytest.raises(ValueError, match="must have `image_proj` and `ip_adapter`"):
        ip_adapters.load(model, {"image_proj.latents": torch.ones(2)}, folder)
    few = {name: one for name, one in state.items() if name != "image_proj.norm_out.bias"}
    with pytest.raises(ValueError, match=r"missing: image_proj\.norm_out\.bias"):
        ip_adapters.load(model, few, folder)
    assert "image_prompt" not in model.network.conditions
    ip_adapters.load(model, path, folder)
    with pytest.raises(ValueError, match="without 'image_prompt'"):
        ip_adapters.load(model, path, folder)
    with pytest.raises(ValueError, match="`where` must match the path"):
        ip_adapters.set_scale(model, 0.5, "nowhere")
