"""Where the time goes: the operations that networks are made of, each in several forms, on each backend.

    python examples/benchmarks/kernels.py                     # one core, three backends: some minutes
    python examples/benchmarks/kernels.py --toy               # does it run? no figures to believe

It needs `kdiff[all]`. "kdiff" is the form that kdiff uses, from `kdiff.backend`; the others are what it was chosen
from. The forms of an operation take turns, and a figure is the median, in milliseconds: forward, and with the
gradients of all inputs. A form that a backend does not have is left out. It leaves kernels.md and kernels.json; those
in results/ were measured with `LD_PRELOAD=libtcmalloc_minimal.so.4` before the command.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

BACKENDS = ("tensorflow", "jax", "torch")
BATCH, GROUPS = 16, 32


def operations(toy: bool) -> dict[str, tuple[Callable, list]]:
    """By name: a function that gives the forms of an operation, and the shapes of the arrays that these take."""
    batch = 1 if toy else BATCH
    found = {}
    for size, width in [(8, 32)] if toy else [(32, 64), (16, 128)]:
        title, images = f"{size}x{size}x{width}", (batch, size, size, width)
        found[f"group norm {title}"] = group_norms, [images, (width,), (width,)]
        found[f"3x3 convolution {title}"] = convolutions, [images, (3, 3, width, width), (width,)]
        found[f"7x7 depthwise convolution {title}"] = depthwise_convolutions, [images, (7, 7, width, 1), (width,)]
        found[f"SiLU {title}"] = silus, [images]
        found[f"upsample {title}"] = upsamplings, [images]
        found[f"average pool {title}"] = poolings, [images]
    tokens, width = (16, 32) if toy else (256, 384)
    found[f"layer norm {tokens}x{width}"] = layer_norms, [(batch, tokens, width), (width,), (width,)]
    found[f"dense {tokens}x{width} to {4 * width}"] = denses, [(batch, tokens, width), (width, 4 * width), (4 * width,)]
    found[f"GELU {tokens}x{4 * width}"] = gelus, [(batch, tokens, 4 * width)]
    for heads, width in [(2, 8)] if toy else [(16, 8), (6, 64)]:
        found[f"attention {tokens}, {heads} heads of {width}"] = attentions, [(batch, tokens, heads, width)] * 3
    size, width = (2, 64) if toy else (8, 1280)  # few positions and a large kernel, as at the bottom of a large U-Net
    title, images = f"{size}x{size}x{width}, two", (2, size, size, width)
    found[f"3x3 convolution {title}"] = convolutions, [images, (3, 3, width, width), (width,)]
    found["sinusoidal embedding to 256"] = embeddings, [(batch,)]
    return found


def of_layer(layer, shape: tuple) -> Callable:
    """A function of an array and of the weights of a layer."""
    layer.build(shape)
    return lambda x, *weights: layer.stateless_call(weights, [], x)[0]


def group_norms(backend: str, shape: tuple) -> dict[str, Callable]:
    import keras
    from keras import ops

    import kdiff.backend

    def by_matrix(x, gamma, beta):
        """Sums of groups as products with the matrix of who belongs to whom."""
        batch, channels = x.shape[0], x.shape[-1]
        member = ops.repeat(ops.eye(GROUPS, dtype="float32"), channels // GROUPS, axis=1) * (GROUPS / channels)
        y = ops.reshape(x, (batch, -1, channels))
        same = ops.matmul(ops.transpose(member), member) * (channels / GROUPS)
        mean = ops.matmul(ops.mean(y, axis=1), same)[:, None]
        scale = gamma * ops.rsqrt(ops.matmul(ops.mean(ops.square(y - mean), axis=1), same)[:, None] + 1e-5)
        return ops.reshape(y * scale + (beta - mean * scale), x.shape)

    forms = {
        "Keras": of_layer(keras.layers.GroupNormalization(GROUPS, epsilon=1e-5), shape),
        "kdiff": lambda x, gamma, beta: kdiff.backend.group_norm(x, GROUPS, gamma, beta, 1e-5),
        "group sums by a matrix": by_matrix,
    }
    if backend == "torch":
        from torch.nn.functional import group_norm

        def native(x, gamma, beta):
            return group_norm(x.movedim(-1, 1), GROUPS, gamma, beta).movedim(1, -1)

        def copied(x, gamma, beta):
            return group_norm(x.movedim(-1, 1).contiguous(), GROUPS, gamma, beta).movedim(1, -1)

        forms |= {"PyTorch, as it lies": native, "PyTorch, channels first": copied}
    return forms


def convolutions(backend: str, shape: tuple) -> dict[str, Callable]:
    import keras

    import kdiff.blocks

    forms = {
        "Keras": of_layer(keras.layers.Conv2D(shape[-1], 3, padding="same"), shape),
        "kdiff": of_layer(kdiff.blocks.Conv2D(shape[-1], 3, padding="same"), shape),
    }
    if backend == "torch":
        from torch.nn.functional import conv2d

        def native(x, kernel, bias):
            return conv2d(x.movedim(-1, 1), kernel.permute(3, 2, 0, 1), bias, padding=1).movedim(1, -1)

        def copied(x, kernel, bias):
            return conv2d(x.movedim(-1, 1).contiguous(), kernel.permute(3, 2, 0, 1), bias, padding=1).movedim(1, -1)

        forms |= {"PyTorch, as it lies": native, "PyTorch, channels first": copied}
    if backend == "tensorflow":
        import tensorflow as tf

        forms["TensorFlow, bias_add"] = lambda x, k, b: tf.nn.bias_add(tf.nn.conv2d(x, k, 1, "SAME"), b)
    return forms


def depthwise_convolutions(backend: str, shape: tuple) -> dict[str, Callable]:
    import keras

    import kdiff.blocks

    layers = {"Keras": keras.layers.DepthwiseConv2D, "kdiff": kdiff.blocks.DepthwiseConv2D}
    return {name: of_layer(layer(7, padding="same"), shape) for name, layer in layers.items()}


def upsamplings(backend: str, shape: tuple) -> dict[str, Callable]:
    from keras import ops

    import kdiff.backend

    def broadcast(x):
        batch, height, width, channels = x.shape
        x = ops.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
        return ops.reshape(x, (batch, 2 * height, 2 * width, channels))

    def resized(x):
        return ops.image.resize(x, (2 * x.shape[1], 2 * x.shape[2]), "nearest", data_format="channels_last")

    return {
        "Keras": resized,
        "kdiff": kdiff.backend.upsample_nearest,
        "broadcast": broadcast,
        "repeat": lambda x: ops.repeat(ops.repeat(x, 2, axis=1), 2, axis=2),
    }


def poolings(backend: str, shape: tuple) -> dict[str, Callable]:
    from keras import ops

    import kdiff.backend

    def reshaped(x):
        batch, height, width, channels = x.shape
        return ops.mean(ops.reshape(x, (batch, height // 2, 2, width // 2, 2, channels)), axis=(2, 4))

    return {
        "Keras": lambda x: ops.average_pool(x, 2, 2, "valid", "channels_last"),
        "kdiff": kdiff.backend.average_pool,
        "mean of a reshaped map": reshaped,
    }


def silus(backend: str, shape: tuple) -> dict[str, Callable]:
    from keras import ops

    return {"Keras": ops.silu, "x sigmoid(x)": lambda x: x * ops.sigmoid(x)}


def gelus(backend: str, shape: tuple) -> dict[str, Callable]:
    from keras import ops

    import kdiff.backend

    return {
        "kdiff": kdiff.backend.gelu_tanh,
        "Keras, erf": lambda x: ops.gelu(x, approximate=False),
        "Keras, tanh": lambda x: ops.gelu(x, approximate=True),
    }


def layer_norms(backend: str, shape: tuple) -> dict[str, Callable]:
    import keras
    from keras import ops

    import kdiff

    def by_moments(x, gamma, beta):
        mean, variance = ops.moments(x, axes=-1, keepdims=True)
        return (x - mean) * ops.rsqrt(variance + 1e-5) * gamma + beta

    forms = {
        "Keras": of_layer(keras.layers.LayerNormalization(epsilon=1e-5), shape),
        "kdiff": of_layer(kdiff.blocks.LayerNorm(), shape),
        "moments": by_moments,
    }
    if backend == "torch":
        from torch.nn.functional import layer_norm

        forms["PyTorch"] = lambda x, gamma, beta: layer_norm(x, x.shape[-1:], gamma, beta)
    return forms


def denses(backend: str, shape: tuple) -> dict[str, Callable]:
    import keras

    import kdiff.blocks

    forms = {
        "Keras": of_layer(keras.layers.Dense(4 * shape[-1]), shape),
        "kdiff": of_layer(kdiff.blocks.Dense(4 * shape[-1]), shape),
    }
    if backend == "torch":
        from torch.nn.functional import linear

        forms["PyTorch"] = lambda x, kernel, bias: linear(x, kernel.T, bias)
    if backend == "tensorflow":
        import tensorflow as tf

        def flat(x, kernel, bias):
            y = tf.nn.bias_add(tf.matmul(tf.reshape(x, (-1, x.shape[-1])), kernel), bias)
            return tf.reshape(y, (*x.shape[:-1], -1))

        forms["TensorFlow, flat, bias_add"] = flat
    return forms


def attentions(backend: str, shape: tuple) -> dict[str, Callable]:
    from keras import ops

    import kdiff.backend

    def by_einsum(q, k, v):
        weights = ops.softmax(ops.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k), axis=-1)
        return ops.einsum("bhqk,bkhd->bqhd", weights, v)

    def divided_last(q, k, v):
        logits = ops.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
        weights = ops.exp(logits - ops.max(logits, axis=-1, keepdims=True))
        sums = ops.transpose(ops.sum(weights, axis=-1, keepdims=True), (0, 2, 1, 3))
        return ops.einsum("bhqk,bkhd->bqhd", weights, v) / sums

    return {
        "Keras": lambda q, k, v: ops.dot_product_attention(q, k, v),
        "kdiff": kdiff.backend.attention,
        "einsum": by_einsum,
        "einsum, divided last": divided_last,
    }


def embeddings(backend: str, shape: tuple) -> dict[str, Callable]:
    import kdiff

    layer = kdiff.blocks.SinusoidalEmbedding(256)
    return {"kdiff": layer}


def runner(backend: str, form: Callable, arrays: list, gradient: bool) -> Callable[[], None]:
    """Runs a form, compiled where the backend compiles, and waits for the result."""
    if backend == "torch":
        import torch

        tensors = [torch.from_numpy(array) for array in arrays]
        for i, kernel in enumerate(tensors[1:], start=1):
            if kernel.ndim == 4:  # stored as kdiff does, width first, which suits all forms
                tensors[i] = kernel.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
        tensors = [tensor.requires_grad_(gradient) for tensor in tensors]
        with torch.no_grad():
            ones = torch.ones_like(form(*tensors))

        def run():
            if gradient:
                torch.autograd.grad(form(*tensors), tensors, ones)
            else:
                with torch.no_grad():
                    form(*tensors)

        return run
    if backend == "jax":
        import jax

        def pulled(*tensors):
            y, pull = jax.vjp(form, *tensors)
            return y, pull(y)

        compiled = jax.jit(pulled if gradient else form)
        tensors = [jax.numpy.asarray(array) for array in arrays]
        return lambda: jax.block_until_ready(compiled(*tensors))
    import tensorflow as tf

    tensors = [tf.constant(array) for array in arrays]

    @tf.function(autograph=False)
    def graph(*tensors):
        if not gradient:
            return form(*tensors)
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            y = form(*tensors)
        return y, tape.gradient(y, tensors)

    return lambda: graph(*tensors)


def measure(backend: str, toy: bool, chosen: str) -> list[dict]:
    """A row for each operation and form: the medians of the forms' turns, in milliseconds."""
    import numpy as np

    turns, seconds = (1, 0.0) if toy else (9, 0.05)
    generator, rows = np.random.default_rng(0), []
    for operation, (forms_of, shapes) in operations(toy).items():
        if chosen not in operation:
            continue
        forms = forms_of(backend, shapes[0])
        arrays = [generator.normal(size=shape).astype("float32") for shape in shapes]
        runs = {
            (form, gradient): runner(backend, function, arrays, gradient)
            for form, function in forms.items()
            for gradient in (False, True)
        }
        counts, times = {}, {key: [] for key in runs}
        for key, run in runs.items():
            run()
            counts[key] = max(1, round(seconds / timed(run, 1)))
        for _ in range(turns):
            for key, run in runs.items():
                times[key].append(1e3 * timed(run, counts[key]))
        for form in forms:
            values = {name: statistics.median(times[form, bool(i)]) for i, name in enumerate(("forward", "both"))}
            rows.append({"operation": operation, "form": form, "backend": backend, **values})
    return rows


def timed(run: Callable, count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - started) / count


def table(rows: list[dict]) -> str:
    """A line for each operation and form, two columns for each backend."""
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    cells = {(row["operation"], row["form"], row["backend"]): row for row in rows}
    lines = [f"| operation | form | {' | '.join(f'{name} | and gradient' for name in backends)} |"]
    lines += ["|---" * (2 + 2 * len(backends)) + "|"]
    operations = list(dict.fromkeys(row["operation"] for row in rows))
    pairs = dict.fromkeys((row["operation"], row["form"]) for row in rows)
    for operation, form in sorted(pairs, key=lambda pair: operations.index(pair[0])):
        line = [operation, f"**{form}**" if form == "kdiff" else form]
        for backend in backends:
            row = cells.get((operation, form, backend))
            line += [f"{row[key]:.2f}" if row else "" for key in ("forward", "both")]
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--only", default="", help="only operations with this in their name, such as convolution")
    parser.add_argument("--toy", action="store_true", help="tiny arrays, one turn")
    parser.add_argument("--out", type=Path, default=Path("runs") / "speed")
    parser.add_argument("--rows", type=Path, help="measure on the backend of this process, and write the rows there")
    options = parser.parse_args()
    if options.rows:
        options.rows.write_text(json.dumps(measure(os.environ["KERAS_BACKEND"], options.toy, options.only)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    path, rows = options.out / "kernels.json", []
    for backend in options.backends:
        environment = {**os.environ, "KERAS_BACKEND": backend, "OMP_NUM_THREADS": str(options.cores)}
        command = [sys.executable, __file__, "--rows", str(path), "--only", options.only]
        command += ["--toy"] if options.toy else []
        cores = sorted(os.sched_getaffinity(0))[: options.cores]
        subprocess.run(
            command,
            env={**environment, "TF_CPP_MIN_LOG_LEVEL": "3"},
            check=True,
            preexec_fn=lambda cores=cores: os.sched_setaffinity(0, cores),
        )
        rows += json.loads(path.read_text())
    path.write_text(json.dumps(rows, indent=1))
    page = table(rows)
    (options.out / "kernels.md").write_text(page + "\n", encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
