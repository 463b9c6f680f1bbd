"""The same networks on pixels and on wavelets of the same pictures: steps a second, and how well they denoise.

    KERAS_BACKEND=jax python examples/benchmarks/wavelets.py                         # digits of 8 x 8 pixels
    KERAS_BACKEND=jax python examples/benchmarks/wavelets.py --images cifar10.npy    # uint8, (count, 32, 32, 3)

The contestants train by turns, `--steps` steps each in rounds, and then on for as long as pixels took, in seconds of
CPU, all cores together, so that what else a machine does is not counted. What they answer is compared in pixels,
|x_hat - x|^2 on pictures held out, at three log-SNRs and with the same noise: the transform is orthonormal, so that
noise levels and errors mean the same in both spaces. It leaves a table in `--out`.
"""

import argparse
import time
from pathlib import Path

import keras
import numpy as np
from keras import ops

from kdiff import DiffusionModel, data, random
from kdiff.blocks import TransformerBlock
from kdiff.codecs import Haar
from kdiff.networks import DiT, UNet

LOG_SNRS = (-4.0, 0.0, 4.0)


def networks(width: int, toy: bool) -> dict:
    """Makers of networks by name, each with the depths of wavelets to train on; 0 is pixels."""
    block, layers = TransformerBlock(4, adaptive=True), 1 if toy else 4
    return {
        "U-Net": (lambda: UNet.residual(width, levels=2, depth=1), (0, 1, 2)),
        "DiT, patches of 2": (lambda: DiT(4 * width, layers, 2, block), (0, 1)),
        "DiT, patches of 4": (lambda: DiT(4 * width, layers, 4, block), (0,)),
    }


class Contestant:
    """A network on one depth of wavelets, with the seconds that it has trained for."""

    def __init__(self, make, depth: int, x: np.ndarray, batch: int):
        keras.utils.set_random_seed(0)
        self.model, self.x, self.batch = DiffusionModel(make(), codec=Haar(depth), ema=None), x, batch
        self.model.compile(keras.optimizers.Adam(1e-3))
        self.seconds = self.steps = 0
        self.train(2)  # which compiles
        self.seconds = 0.0

    def train(self, steps: int) -> None:
        rows = (np.arange(steps * self.batch) + self.steps * self.batch) % len(self.x)
        begun = time.process_time()
        self.model.fit(self.x[rows], batch_size=self.batch, shuffle=False, verbose=0)
        self.seconds, self.steps = self.seconds + time.process_time() - begun, self.steps + steps

    def errors(self, x: np.ndarray) -> list[float]:
        """|x_hat - x|^2 a pixel at each of LOG_SNRS."""
        model, errors = self.model, []
        x, noise = (model.codec.encode(v) for v in (x, random.normal(random.key_of(1), x.shape)))
        for log_snr in LOG_SNRS:
            m = model.schedule.at_log_snr(np.float32(log_snr))
            x_hat = model.denoise(m.alpha * x + m.sigma * noise, m)
            errors.append(float(ops.convert_to_numpy(ops.mean(ops.square(x_hat - x)))))
        return errors


def race(make, depths, x, test, options) -> list[str]:
    """Rows of the table of one network."""
    contestants = {depth: Contestant(make, depth, x, options.batch) for depth in depths}
    for _ in range(options.rounds):
        for contestant in contestants.values():
            contestant.train(options.steps // options.rounds)
    pixels, rows = contestants[0], []
    for depth, one in contestants.items():
        rate, equal_steps = (one.steps - 2) / one.seconds, one.errors(test)
        if depth:
            one.train(max(int(rate * (pixels.seconds - one.seconds)), 1))
        size = "x".join(map(str, one.model.shapes["image"][1:]))
        speed = f"{rate:.1f} | {rate * pixels.seconds / options.steps:.2f}x"
        errors = [", ".join(f"{error:.4f}" for error in some) for some in (equal_steps, one.errors(test))]
        rows.append(f"{f'Haar({depth})' if depth else 'pixels'}, {size} | {speed} | {' | '.join(errors)}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a file .npy; a twentieth of it, at most 256, is held out")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=32, help="of the U-Net; of DiT four times as much")
    parser.add_argument("--toy", action="store_true", help="few steps of small networks, to see that all of it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.toy:
        options.steps, options.rounds, options.batch, options.width = 4, 2, 4, 8
    if options.images:
        x = np.load(options.images)
    else:
        x = np.concatenate(list(data.images("digits", split="all", batch_size=64).as_numpy_iterator()))
    x = np.random.default_rng(0).permutation(x)
    held_out = min(len(x) // 20, 256)
    title = f"{x.shape[1]}x{x.shape[2]} pixels, {keras.backend.backend()}, batches of {options.batch}"
    title += f", width {options.width}. Errors of x_hat at a log-SNR of {', '.join(map(str, LOG_SNRS))}:"
    columns = f"steps a second of CPU | | after {options.steps} steps | after the CPU time of pixels"
    lines = [title, "", f"| network | data | {columns} |", "|---" * 6 + "|"]
    for name, (make, depths) in networks(options.width, options.toy).items():
        for row in race(make, depths, x[held_out:], x[:held_out], options):
            lines.append(f"| {name} | {row} |")
            print(lines[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "wavelets.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
