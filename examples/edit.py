"""Image editing with a trained model: inpainting, redrawing, interpolation and super-resolution.

    KERAS_BACKEND=jax python examples/edit.py runs/class-conditional-jax/model.keras --data-dir ~/tensorflow_datasets

It uses the model that examples/class_conditional.py saved, and writes one contact sheet. The loop is that of `sample`;
what is known of the image is a guidance rule, or the start of the run.
"""

import argparse
from pathlib import Path

import keras
import numpy as np

import kdiff
from kdiff import data, guidance, operators, pictures, times

STRENGTHS = [0.3, 0.5, 0.7, 0.9]
COLUMNS = 6
DDIM = kdiff.Sampler("ddim", "trailing")  # an invertible solver
ANCESTRAL = kdiff.Sampler("ddpm", times.Jumps("trailing", length=5, repeats=4))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a saved DiffusionModel whose condition is a label")
    parser.add_argument("--dataset", default="fashion_mnist", help="the data set whose test images are edited")
    parser.add_argument("--data-dir", help="the folder of TensorFlow Datasets")
    parser.add_argument("--download", action="store_true", help="download the TensorFlow Dataset if it is missing")
    parser.add_argument("--steps", type=int, default=30, help="steps per run; three times as many for DPS")
    parser.add_argument("--out", type=Path, default=Path("runs") / f"edit-{keras.backend.backend()}")
    return parser.parse_args()


def inpainting(model, image, label, steps) -> list[tuple]:
    """The lower half inpainted, four times, with resampling jumps (RePaint)."""
    mask = np.zeros(image.shape[:2])
    mask[image.shape[0] // 2 :] = 1
    hole = np.where(mask[..., None] > 0, 0.0, image)
    painted = model.sample(4, sampler=ANCESTRAL, steps=steps, guidance=guidance.Inpaint(image, mask), label=label)
    return [("image", image), ("lower half cut", hole), *(("painted", one) for one in painted)]


def redrawing(model, image, label, other, name, steps) -> list[tuple]:
    """The image as another class: noise is added up to a strength, and removed for the other label (SDEdit)."""
    rows = [
        model.sample(1, sampler=DDIM, steps=steps, image=image, strength=s, guidance=3.0, label=other)[0]
        for s in STRENGTHS
    ]
    again = model.sample(
        1,
        sampler=DDIM,
        steps=steps,
        x=model.invert(image[None], sampler=DDIM, steps=steps, iterations=3, label=label),
        label=label,
    )
    captions = [f"as {name}, {strength:g}" for strength in STRENGTHS]
    return [("image", image), ("inverted and reconstructed", again[0]), *zip(captions, rows, strict=True)]


def blending(model, first, second, label, steps) -> list[tuple]:
    """From one image to another of its class, by interpolation of their inverted noise."""
    noise = model.invert(np.stack([first, second]), sampler=DDIM, steps=steps, iterations=3, label=label)
    fractions = np.linspace(0, 1, COLUMNS)
    path = model.sample(COLUMNS, sampler=DDIM, steps=steps, x=kdiff.random.slerp(*noise, fractions), label=label)
    return [(f"{fraction:.0%} of the way", one) for fraction, one in zip(fractions, path, strict=True)]


def sharpening(model, image, label, steps) -> list[tuple]:
    """Super-resolution and deblurring: images that agree with a measurement."""
    rows = [("image", image)]
    for name, operator in (("4 times smaller", operators.Downsample(4)), ("blurred", operators.Blur.gaussian(2.0))):
        y = keras.ops.convert_to_numpy(operator(image[None]))[0]
        restored = model.sample(
            1, sampler=DDIM, steps=steps, guidance=guidance.PiGDM(operator, y, std=0.03), label=label
        )[0]
        size = image.shape[0] // y.shape[0]
        rows += [(name, y.repeat(size, 0).repeat(size, 1)), ("restored", restored)]
    y = keras.ops.convert_to_numpy(operators.Downsample(4)(image[None]))[0]
    rule = guidance.DPS(operators.Downsample(4), y, 0.5)
    restored = model.sample(1, sampler="ddpm", steps=3 * steps, guidance=rule, label=label)[0]
    return [*rows, ("by DPS", restored)]


def main() -> None:
    options = arguments()
    model = keras.saving.load_model(options.model)
    size = model.shapes["image"][1]
    source = {"data_dir": options.data_dir, "download": options.download, "split": "test", "labels": True}
    dataset = data.images(options.dataset, size, 64, shuffle=False, **source)
    batch = {name: value.numpy() for name, value in next(iter(dataset)).items()}
    names, label = dataset.class_names, int(batch["label"][0])
    alike = batch["image"][batch["label"] == label]
    image, second = alike[0], alike[1]
    other = (label + 1) % len(names)

    rows = [
        *inpainting(model, image, label, options.steps),
        *redrawing(model, image, label, other, names[other], options.steps),
        *blending(model, image, second, label, options.steps),
        *sharpening(model, image, label, options.steps),
    ]
    captions, images = zip(*rows, strict=True)
    path = pictures.save_png(options.out / "edits.png", np.stack(images), COLUMNS, captions=captions)
    print(f"Done: {path.resolve()}")


if __name__ == "__main__":
    main()
