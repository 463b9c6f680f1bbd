"""Fine-tuning a text-to-image model: a style from ten pictures with LoRA, or edges with a ControlNet.

    KERAS_BACKEND=jax python examples/finetune.py                             # a small model, and generated pictures
    KERAS_BACKEND=jax python examples/finetune.py --control edges
    python examples/finetune.py PICTURES --model stable-diffusion-v1-5 --text "a photo of my dog" --rate 1e-4
    python examples/finetune.py PICTURES --model stable-diffusion-v1-5 --control edges --rate 1e-5 --steps 20000

Without --model a small U-Net is first trained on pictures of one shape, and saved as base.keras for other runs:
--base-minutes are CPU minutes. The style is outlines of the shapes. PICTURES is a folder of your own; the caption of
photo.jpg is in photo.txt, or --text for all. lora.png shows pictures from the same noise, in each pair of rows before
(upper) and after (lower); edges.png shows edges, pictures without them, and pictures with them.
"""

import argparse
from pathlib import Path

import keras
import numpy as np
from dalle2 import Clock, drawn, read_right, train

import kdiff
from kdiff import control, interop, lora, networks, pictures
from kdiff.blocks import TextEncoder

SAMPLER = kdiff.Sampler("dpm_solver_pp", "trailing", steps=20, guidance=kdiff.guidance.ClassifierFree(1.5))
PROMPTS = (
    "a large yellow triangle on a black background",
    "a large red circle on a black background",
    "a large blue square on a black background",
    "a small orange square on a black background",
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="?", type=Path, help="a folder; by default shapes are generated")
    parser.add_argument("--text", help="the caption of all pictures, and the prompt")
    parser.add_argument("--control", choices=["edges"], help="train a ControlNet instead of LoRA")
    parser.add_argument("--model", type=Path, help="a folder of Stable Diffusion, or a saved model, such as base.keras")
    parser.add_argument(
        "--base-minutes", type=float, default=18, help="CPU minutes of training a small model, if none is given"
    )
    parser.add_argument(
        "--steps", type=int, help="steps of fine-tuning; by default 300 for LoRA, 1500 for a ControlNet"
    )
    parser.add_argument("--rank", type=int, default=4, help="the rank of LoRA")
    parser.add_argument("--rate", type=float, default=2e-3, help="the learning rate; 1e-4 or less for a large model")
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--image-size", type=int, default=16, help="the image size of a small model, a multiple of 4")
    parser.add_argument("--width", type=int, default=16, help="the width of a small model, a multiple of 8")
    parser.add_argument("--out", type=Path, default=Path("runs") / f"finetune-{keras.backend.backend()}")
    return parser.parse_args()


def on_black(count: int, size: int, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Pictures of one shape on black, a third of `count`, and their captions."""
    images, captions = drawn(count, 1, size, seed=seed)
    kept = [i for i, caption in enumerate(captions) if "black" in caption]
    return images[kept], [captions[i] for i in kept]


def base(options: argparse.Namespace) -> kdiff.DiffusionModel:
    """The model to fine-tune: from a folder, from a file, or a small U-Net trained here on captioned shapes."""
    if options.model and options.model.is_dir():
        return interop.diffusers.load(options.model, ema=0.99)
    if options.model:
        return keras.saving.load_model(options.model)
    images, captions = on_black(18000, options.image_size)
    tokenizer = kdiff.text.BytePair.learn(captions, vocabulary_size=320, length=16)
    text = TextEncoder(tokenizer, 64, depth=1, dropout=0.1)
    network = networks.UNet.transformer(options.width, 3, 1, at=(2,), conditions={"text": text})
    model = kdiff.DiffusionModel(network, prediction="data", sampler=SAMPLER, ema=0.995, name="base")
    train(model, {"image": images, "text": captions}, Clock(options.base_minutes, 2e-3), batch_size=32)
    model.save(options.out / "base.keras")
    _, captions = on_black(300, options.image_size, seed=1)
    made = model.sample(len(captions), text=captions)
    print(f"A program reads {read_right(made, captions):.0%} of its pictures right")
    return model


def covered(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the pixels of shapes, those with four neighbours among them), of pictures in uint8."""
    shapes = np.abs(images.astype(int) - images[:, :1, :1]).max(axis=-1, keepdims=True) > 96
    inside = shapes.copy()
    for axis, step in ((1, 1), (1, -1), (2, 1), (2, -1)):
        inside &= np.roll(shapes, step, axis)
    return shapes, inside


def outlines(images: np.ndarray) -> np.ndarray:
    """The pictures, uint8, with the interior of all shapes in the colour of the corner."""
    return np.where(covered(images)[1], images[:, :1, :1], images)


def interior(images: np.ndarray) -> float:
    """The share of the pixels of shapes that is not their border, of pictures in [-1, 1]: 0 for outlines."""
    shapes, inside = covered(np.clip(np.round(127.5 * (images + 1.0)), 0, 255).astype("uint8"))
    return inside.sum() / max(1, shapes.sum())


def edges(images: np.ndarray) -> np.ndarray:
    """White lines on black, in [-1, 1] with three channels, at the edges of pictures in [-1, 1]."""
    steps = [np.diff(images, axis=axis, append=np.take(images, [-1], axis)) for axis in (1, 2)]
    strength = np.maximum(*(np.abs(step).max(axis=-1, keepdims=True) for step in steps))
    return np.repeat(np.where(strength > 0.4, 1.0, -1.0), 3, axis=-1).astype("float32")


def load(options: argparse.Namespace, size: int, count: int) -> dict[str, np.ndarray]:
    """Pictures in [-1, 1], and their captions."""
    if options.pictures is None:
        images, captions = (rows[:count] for rows in on_black(4 * count + 20, size, seed=2))
        images = images if options.control else outlines(images)
        return {"image": images.astype("float32") / 127.5 - 1.0, "text": np.array(captions)}
    given = {"text": options.text is None, "channels": 3, "shuffle": False, "drop_remainder": False}
    batches = list(kdiff.data.images(options.pictures, size, **given))
    if options.text is not None:
        images = np.concatenate([one.numpy() for one in batches])
        return {"image": images, "text": np.repeat([options.text], len(images))}
    found = {name: np.concatenate([one[name].numpy() for one in batches]) for name in ("image", "text")}
    return {"image": found["image"], "text": np.array([one.decode() for one in found["text"]])}


def fit(model: kdiff.DiffusionModel, data: dict[str, np.ndarray], options: argparse.Namespace, steps: int) -> None:
    """Trains for `steps` steps, with a learning rate that decays to 0."""
    size = min(options.batch_size, len(data["image"]))
    schedule = keras.optimizers.schedules.CosineDecay(options.rate, steps)
    model.compile(keras.optimizers.Adam(schedule, clipnorm=1.0))
    a_pass = min(steps, len(data["image"]) // size)
    rows = slice(0, len(data["image"]) // size * size)  # batches of one size
    options = {"batch_size": size, "epochs": -(-steps // a_pass), "steps_per_epoch": a_pass, "verbose": 0}
    model.fit({name: one[rows] for name, one in data.items()}, **options)


def tune_style(model: kdiff.DiffusionModel, options: argparse.Namespace) -> None:
    """LoRA on ten pictures: samples before and after, and the loss on them."""
    large = options.model is not None and options.model.is_dir()
    data = load(options, model.example[0], 10)
    prompts = np.repeat([options.text] if options.text else PROMPTS, 8)
    before, loss = model.sample(len(prompts), text=prompts), evaluated(model, data)
    for weight, average in model.ema_weights.pairs(model.network) if model.ema_weights.moved else ():
        weight.assign(average)  # frozen weights have none
    layers = lora.enable(model, options.rank, lora.ATTENTION if large else r"u_net\w*/(down|bridge|up)")
    learned = sum(int(np.prod(weight.shape)) for weight in model.trainable_variables)
    print(
        f"LoRA in {len(layers)} layers: {learned:,} trained weights, {model.network.count_params() - learned:,} frozen"
    )
    fit(model, data, options, options.steps or 300)
    after = model.sample(len(prompts), text=prompts)
    rows = np.stack([one.reshape(-1, 8, *one.shape[1:]) for one in (before, after)], axis=1)
    pictures.save_png(options.out / "lora.png", rows.reshape(-1, *before.shape[1:]), 8)
    pictures.save_png(options.out / "pictures.png", data["image"], 5)
    print(f"The loss on the pictures was {loss:.4f} and is {evaluated(model, data):.4f}")
    if not options.pictures:
        shares = [f"{interior(images):.0%}" for images in (before, after, data["image"])]
        print("Of the pixels of shapes, {} lie inside them before, {} after, in the ten pictures {}".format(*shares))
    interop.lora.save(model, options.out / "lora.safetensors", convolutions=large)


def evaluated(model: kdiff.DiffusionModel, data: dict[str, np.ndarray]) -> float:
    if not model.compiled:
        model.compile()
    return float(np.atleast_1d(model.evaluate(data, batch_size=len(data["image"]), verbose=0))[0])


def tune_control(model: kdiff.DiffusionModel, options: argparse.Namespace) -> None:
    """A ControlNet on edges, with the share of given edges that its pictures reproduce."""
    large = options.model is not None and options.model.is_dir()
    data = load(options, model.example[0], 2000 + 16)
    data["edges"] = edges(data["image"])
    shown = {name: one[:16] for name, one in data.items()}
    made = networks.ControlNet.of(model.network, networks.Hint() if large else networks.Hint((16,)))
    control.add(model, edges=made)
    print(f"A ControlNet of {made.count_params():,} weights, for a U-Net of {model.network.network.count_params():,}")
    if not options.pictures:
        data = {name: one[16:] for name, one in data.items()}
    fit(model, data, options, options.steps or 1500)
    asked = {"text": shown["text"], "seed": 1}
    count = len(shown["image"])
    without, steered = model.sample(count, **asked), model.sample(count, edges=shown["edges"], **asked)
    for name, images in {"without them": without, "with them": steered}.items():
        found, wanted = edges(images) > 0, shown["edges"] > 0
        print(f"Of the given edges, pictures {name} have {(found & wanted).sum() / wanted.sum():.0%}")
    width = min(8, count)
    rows = [some[i : i + width] for i in range(0, count, width) for some in (shown["edges"], without, steered)]
    pictures.save_png(options.out / "edges.png", np.concatenate(rows), width)
    if large:
        interop.diffusers.save(made, options.out / "controlnet")


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    model = base(options)
    (tune_control if options.control else tune_style)(model, options)
    model.save(options.out / "model.keras")
    print(f"In {options.out.resolve()}: {'edges.png' if options.control else 'lora.png'}, model.keras")


if __name__ == "__main__":
    main()
