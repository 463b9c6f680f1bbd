"""Imagen, small: captioned shapes at 16 x 16 from their sentences, made 32 x 32 and 64 x 64 by two more models.

    KERAS_BACKEND=jax python examples/imagen.py "a small red circle above a large blue square"

The base learns text and layout, as examples/text_to_image.py does. Each super-resolution stage makes its small pictures
of the batch itself, sees them with noise of a level that it is told (noise conditioning augmentation), and predicts v.
What is printed at the end:

    the PSNR of the result made small again against the picture that was given, by level: high where the level is low
    what a program reads in pictures of held-out captions, after the base and after each stage

Training takes --minutes for each stage. --model FOLDER/imagen.keras draws with a cascade that was saved.
"""

import argparse
import time
from pathlib import Path

import keras
import numpy as np

import kdiff
from kdiff import data, operators, pictures, scenes
from kdiff.blocks import Beside, TextEncoder, TransformerBlock
from kdiff.guidance import ClassifierFree, DynamicThreshold

PROMPTS = (
    "a large yellow triangle below a small green circle on a gray background",
    "a small red circle above a large blue square on a white background",
    "a large purple square left of a large orange circle",
    "a small blue triangle",
)
LEVELS = (0.05, 0.2, 0.5)
LEVEL = 0.1
RATE = 1e-3


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", default=PROMPTS)
    parser.add_argument("--minutes", type=float, nargs="+", default=[20, 15, 20], help="of training, by stage")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64], help="of the pictures of each stage")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--width", type=int, default=128, help="of the base; of a U-Net's first level a quarter")
    parser.add_argument("--test", type=int, default=200, help="how many held-out captions are drawn and read")
    parser.add_argument("--model", type=Path, help="a cascade that this program has saved, not to train one")
    parser.add_argument("--out", type=Path, default=Path("runs") / f"imagen-{keras.backend.backend()}")
    options = parser.parse_args()
    if len(options.minutes) not in (1, len(options.sizes)):
        parser.error(f"--minutes must be one number, or one for each of --sizes; received: {options.minutes}")
    options.minutes = options.minutes * (len(options.sizes) if len(options.minutes) == 1 else 1)
    return options


class Clock(keras.callbacks.Callback):
    """Lets the learning rate fall with the time that is left, and ends training when there is none."""

    def __init__(self, minutes: float, rate: float):
        super().__init__()
        self.seconds, self.rate = 60 * minutes, rate

    def on_train_begin(self, logs=None):
        self.start = time.monotonic()

    def on_epoch_begin(self, epoch, logs=None):
        left = max(0.0, 1.0 - (time.monotonic() - self.start) / self.seconds)
        self.model.optimizer.learning_rate = self.rate * min(1.0, (epoch + 1) / 4) * (0.02 + 0.98 * left)

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = time.monotonic() - self.start > self.seconds


def base(options: argparse.Namespace, tokenizer: kdiff.text.Tokenizer) -> kdiff.DiffusionModel:
    """A transformer that attends to the words; guidance and a dynamic threshold, as in the paper."""
    network = kdiff.networks.DiT(
        options.width,
        depth=4,
        patch=4,
        block=TransformerBlock(heads=8, adaptive=True, gated=True),
        conditions={"text": TextEncoder(tokenizer, options.width, depth=2, dropout=0.1)},
    )
    rules = [ClassifierFree(1.5), DynamicThreshold(0.995, 1.5)]
    sampler = kdiff.Sampler("dpm_solver_pp", "trailing", 20, rules)
    model = kdiff.DiffusionModel(network, prediction="data", sampler=sampler, ema=0.995)
    decay = {"weight_decay": 0.01, "adam_weight_decay": 0.01}
    model.compile(keras.optimizers.Muon(RATE, exclude_layers=["head", "table"], clipnorm=1.0, **decay))
    return model


def larger(options: argparse.Namespace, factor: int, tokenizer: kdiff.text.Tokenizer) -> kdiff.DiffusionModel:
    """A U-Net that sees the picture before it, and the sentence as one vector."""
    low = Beside(
        "bicubic",
        noise=kdiff.schedules.Cosine(),
        noise_first=True,
        level=LEVEL,
        of=operators.Downsample(factor),
    )
    width = options.width // 4
    text = TextEncoder(tokenizer, options.width // 2, depth=1, pooled=True, dropout=0.1)
    network = kdiff.networks.UNet.residual(width, 3, 1, conditions={"low": low, "text": text})
    sampler = kdiff.Sampler("dpm_solver_pp", "trailing", 12)
    model = kdiff.DiffusionModel(network, prediction="velocity", weighting="min_snr", sampler=sampler, ema=0.99)
    model.compile(keras.optimizers.Adam(2 * RATE, clipnorm=1.0))
    return model


def train(options: argparse.Namespace) -> kdiff.Cascade:
    _, captions = scenes.dataset(1000, options.sizes[0])
    tokenizer = kdiff.text.BytePair.learn(captions, vocabulary_size=512, length=16)
    stages = [base(options, tokenizer)]
    for before, size in zip(options.sizes, options.sizes[1:], strict=False):
        stages.append(larger(options, size // before, tokenizer))
    for i, (stage, size, minutes) in enumerate(zip(stages, options.sizes, options.minutes, strict=True)):
        print(f"Stage {i}, {size} x {size}, for {minutes} minutes")
        batch = options.batch_size if i == 0 else max(8, options.batch_size * options.sizes[0] ** 2 // size**2)
        dataset = data.images("shapes", size, batch, text=True, text_encoder=tokenizer, repeat=None)
        clock = Clock(minutes, RATE if i == 0 else 2 * RATE)
        stage.fit(dataset, epochs=10**6, steps_per_epoch=20, callbacks=[clock], verbose=2)
    cascade = kdiff.Cascade(stages)
    cascade.save(options.out / "imagen.keras")
    return cascade


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """In dB, of pictures in [-1, 1]."""
    return float(10 * np.log10(4 / np.mean((a - b) ** 2)))


def follow(cascade: kdiff.Cascade, count: int, folder: Path) -> None:
    """How near the result, made small again, is to the picture that a stage was given: by level."""
    for i, stage in enumerate(cascade.stages[1:], 1):
        size = stage.shapes["image"][1]
        images, captions = scenes.dataset(count, size, held_out=True, seed=2)
        of = stage.network.conditions["low"].of
        low = keras.ops.convert_to_numpy(of(images / 127.5 - 1))
        some = kdiff.Cascade([cascade.stages[i - 1], stage])
        rows = [np.repeat(np.repeat(low[:8], size // low.shape[1], 1), size // low.shape[1], 2)]
        for level in LEVELS:
            made = some.sample(count, text=captions, low=low, level=level)
            back = keras.ops.convert_to_numpy(of(made))
            truth = psnr(made, images / 127.5 - 1)
            print(f"Stage {i}, level {level}: {psnr(back, low):.1f} dB to what was given, {truth:.1f} dB to the truth")
            rows.append(made[:8])
        pictures.save_png(folder / f"levels-{i}.png", np.concatenate([*rows, (images / 127.5 - 1)[:8]]), 8)


def read(cascade: kdiff.Cascade, count: int, folder: Path) -> None:
    """What share of the held-out captions is drawn as they say, after each stage."""
    _, captions = scenes.dataset(count, 16, held_out=True, seed=1)
    for i, images in enumerate(cascade.sample_stages(count, text=captions)):
        right = [
            scenes.same(seen, scenes.Scene.parse(caption))
            for seen, caption in zip(map(scenes.read, images), captions, strict=True)
        ]
        print(f"After stage {i}, {images.shape[1]} x {images.shape[1]}: {np.mean(right):.1%} of {count} are read right")
        pictures.save_png(folder / f"held-out-{i}.png", images[:24], 6, captions=captions[:24])


def main() -> None:
    options = arguments()
    prompts = [scenes.Scene.parse(prompt).caption for prompt in options.prompts]  # in the words of training
    cascade = keras.saving.load_model(options.model) if options.model else train(options)
    follow(cascade, min(options.test, 64), options.out)
    read(cascade, options.test, options.out)
    texts = list(np.repeat(prompts, 4))
    for i, images in enumerate(cascade.sample_stages(len(texts), text=texts, seed=1)):
        pictures.save_png(options.out / f"prompts-{i}.png", images, 4, captions=texts)
    print(f"In {options.out.resolve()}: prompts-*.png, held-out-*.png, levels-*.png")


if __name__ == "__main__":
    main()
