"""Classifier-free guidance on fashion_mnist, with its effect measured.

    KERAS_BACKEND=jax python examples/class_conditional.py --data-dir ~/tensorflow_datasets       # or with --download

It trains a class-conditional U-Net, and a small classifier on the real images. It writes a grid with one row per class
and one column per guidance scale, and prints the share of samples that the classifier assigns to the requested class.
On two cores this takes about half an hour.
"""

import argparse
from pathlib import Path

import keras
import numpy as np
from keras import layers

import kdiff
from kdiff import data, pictures
from kdiff.guidance import ClassifierFree

SCALES = [0.0, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0]
SAMPLER = kdiff.Sampler("dpm_solver_pp", "uniform_log_snr", steps=20)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset", default="fashion_mnist", help="a TensorFlow Dataset, an embedded set, class folders"
    )
    parser.add_argument("--data-dir", help="the folder of TensorFlow Datasets")
    parser.add_argument("--download", action="store_true", help="download the TensorFlow Dataset if it is missing")
    parser.add_argument("--image-size", type=int, default=28, help="a multiple of 4")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--samples", type=int, default=100, help="samples per scale, to measure the share")
    parser.add_argument("--out", type=Path, default=Path("runs") / f"class-conditional-{keras.backend.backend()}")
    return parser.parse_args()


def load(options: argparse.Namespace, split: str, **changes):
    source = {"data_dir": options.data_dir, "download": options.download, "split": split, "labels": True}
    return data.images(options.dataset, options.image_size, options.batch_size, **source, **changes)


def train(options: argparse.Namespace) -> tuple[kdiff.DiffusionModel, list[str]]:
    """The diffusion model: the label is dropped in 10 % of the examples."""
    dataset = load(options, "train", repeat=None)
    conditions = {"label": kdiff.blocks.LabelEmbedding(len(dataset.class_names), dropout=0.1)}
    network = kdiff.networks.UNet.residual(options.width, 3, 1, multipliers=(1, 2, 3), conditions=conditions)
    model = kdiff.DiffusionModel(network, sampler=SAMPLER, ema=0.995)
    rate = keras.optimizers.schedules.CosineDecay(3e-3, options.steps)
    model.compile(keras.optimizers.Adam(rate, clipnorm=1.0))
    epochs = 10
    history = model.fit(dataset, steps_per_epoch=max(1, options.steps // epochs), epochs=epochs, verbose=2)
    pictures.loss_plot(options.out / "loss.png", history)
    model.save(options.out / "model.keras")
    return model, dataset.class_names


def train_classifier(options: argparse.Namespace, classes: int) -> keras.Model:
    """A small convolutional network, which also prints its accuracy on real images."""
    real, test = load(options, "train"), load(options, "test", shuffle=False, drop_remainder=False)
    classifier = keras.Sequential(
        [
            keras.Input(real.element_spec["image"].shape[1:]),
            *(layers.Conv2D(32, 3, 2, activation="relu"), layers.Conv2D(64, 3, 2, activation="relu")),
            *(layers.Flatten(), layers.Dropout(0.3), layers.Dense(128, activation="relu"), layers.Dense(classes)),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    classifier.compile(keras.optimizers.Adam(2e-3), loss, metrics=["accuracy"])
    pairs = [dataset.map(lambda batch: (batch["image"], batch["label"])) for dataset in (real, test)]
    classifier.fit(pairs[0], epochs=3, shuffle=False, verbose=2)
    print(f"The classifier is correct for {classifier.evaluate(pairs[1], verbose=0)[1]:.1%} of the real test images.")
    return classifier


def main() -> None:
    options = arguments()
    model, names = train(options)
    classifier = train_classifier(options, len(names))

    # The scale is per sample, so that all samples are drawn in one run: one row per class, one column per scale, and
    # the same noise in each row.
    classes, scales = (axis.ravel() for axis in np.meshgrid(np.arange(len(names)), SCALES, indexing="ij"))
    noise = kdiff.sampling.initial_noise((len(names), *model.shapes["image"][1:]), seed=1)
    noise = np.repeat(keras.ops.convert_to_numpy(noise), len(SCALES), axis=0)
    picture = model.sample(len(classes), label=classes, guidance=ClassifierFree(scales), x=noise)
    captions = [f"{names[label]}, {scale:g}" for label, scale in zip(classes, scales, strict=True)]
    pictures.save_png(options.out / "classes-by-scale.png", picture, len(SCALES), captions=captions)

    print("scale  share of samples of the requested class")
    labels = np.arange(options.samples) % len(names)
    for scale in SCALES:
        samples = model.sample(options.samples, label=labels, guidance=ClassifierFree(scale), seed=2)
        share = np.mean(np.argmax(classifier.predict(samples, verbose=0), axis=-1) == labels)
        print(f"{scale:5.1f}  {share:.1%}")
    print(f"In {options.out.resolve()}: model.keras, loss.png, classes-by-scale.png")


if __name__ == "__main__":
    main()
