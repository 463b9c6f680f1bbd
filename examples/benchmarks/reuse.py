"""What is saved, and lost, by features that are reused between steps: a U-Net and a DiT on digits.

    KERAS_BACKEND=jax python examples/benchmarks/reuse.py

Both are trained for `--steps` steps of 64 digits. Then samples in 20 steps of DDIM are drawn in turns, all computed and
with `Reuse(every)`, and the medians of their times compared. Beside them are the Frechet distance, by the classifier of
few_steps.py, with its interval, and the root mean square of the difference from the exact samples, in units of their
standard deviation.
"""

import argparse
import sys
import time
from pathlib import Path

import keras
import numpy as np

from kdiff import DiffusionModel, Sampler, blocks, networks
from kdiff.reuse import Reuse

sys.path.append(str(Path(__file__).parents[1]))
from few_steps import Digits, Study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="of training")
    parser.add_argument("--samples", type=int, default=500, help="of each kind")
    parser.add_argument("--turns", type=int, default=5, help="how often each is timed")
    options = parser.parse_args()
    keras.utils.set_random_seed(0)
    Digits.samples = options.samples
    dataset = Digits(options.steps, 0)
    study = Study(dataset, options.steps)
    label = {"label": blocks.LabelEmbedding(10)}
    made = {
        "UNet": networks.UNet.residual(16, levels=2, depth=2, multipliers=(1, 2), conditions=label),
        "DiT": networks.DiT(64, 8, 2, networks.adaptive_block(4), conditions=label),
    }
    print("| network | every | time | Frechet distance | difference |")
    print("|---|---|---|---|---|")
    for name, network in made.items():
        model = study.fit(DiffusionModel(network, "cosine", "velocity", ema=0.995), options.steps, rate=2e-3)
        samplers = {every: Sampler("ddim", steps=20, reuse=every and Reuse(every)) for every in (None, 1, 2, 3)}
        samples = {every: dataset.sampled(model, sampler=sampler) for every, sampler in samplers.items()}
        seconds = {every: [] for every in samplers}
        for _ in range(options.turns):
            for every, sampler in samplers.items():
                begun = time.perf_counter()
                model.sample(100, batch_size=100, label=dataset.labels[:100], sampler=sampler)
                seconds[every].append(time.perf_counter() - begun)
        exact = samples[None]
        for every, found in samples.items():
            value, low, high, _ = dataset.score(found)
            ratio = np.median(seconds[every]) / np.median(seconds[None])
            away = np.sqrt(np.mean((found - exact) ** 2)) / exact.std()
            print(f"| {name} | {every or '-'} | {ratio:.2f} | {value:.2f} [{low:.2f}, {high:.2f}] | {away:.3f} |")
        print(f"{name}: {1000 * np.median(seconds[None]) / 100:.2f} ms per sample, all computed", flush=True)


if __name__ == "__main__":
    main()
