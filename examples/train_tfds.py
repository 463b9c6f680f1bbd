"""Train a class-conditional diffusion model on any TensorFlow Dataset of images with labels.

    KERAS_BACKEND=jax python examples/train_tfds.py fashion_mnist --download
    KERAS_BACKEND=jax python examples/train_tfds.py cifar10 --data-dir ~/tensorflow_datasets --width 64 --flip

Every grid of samples has one class per row. The grids and the saved model are in the folder printed at the end.
"""

import argparse
from pathlib import Path

import keras
import numpy as np

import kdiff
from kdiff import data, pictures

ROWS, COLUMNS = 10, 6  # of the grids: the first ten classes, six samples each, in one batch


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", default="fashion_mnist", help="its name in TensorFlow Datasets")
    parser.add_argument("--data-dir", help="the folder of TensorFlow Datasets")
    parser.add_argument("--download", action="store_true", help="download the data set if it is missing")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--steps-per-epoch", type=int, help="by default the whole data set")
    parser.add_argument("--image-size", type=int, help="a multiple of 4; by default that of the data set")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--width", type=int, default=32, help="channels of the network at full size")
    parser.add_argument("--flip", action="store_true", help="mirror half of the images, at random in each epoch")
    parser.add_argument("--out", type=Path, help="by default runs/DATASET-BACKEND")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    out = options.out or Path("runs") / f"{options.dataset.replace('/', '-')}-{keras.backend.backend()}"
    dataset = data.images(
        options.dataset,
        options.image_size,
        options.batch_size,
        labels=True,
        data_dir=options.data_dir,
        download=options.download,
        augment=keras.layers.RandomFlip("horizontal") if options.flip else None,
        repeat=None if options.steps_per_epoch else 1,  # a number of steps needs endless data
    )
    classes = dataset.class_names

    # The label is a further input of the network, with a learned vector for each class.
    conditions = {"label": kdiff.blocks.LabelEmbedding(len(classes))}
    network = kdiff.networks.UNet.attention(width=options.width, levels=3, depth=1, conditions=conditions)
    model = kdiff.DiffusionModel(network, schedule="cosine", prediction="velocity", ema=0.995)
    steps = options.epochs * (options.steps_per_epoch or int(dataset.cardinality()))
    model.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(2e-3, steps), clipnorm=1.0))

    labels = np.repeat(np.arange(len(classes))[:ROWS], COLUMNS)
    watch = kdiff.SampleCallback(
        out / "training", num_samples=len(labels), conditions={"label": labels}, columns=COLUMNS, training_gif=True
    )
    history = model.fit(dataset, epochs=options.epochs, steps_per_epoch=options.steps_per_epoch, callbacks=[watch])
    pictures.loss_plot(out / "loss.png", history)

    print("Sampling ...")
    trajectory = [step.x for step in model.sample_steps(len(labels), seed=1, label=labels)]
    pictures.save_gif(out / "noise-to-images.gif", trajectory, COLUMNS)
    pictures.save_png(out / "samples.png", trajectory[-1], COLUMNS)

    model.save(out / "model.keras")
    loaded = keras.saving.load_model(out / "model.keras")
    again = loaded.sample(len(labels), seed=1, label=labels)
    np.testing.assert_allclose(again, trajectory[-1], atol=1e-3)

    files = sorted(str(path.relative_to(out)) for path in out.rglob("*.*"))
    print(f"Done. Final loss {history.history['loss'][-1]:.4f}. The rows of the grids: {', '.join(classes[:ROWS])}.")
    print(f"In {out.resolve()}:", *files, sep="\n  ")


if __name__ == "__main__":
    main()
