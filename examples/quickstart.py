"""Train a small diffusion model on real handwritten digits, and watch noise become digits.

    KERAS_BACKEND=jax python examples/quickstart.py          # or tensorflow, or torch

On two cores this takes two or three minutes. It writes pictures and the saved model to a folder, which is printed at
the end.
"""

import argparse
from pathlib import Path

import keras
import numpy as np

import kdiff
from kdiff import data, pictures

# A second-order solver needs few steps.
SAMPLER = kdiff.Sampler("dpm_solver_pp", "uniform_log_snr", steps=15)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--dataset", default="digits", help="an embedded set, a TensorFlow Dataset or class folders")
    parser.add_argument("--data-dir", help="the folder of TensorFlow Datasets")
    parser.add_argument("--download", action="store_true", help="download the TensorFlow Dataset if it is missing")
    parser.add_argument("--image-size", type=int, default=16, help="a multiple of 4")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("runs") / f"quickstart-{keras.backend.backend()}")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    dataset = data.images(
        options.dataset,
        options.image_size,
        options.batch_size,
        labels=True,
        data_dir=options.data_dir,
        download=options.download,
    )
    classes = len(dataset.class_names)

    # Digits have little detail: few channels at full size and twice as many below are enough, and fast. The label is a
    # further input, with a learned vector for each class, so that samples of a given digit can be drawn.
    conditions = {"label": kdiff.blocks.LabelEmbedding(classes)}
    network = kdiff.networks.UNet.residual(width=16, levels=3, depth=1, multipliers=(1, 2, 2), conditions=conditions)
    # A short run: weights averaged over about the last hundred steps, and a learning rate that decays to zero.
    model = kdiff.DiffusionModel(network, schedule="cosine", prediction="velocity", ema=0.99)
    steps = options.epochs * int(dataset.cardinality())
    model.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(3e-3, steps), clipnorm=1.0))

    # Five rows with one column for each of the first ten classes, four times in the run and always from the same noise,
    # so that the same digits improve.
    columns = min(classes, 10)
    labels = np.tile(np.arange(columns), 5)
    every = max(1, options.epochs // 4)
    watch = kdiff.SampleCallback(
        options.out / "training",
        every,
        num_samples=len(labels),
        sampler=SAMPLER,
        conditions={"label": labels},
        columns=columns,
        training_gif=True,
    )
    history = model.fit(dataset, epochs=options.epochs, callbacks=[watch])
    pictures.loss_plot(options.out / "loss.png", history)

    print("Sampling ...")
    trajectory = [step.x for step in model.sample_steps(len(labels), sampler=SAMPLER, seed=1, label=labels)]
    pictures.save_gif(options.out / "noise-to-images.gif", trajectory, columns)
    pictures.save_png(options.out / "samples.png", trajectory[-1], columns)

    # The file contains everything for sampling: the network, its averaged weights, the schedule and the prediction.
    model.save(options.out / "model.keras")
    loaded = keras.saving.load_model(options.out / "model.keras")
    again = loaded.sample(len(labels), sampler=SAMPLER, seed=1, label=labels)
    np.testing.assert_allclose(again, trajectory[-1], atol=1e-3)
    pictures.save_png(options.out / "samples-of-the-loaded-model.png", again, columns)

    files = sorted(str(path.relative_to(options.out)) for path in options.out.rglob("*.*"))
    print(f"Done. Final loss {history.history['loss'][-1]:.4f}. In {options.out.resolve()}:", *files, sep="\n  ")


if __name__ == "__main__":
    main()
