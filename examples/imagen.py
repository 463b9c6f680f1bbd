"""A small Imagen from scratch: captioned pictures of 16 pixels, enlarged to 32 and 64 by two further models.

    KERAS_BACKEND=jax python examples/imagen.py "a small red circle" "a large blue square on a white background"

Saharia et al., "Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding" (2022). The base model
is conditioned on text by an encoder trained with it, or by a frozen T5 from a folder (--t5), and sampled with guidance
and dynamic thresholding. Each super-resolution stage, an Efficient U-Net, computes its low-resolution input from the
batch, and sees it noised at a level that is a further input. It measures:

    what a program reads in the pictures after each stage
    the PSNR of the result, downsampled, to the input of a stage, in dB, which falls with the noise
    the Frechet distance to real pictures of enlarged samples of the base, and of one that was hardly trained: by the
    first super-resolution stage, by one trained for the same time without that noise, and by bicubic interpolation

The distance is between Gaussians of all squares of 8 x 8 pixels, each less its mean colour: it measures edges and
corners, not content; it needs the extra `evaluation`. --minutes are CPU minutes. Each model is saved when it is
trained, and the cascade, which can draw other prompts: --model FOLDER/imagen.keras.

Other pictures, such as emoji, can be read from a folder, with captions in files of the same name, cat.png and cat.txt:
--folder (which needs the extra `data`). A tenth of them is the test set. No program reads those.
"""

import argparse
from pathlib import Path

import keras
import numpy as np
from dalle2 import LENGTH, Clock, drawn, read_right, train

import kdiff
from kdiff import operators, pictures, scenes
from kdiff.blocks import Concat, TextEncoder, TransformerBlock
from kdiff.blocks.resizing import resized
from kdiff.encoders import Prompt
from kdiff.evaluation import frechet_distance
from kdiff.guidance import ClassifierFree, DynamicThreshold
from kdiff.networks import DiT, published

PROMPTS = (
    "a small red circle",
    "a large blue square on a white background",
    "a large yellow triangle on a gray background",
)
SHARES = (0.32, 0.2, 0.26, 0.2, 0.02)  # of the time: of the stages, of that without noise, of the poor base
RATES = (2e-3, 1e-3, 1e-3, 1e-3, 2e-3)
LEVELS = (0.05, 0.1, 0.2, 0.3)
MAX_LEVEL = 0.3  # in training; of levels up to 1 the highest take most of the loss, and pictures stay blurred
LEVEL = 0.1  # the noise level in sampling
PATCH = 8  # the side of the squares of the Frechet distance, in pixels


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", help="by default three of shapes, or those of the test set of a folder")
    parser.add_argument("--minutes", type=float, default=80, help="CPU minutes of training")
    parser.add_argument(
        "--sizes", type=int, nargs=3, default=[16, 32, 64], help="the sizes of the pictures, multiples of 8"
    )
    parser.add_argument("--pictures", type=int, default=10000, help="the number of training pictures")
    parser.add_argument("--folder", type=Path, help="a folder of pictures with captions, instead of shapes")
    parser.add_argument(
        "--things", type=int, default=1, choices=(1, 2), help="the maximum number of objects in a picture"
    )
    parser.add_argument(
        "--batch-size", type=int, default=64, help="half of it for the base, a quarter for the second stage, and so on"
    )
    parser.add_argument("--width", type=int, default=128, help="a multiple of 32; the base has half, a U-Net a quarter")
    parser.add_argument("--t5", type=Path, help="a folder of transformers with a T5 and its tokenizer")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps")
    parser.add_argument("--test", type=int, default=400, help="the number of pictures that are sampled and read")
    parser.add_argument("--model", type=Path, help="a cascade saved by this program, instead of training one")
    parser.add_argument("--out", type=Path, default=Path("runs") / f"imagen-{keras.backend.backend()}")
    return parser.parse_args()


def some(options: argparse.Namespace, size: int, count: int, test: bool = False) -> tuple[np.ndarray, list[str]]:
    """Up to `count` pictures, uint8, and their captions."""
    if not options.folder:
        return drawn(count, options.things, size, seed=int(test))
    split = "train[90%:]" if test else "train[:90%]"
    batches = list(kdiff.data.images(options.folder, size, 1, split=split, text=True, shuffle=False).take(count))
    images = np.concatenate([batch["image"] for batch in batches])
    return np.round(127.5 * (images + 1)).astype("uint8"), [batch["text"].numpy()[0].decode() for batch in batches]


def words_of(options: argparse.Namespace, captions: list[str]):
    """A function that builds the text condition of a network: all stages share a frozen encoder."""
    if options.t5:
        from kdiff.interop import encoders, tokenizers

        prompt = Prompt(encoders.load(options.t5), tokenizers.load(options.t5, LENGTH), masked=True, dropout=0.1)
        return lambda: prompt.through(None)
    tokenizer = kdiff.text.BytePair.learn(captions, vocabulary_size=320, length=LENGTH)
    return lambda: TextEncoder(tokenizer, options.width // 2, depth=1, dropout=0.1)


def base_of(options: argparse.Namespace, words, name: str = "base") -> kdiff.DiffusionModel:
    """A narrow transformer on small patches that attends to the words."""
    block = TransformerBlock(heads=4, adaptive=True, gated=True)
    network = DiT(options.width // 2, depth=3, patch=2, block=block, conditions={"text": words()})
    rules = [ClassifierFree(1.5), DynamicThreshold(0.995)]
    sampler = kdiff.Sampler("dpm_solver_pp", "trailing", options.steps, rules)
    return kdiff.DiffusionModel(network, "cosine", "data", sampler=sampler, ema=0.995, name=name)


def larger_of(options: argparse.Namespace, words, factor: int, noise, name: str) -> kdiff.DiffusionModel:
    """A super-resolution model; `noise` is the schedule of its noised input, None for no noise."""
    small = operators.Downsample(factor)
    low = Concat("bicubic", noise=noise, noise_first=noise is not None, max_level=MAX_LEVEL, level=LEVEL, of=small)
    network = published.efficient(options.width // 4, levels=2, conditions={"low": low, "text": words()})
    sampler = kdiff.Sampler("dpm_solver_pp", "trailing", options.steps)
    return kdiff.DiffusionModel(network, "cosine", "data", sampler=sampler, ema=0.99, name=name)


def learn(options: argparse.Namespace) -> tuple[kdiff.Cascade, kdiff.DiffusionModel, kdiff.DiffusionModel]:
    """(the cascade, its second stage without noise, a base that is hardly trained)."""
    sizes, (_, captions) = options.sizes, some(options, options.sizes[0], options.pictures)
    words, schedule = words_of(options, captions), kdiff.schedules.Cosine()
    twice, again = sizes[1] // sizes[0], sizes[2] // sizes[1]
    stages = [
        base_of(options, words),
        larger_of(options, words, twice, schedule, "second"),
        larger_of(options, words, again, schedule, "third"),
        larger_of(options, words, twice, None, "second-without-noise"),
        base_of(options, words, "poor-base"),
    ]
    for stage, size, share, rate in zip(stages, [*sizes, sizes[1], sizes[0]], SHARES, RATES, strict=True):
        images, captions = some(options, size, options.pictures)
        batch_size = options.batch_size // 2 if size == sizes[0] else options.batch_size * sizes[0] ** 2 // size**2
        train(stage, {"image": images, "text": captions}, Clock(share * options.minutes, rate), max(4, batch_size))
        stage.save(options.out / f"{stage.name}.keras")
    cascade = kdiff.Cascade(stages[:3])
    cascade.save(options.out / "imagen.keras")
    return cascade, stages[3], stages[4]


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    """The PSNR of pictures in [-1, 1]."""
    return float(10 * np.log10(4 / np.mean((a - b) ** 2)))


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The Frechet distance of squares of pixels, less their mean colour."""

    def squares(x):
        count, size = len(x), x.shape[1] // PATCH
        x = x.astype("float64").reshape(count, size, PATCH, size, PATCH, 3)
        x = x.swapaxes(2, 3).reshape(-1, PATCH * PATCH, 3)
        return (x - x.mean(1, keepdims=True)).reshape(len(x), -1)

    moments = [(y.mean(0), np.cov(y.T)) for y in map(squares, (a, b))]
    return frechet_distance(*moments[0], *moments[1])


def follow(cascade: kdiff.Cascade, options: argparse.Namespace) -> None:
    """Enlarges true small pictures with each stage, at several noise levels."""
    for i in (1, 2):
        images, captions = some(options, options.sizes[i], min(100, options.test), test=True)
        images, small = images / 127.5 - 1, cascade.stages[i].network.conditions["low"].of
        low, stage = keras.ops.convert_to_numpy(small(images)), kdiff.Cascade(cascade.stages[i - 1 : i + 1])
        sizes, factor = f"{low.shape[1]} to {images.shape[1]} pixels", images.shape[1] // low.shape[1]
        rows = [np.repeat(np.repeat(low, factor, 1), factor, 2)]
        for level in LEVELS:
            rows.append(stage.sample(len(images), text=captions, low=low, level=level))
            back = keras.ops.convert_to_numpy(small(rows[-1]))
            truth = decibels(rows[-1], images)
            print(f"{sizes}, level {level}: {decibels(back, low):.1f} dB to the input, {truth:.1f} to the ground truth")
        pictures.save_png(options.out / f"levels-{i}.png", np.concatenate([*(row[:8] for row in rows), images[:8]]), 8)


def compare(options: argparse.Namespace, cascade: kdiff.Cascade, plain, poor, captions: list[str], images) -> None:
    """Enlarges samples of both bases in three ways; `plain` is the stage without noise."""
    rows, given = [], {"text": captions, "seed": 0}
    print("Frechet distance to real pictures of enlarged samples:")
    for base in (cascade.stages[0], poor):
        small = base.sample(len(captions), **given)
        made = {"bicubic": keras.ops.convert_to_numpy(resized(small, images.shape[1:3], "bicubic"))}
        for name, stage in {"without noise": plain, "with noise": cascade.stages[1]}.items():
            made[name] = kdiff.Cascade([base, stage]).sample(len(captions), low=small, **given)
        rows += [x[:8] for x in made.values()]
        print(f"  of the {base.name}:", ", ".join(f"{name} {frechet(x, images):.3f}" for name, x in made.items()))
        if not options.folder:
            read = ", ".join(f"{name} {read_right(x, captions):.1%}" for name, x in made.items())
            print(f"    read as in the caption:  small {read_right(small, captions):.1%}, {read}")
    pictures.save_png(options.out / "augmentation.png", np.concatenate(rows), 8)


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    images, captions = some(options, options.sizes[1], options.test, test=True)
    count, prompts = len(images), options.prompts or (captions[:3] if options.folder else PROMPTS)
    if not options.folder:
        prompts = [
            scenes.Scene.parse(prompt).caption for prompt in prompts
        ]  # in the vocabulary of the training captions
    cascade, *others = (keras.saving.load_model(options.model),) if options.model else learn(options)
    stages = list(cascade.sample_stages(count, text=captions))
    for made in stages if not options.folder else ():
        print(f"{made.shape[1]} pixels: of {count}, read as in the caption:  {read_right(made, captions):.1%}")
    follow(cascade, options)
    if others:
        compare(options, cascade, *others, captions, images / 127.5 - 1)
    texts = [prompt for prompt in prompts for _ in range(4)]
    for i, made in enumerate(cascade.sample_stages(len(texts), text=texts, seed=1)):
        pictures.save_png(options.out / f"prompts-{i}.png", made, 4, captions=texts)
    more = ", augmentation.png, imagen.keras" if others else ""
    print("prompts-*.png:", "; ".join(prompts))
    print(f"In {options.out.resolve()}: prompts-*.png, levels-*.png{more}")


if __name__ == "__main__":
    main()
