"""Text to image from scratch: a network and a text encoder, trained on generated, captioned pictures.

    KERAS_BACKEND=jax python examples/text_to_image.py "a small red circle above a large blue square"

The captions describe one or two coloured shapes; one in eight of the pairs of coloured shapes never occurs in training.
These are the test set: a program reads the pictures that the model draws for them, and the share that is correct in
every colour, shape, size and relation is printed. Training takes --minutes, the rest one or two more. The saved model
draws other prompts directly: --model FOLDER/model.keras. A prompt without a background means a black one.
"""

import argparse
import math
import time
from pathlib import Path

import keras
import numpy as np

import kdiff
from kdiff import data, pictures, scenes
from kdiff.blocks import TextEncoder, TransformerBlock

SAMPLER = kdiff.Sampler("dpm_solver_pp", "trailing", steps=20, guidance=kdiff.guidance.ClassifierFree(1.5))
RATE = 1e-3
PROMPTS = (
    "a large yellow triangle below a small green circle on a gray background",
    "a small red circle above a large blue square on a white background",
    "a large purple square left of a large orange circle",
    "a small blue triangle",
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", default=PROMPTS)
    parser.add_argument("--minutes", type=float, default=18, help="minutes of training")
    parser.add_argument("--image-size", type=int, default=16, help="a multiple of 4")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--width", type=int, default=128, help="the width of the network, a multiple of 8")
    parser.add_argument("--test", type=int, default=200, help="the number of held-out prompts that are drawn and read")
    parser.add_argument("--model", type=Path, help="a model saved by this program, instead of training one")
    parser.add_argument("--out", type=Path, default=Path("runs") / f"text-to-image-{keras.backend.backend()}")
    return parser.parse_args()


class Clock(keras.callbacks.Callback):
    """Decays the learning rate with the remaining time, and stops training at the end."""

    def __init__(self, seconds: float, rate: float):
        super().__init__()
        self.seconds, self.rate = seconds, rate

    def on_train_begin(self, logs=None):
        self.start = time.monotonic()

    def on_epoch_begin(self, epoch, logs=None):
        spent = min(1.0, (time.monotonic() - self.start) / self.seconds)
        warm = min(1.0, (epoch + 1) / 4)
        self.model.optimizer.learning_rate = warm * self.rate * (0.01 + 0.5 * (1 + math.cos(math.pi * spent)))

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = time.monotonic() - self.start > self.seconds


def train(options: argparse.Namespace, prompts: list[str]) -> kdiff.DiffusionModel:
    """Trains a transformer that attends to the words.

    Flat pictures show little of their content in the noise, so it predicts the data. Muon needs far fewer steps than
    AdamW to learn which words refer to which place.
    """
    _, captions = scenes.dataset(1000, options.image_size)
    tokenizer = kdiff.text.BytePair.learn(captions, vocabulary_size=512, length=16)
    dataset = data.images(
        "shapes", options.image_size, options.batch_size, text=True, text_encoder=tokenizer, repeat=None
    )
    network = kdiff.networks.DiT(
        options.width,
        depth=4,
        patch=4,
        block=TransformerBlock(heads=8, adaptive=True, gated=True),
        conditions={"text": TextEncoder(tokenizer, options.width, depth=2, dropout=0.1)},
    )
    model = kdiff.DiffusionModel(network, prediction="data", sampler=SAMPLER, ema=0.995)
    decay = {"weight_decay": 0.01, "adam_weight_decay": 0.01}
    model.compile(keras.optimizers.Muon(RATE, exclude_layers=["head", "table"], clipnorm=1.0, **decay))
    watch = kdiff.SampleCallback(
        options.out / "training", every=20, num_samples=len(prompts), conditions={"text": prompts}, columns=4
    )
    clock = Clock(60 * options.minutes, RATE)
    model.fit(dataset, epochs=10**6, steps_per_epoch=50, callbacks=[clock, watch], verbose=2)
    model.save(options.out / "model.keras")
    return model


def measure(model: kdiff.DiffusionModel, count: int, folder: Path) -> None:
    """Measures the share of held-out prompts that are drawn correctly."""
    size = model.shapes["image"][1]
    _, captions = scenes.dataset(count, size, held_out=True, seed=1)
    images = model.sample(count, text=captions)
    pictures.save_png(folder / "held-out.png", images[:24], 6, captions=captions[:24])
    pairs = [(scenes.read(image), scenes.Scene.parse(caption)) for image, caption in zip(images, captions, strict=True)]

    def share(right):
        return np.mean([seen is not None and right(seen, wanted) for seen, wanted in pairs])

    def all_of(*fields):
        return lambda seen, wanted: things(seen, fields) == things(wanted, fields)

    def things(scene, fields):
        return sorted([getattr(thing, field) for field in fields] for thing in (scene.first, scene.second) if thing)

    print(f"For {count} pairs that never occur in training, the share of pictures in which a program reads ...")
    print(f"  the right colours             {share(all_of('colour')):.1%}")
    print(f"  the right coloured shapes     {share(all_of('colour', 'shape')):.1%}")
    print(f"  ... and the right relation    {share(lambda seen, wanted: scenes.same(alike(seen), alike(wanted))):.1%}")
    print(f"  ... and sizes, and background {share(scenes.same):.1%}")


def alike(scene: scenes.Scene) -> scenes.Scene:
    """The scene with objects of one size on one background."""
    first, second = (thing and thing._replace(size="small") for thing in (scene.first, scene.second))
    return scene._replace(first=first, second=second, background="black")


def main() -> None:
    options = arguments()
    # In the vocabulary of the training captions, or an error.
    prompts = [scenes.Scene.parse(prompt).caption for prompt in options.prompts]
    model = keras.saving.load_model(options.model) if options.model else train(options, prompts)
    measure(model, options.test, options.out)

    captions = list(np.repeat(prompts, 4))
    steps = [step.x for step in model.sample_steps(len(captions), text=captions, seed=1)]
    pictures.save_gif(options.out / "prompts.gif", steps, 4, fps=8, captions=captions)
    pictures.save_png(options.out / "prompts.png", steps[-1], 4, captions=captions)
    names = ["prompts.png", "prompts.gif", "held-out.png", *([] if options.model else ["model.keras"])]
    print(f"In {options.out.resolve()}: {', '.join(names)}")


if __name__ == "__main__":
    main()
