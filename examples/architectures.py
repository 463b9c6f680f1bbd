"""Four architectures on the same data for the same time, and the sizes of published networks.

    KERAS_BACKEND=jax python examples/architectures.py --sizes             # print a table, without training
    KERAS_BACKEND=jax python examples/architectures.py                     # on digits, a minute each
    KERAS_BACKEND=jax python examples/architectures.py fashion_mnist --data-dir ~/tensorflow_datasets --minutes 3

A network is an argument of `DiffusionModel`; nothing else changes. It writes one grid of samples for each.
"""

import argparse
import time
from pathlib import Path

import keras
import numpy as np

from kdiff import DiffusionModel, data, pictures
from kdiff.blocks import LabelEmbedding, Neighborhood
from kdiff.networks import DiT, Hybrid, SimpleUNet, UNet, UViT, flops, parameters, published, summary

COLUMNS = 10  # one per class


def architectures(classes: int):
    """Constructors of networks by name, for images of 28x28 or 16x16 pixels."""

    def label(width=None):
        return {"label": LabelEmbedding(classes, width)}

    return {
        "U-Net": lambda: UNet.attention(16, 3, 1, conditions=label()),
        "DiT": lambda: DiT(128, 4, 2, conditions=label()),
        "U-ViT": lambda: UViT(128, 5, 2, conditions=label(128)),
        "hybrid": lambda: Hybrid.composed(
            (24, 48, 96), (1, 2, 2), pattern=Neighborhood(3), head_width=24, conditions=label()
        ),
    }


# Name, network, shape of the image, shapes of conditions, published parameters (M) and multiply-adds (G).
SIZES = [
    ("DDPM, CIFAR-10", published.ddpm_cifar10, (32, 32, 3), {}, 35.7, None),
    ("DDPM, 256x256", published.ddpm_256, (256, 256, 3), {}, 113.7, None),
    ("ADM, ImageNet-64", published.adm, (64, 64, 3), {}, 295.9, None),
    ("DDPM++, CIFAR-10", published.ddpmpp_cifar10, (32, 32, 3), {}, 55.7, None),
    ("NCSN++, CIFAR-10", published.ncsnpp_cifar10, (32, 32, 3), {}, None, None),
    ("Stable Diffusion 1", published.stable_diffusion_1, (64, 64, 4), {"context": (77, 768)}, 859.5, None),
    ("Stable Diffusion 2", published.stable_diffusion_2, (64, 64, 4), {"context": (77, 1024)}, 865.9, None),
    (
        "Stable Diffusion XL",
        published.stable_diffusion_xl,
        (128, 128, 4),
        {"context": (77, 2048), "text_embeds": (1280,), "time_ids": (6,)},
        2567,
        None,
    ),
    ("DiT-S/2", lambda: DiT.s(2), (32, 32, 4), {}, 33.0, 6.06),
    ("DiT-B/2", lambda: DiT.b(2), (32, 32, 4), {}, 130.5, 23.01),
    ("DiT-L/2", lambda: DiT.l(2), (32, 32, 4), {}, 458.1, 80.71),
    ("DiT-XL/2", lambda: DiT.xl(2), (32, 32, 4), {}, 675.1, 118.64),
    ("U-ViT-S/2", lambda: UViT.s(2), (32, 32, 3), {}, 44, None),
    ("U-ViT-M/4", lambda: UViT.m(4, conditions={"label": LabelEmbedding(1001, 768)}), (64, 64, 3), {}, 131, None),
    ("U-ViT-L/2", lambda: UViT.l(2, conditions={"label": LabelEmbedding(1001, 1024)}), (32, 32, 4), {}, 287, None),
    ("U-ViT-H/2", lambda: UViT.h(2, conditions={"label": LabelEmbedding(1001, 1152)}), (32, 32, 4), {}, 501, None),
    ("SimpleUNet", SimpleUNet, (32, 32, 3), {}, None, None),
]


def print_sizes() -> None:
    print(f"{'':22} {'parameters':>13} {'published':>10} {'multiply-adds':>16} {'published':>10}")
    for name, make, shape, conditions, millions, billions in SIZES:
        network = make()
        own = parameters(network, shape, **conditions), flops(network, shape, **conditions)
        told = (
            f"{millions or '':>8}" + (" M" if millions else "  "),
            f"{billions or '':>8}" + (" G" if billions else ""),
        )
        print(f"{name:22} {own[0]:13,} {told[0]} {own[1]:16,} {told[1]}", flush=True)


class Until(keras.callbacks.Callback):
    """Stops training after this many seconds, including compilation."""

    def __init__(self, seconds: float):
        super().__init__()
        self.seconds = seconds

    def on_train_begin(self, logs=None):
        self.end = time.monotonic() + self.seconds

    def on_train_batch_end(self, batch, logs=None):
        self.model.stop_training = self.model.stop_training or time.monotonic() > self.end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", default="digits", help="digits, or a name in TensorFlow Datasets")
    parser.add_argument("--data-dir", help="the folder of TensorFlow Datasets")
    parser.add_argument("--minutes", type=float, default=1, help="minutes of training per network")
    parser.add_argument("--sizes", action="store_true", help="print the published sizes, without training")
    parser.add_argument("--out", type=Path, default=Path("runs") / "architectures")
    options = parser.parse_args()
    if options.sizes:
        return print_sizes()

    size = 16 if options.dataset == "digits" else 28
    batches = data.images(options.dataset, size, 32, labels=True, data_dir=options.data_dir, repeat=None)
    labels = np.tile(np.arange(COLUMNS), 4)
    for name, make in architectures(len(batches.class_names)).items():
        keras.utils.set_random_seed(0)
        network = make()
        model = DiffusionModel(network, schedule="cosine", prediction="velocity", ema=0.99)
        model.compile(keras.optimizers.Adam(1e-3, clipnorm=1.0))
        print(f"\n{name}")
        summary(network, (size, size, 1))
        stop = Until(60 * options.minutes)
        history = model.fit(batches, epochs=1000, steps_per_epoch=50, callbacks=[stop], verbose=2)
        steps, loss = int(keras.ops.convert_to_numpy(model.optimizer.iterations)), history.history["loss"][-1]
        samples = model.sample(len(labels), sampler="dpm_solver_pp", steps=20, label=labels, seed=1)
        pictures.save_png(options.out / f"{name.lower()}.png", samples, COLUMNS)
        print(f"{name}: loss {loss:.4f} after {steps} steps; {options.out / name.lower()}.png")


if __name__ == "__main__":
    main()
