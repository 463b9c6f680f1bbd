"""One contestant of the benchmark, in a process of its own: it does what it is told on its input, line by line.

    {"job": "train", "count": 3}  ->  {"seconds": 0.71, "count": 3}

`speed.py` starts these processes and lets them take turns. Each has the same network, with the same weights.
"""

import argparse
import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

STARTED = time.perf_counter()
CLASSES, STEPS, SCALE = 10, 20, 3.0
NO_CLASS = CLASSES
PICTURES = 512  # in the data set; the networks learn nothing from their noise, and are not meant to

U_NET = {
    "sample_size": 32,
    "block_out_channels": (64, 128, 128),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "num_class_embeds": CLASSES + 1,
}
CIFAR = {  # DDPM's for CIFAR-10, with a class
    **U_NET,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}
ADM = {  # for ImageNet at 64 x 64, with fewer classes
    **U_NET,
    "sample_size": 64,
    "block_out_channels": (192, 384, 576, 768),
    "layers_per_block": 3,
    "down_block_types": ("ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3),
    "up_block_types": (*["AttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 64,
}
STABLE_DIFFUSION = {"sample_size": 64, "cross_attention_dim": 768}  # 1.5: diffusers' own defaults
TOKENS = 77
TINY_U_NET = {**U_NET, "sample_size": 8, "block_out_channels": (32, 32, 32), "layers_per_block": 1}


def dit(width: int, depth: int, heads: int, size: int = 32) -> dict:
    head = {"num_attention_heads": heads, "attention_head_dim": width // heads}
    return {"sample_size": size, "num_layers": depth, "num_embeds_ada_norm": CLASSES, "patch_size": 2, **head}


# Name: class of diffusers, its arguments, and the channels of the data.
NETWORKS = {
    "unet": ("UNet2DModel", U_NET, 3),
    "dit": ("DiTTransformer2DModel", dit(384, 6, 6), 4),
    "dit-b": ("DiTTransformer2DModel", dit(768, 12, 12), 4),
    "cifar10": ("UNet2DModel", CIFAR, 3),
    "adm64": ("UNet2DModel", ADM, 3),
    "sd15": ("UNet2DConditionModel", STABLE_DIFFUSION, 4),
    "tiny-sd": ("UNet2DConditionModel", {**STABLE_DIFFUSION, "sample_size": 8, "block_out_channels": (32,) * 4}, 4),
    "dit-xl": ("DiTTransformer2DModel", dit(1152, 28, 16), 4),
    "tiny-unet": ("UNet2DModel", TINY_U_NET, 3),
    "tiny-dit": ("DiTTransformer2DModel", dit(32, 2, 2, 8), 4),
}


def examples(network: str):
    """Images (or latents) in [-1, 1], channels last, and labels, or the tokens of a text in their place."""
    import numpy as np

    _, options, channels = NETWORKS[network]
    generator = np.random.default_rng(0)
    width = options.get("cross_attention_dim")
    count = PICTURES if width is None else PICTURES // 8
    images = generator.uniform(-1, 1, (count, options["sample_size"], options["sample_size"], channels))
    if width is None:
        return images.astype("float32"), generator.integers(0, CLASSES, count).astype("int32")
    return images.astype("float32"), generator.standard_normal((count, TOKENS, width), "float32")


class Diffusers:
    """The peer: diffusers' network and schedulers in a loop of plain PyTorch, as fast as its documentation knows."""

    def __init__(self, options: argparse.Namespace):
        import copy

        import diffusers
        import torch

        self.torch, self.diffusers, self.batch = torch, diffusers, options.batch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        kind, arguments, channels = NETWORKS[options.network]
        self.network = getattr(diffusers, kind).from_pretrained(options.folder).to(self.device)
        self.shape = (channels, arguments["sample_size"], arguments["sample_size"])
        self.layout = torch.channels_last if kind.startswith("UNet") else torch.contiguous_format
        self.condition = "encoder_hidden_states" if "cross_attention_dim" in arguments else "class_labels"
        self.network.to(memory_format=self.layout)
        average = self.network if options.trained else copy.deepcopy(self.network)
        self.average = average.eval().requires_grad_(False)
        if not options.trained:
            self.optimizer = torch.optim.AdamW(self.network.parameters(), 1e-4, fused=True)
        self.images, self.labels = (torch.from_numpy(array) for array in examples(options.network))
        self.images = self.images.permute(0, 3, 1, 2).contiguous(memory_format=self.layout)
        self.alphas = diffusers.DDPMScheduler(1000).alphas_cumprod.to(self.device)
        type_ = {"float32": torch.float32, "bfloat16": torch.bfloat16}[options.precision]
        self.precision = torch.autocast(self.device, type_, enabled=options.precision != "float32")
        self.forward, self.averaged = self.network, self.average
        if options.compiled:
            self.forward, self.averaged = torch.compile(self.network), torch.compile(self.average)
        self.averages = list(self.average.parameters())
        self.weights = list(self.network.parameters())

    def wait(self):
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def train(self, count: int) -> None:
        torch = self.torch
        self.network.train()
        for _ in range(count):
            rows = torch.randint(len(self.images), (self.batch,))
            x, label = self.images[rows].to(self.device), self.labels[rows].to(self.device)
            t = torch.randint(1000, (self.batch,), device=self.device)
            noise = torch.randn_like(x)
            alpha = self.alphas[t].view(-1, 1, 1, 1)
            x_t = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
            with self.precision:
                output = self.forward(x_t, t, **{self.condition: label}).sample
            loss = torch.nn.functional.mse_loss(output.float(), noise)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_lerp_(self.averages, self.weights, 0.001)
        self.wait()

    def first(self) -> None:
        """One training step."""
        self.train(1)

    def multiply(self, count: int) -> dict:
        """The rate of large matrix products in float32 or bfloat16, multiply-additions a second: the machine's peak."""
        kind = self.torch.get_autocast_dtype(self.device) if self.precision._enabled else self.torch.float32
        a, b = (self.torch.randn(2048, 2048, device=self.device, dtype=kind) for _ in range(2))
        rates = []
        for _ in range(count):
            started = time.perf_counter()
            a @ b
            self.wait()
            rates.append(2048**3 / (time.perf_counter() - started))
        return {"rate": sorted(rates)[len(rates) // 2]}

    def evaluate(self, count: int) -> None:
        x = self.torch.randn(self.batch, *self.shape, device=self.device).contiguous(memory_format=self.layout)
        t, label = self.torch.full((self.batch,), 500, device=self.device), self.labels[: self.batch].to(self.device)
        with self.torch.inference_mode(), self.precision:
            for _ in range(count):
                self.averaged(x, t, **{self.condition: label})
                self.wait()  # as a sampler does, whose next evaluation is of what came out of this one

    def sample(self, solver: str, guided: bool) -> None:
        torch = self.torch
        kinds = {"ddim": self.diffusers.DDIMScheduler, "dpm_solver_pp": self.diffusers.DPMSolverMultistepScheduler}
        scheduler = kinds[solver](1000)
        scheduler.set_timesteps(STEPS)
        x = torch.randn(self.batch, *self.shape, device=self.device).contiguous(memory_format=self.layout)
        label = self.labels[: self.batch].to(self.device)
        none = torch.full_like(label, NO_CLASS if self.condition == "class_labels" else 0)
        label = torch.cat([label, none]) if guided else label
        with torch.inference_mode(), self.precision:
            for t in scheduler.timesteps:
                given = torch.cat([x, x]) if guided else x
                times = t.to(self.device).expand(len(given))
                output = self.averaged(given, times, **{self.condition: label}).sample.float()
                if guided:
                    with_label, without = output.chunk(2)
                    output = without + SCALE * (with_label - without)
                x = scheduler.step(output, t, x).prev_sample
        x.float().cpu().numpy()


class Kdiff:
    """kdiff through its public API: `fit` on a tf.data pipeline, and `sample`."""

    def __init__(self, options: argparse.Namespace):
        import keras

        from kdiff import data
        from kdiff.interop import diffusers

        self.batch, self.trained = options.batch, options.trained
        keras.config.set_dtype_policy({"float32": "float32", "bfloat16": "mixed_bfloat16"}[options.precision])
        images, labels = examples(options.network)
        self.condition = "label" if labels.ndim == 1 else "context"
        dataset = data.images(images, batch_size=self.batch, labels=labels, repeat=None)
        self.dataset = dataset.map(lambda batch: {"image": batch["image"], self.condition: batch["label"]})
        self.folder, self.images, self.labels = options.folder, images, labels
        self.network = diffusers.load(options.folder)
        self.model = self.make(self.network)
        self.model.build({"image": images.shape, self.condition: labels.shape})
        self.denoise = None

    def make(self, network):
        import keras

        import kdiff

        process = {"schedule": "linear_beta", "prediction": "noise", "times": "discrete", "time_label": "index"}
        model = kdiff.DiffusionModel(network, **process, codec="identity", ema=None if self.trained else 0.999)
        model.compile(keras.optimizers.AdamW(1e-4, weight_decay=0.01))
        return model

    def train(self, count: int) -> dict:
        """Seconds a step between the end of the first and that of the last: what `fit` costs to start is not a step."""
        return self.fitted(self.dataset, count)

    def first(self) -> None:
        """One training step."""
        self.train(0)

    def train_on_arrays(self, count: int) -> dict:
        """The same on batches that lie ready as NumPy arrays: what feeding from tf.data costs."""
        batch = {"image": self.images[: self.batch], self.condition: self.labels[: self.batch]}
        return self.fitted((batch for _ in range(count + 1)), count)

    def read(self, count: int) -> None:
        """Batches of the pipeline alone."""
        for _ in self.dataset.take(100 * count):
            pass

    def fitted(self, data, count: int) -> dict:
        import keras

        ends = []

        def end(step, logs):
            if step in (0, count):
                float(logs["loss"])  # waits
                ends.append(time.perf_counter())

        callback = keras.callbacks.LambdaCallback(on_train_batch_end=end)
        self.model.fit(data, steps_per_epoch=count + 1, callbacks=[callback], verbose=0)
        return {"seconds": (ends[-1] - ends[0]) / max(1, count)}

    def evaluate(self, count: int) -> None:
        import numpy as np
        from keras import ops

        from kdiff import backend

        shape = (self.batch, *self.images.shape[1:])
        x = ops.convert_to_tensor(np.random.default_rng(0).normal(size=shape).astype("float32"))
        given = {self.condition: ops.convert_to_tensor(self.labels[: self.batch])}
        if self.denoise is None:
            m = self.model.schedule.at(0.5)
            self.denoise = backend.compiled(lambda x, given: self.model.denoise(x, m, **given), self.model)
        for _ in range(count):
            ops.convert_to_numpy(self.denoise(x, given))  # waits; JAX would begin the next before this one ends

    def sample(self, solver: str, guided: bool) -> None:
        import numpy as np

        import kdiff

        none = NO_CLASS if self.condition == "label" else np.zeros_like(self.labels[0])
        guidance = kdiff.guidance.ClassifierFree(SCALE, negative={self.condition: none}) if guided else ()
        sampler = kdiff.Sampler(solver, "leading", STEPS, guidance=guidance)
        given = {self.condition: self.labels[: self.batch]}
        self.model.sample(self.batch, sampler=sampler, batch_size=self.batch, **given)

    def flops(self, count: int) -> dict:
        """Multiply-additions of the network on one image."""
        from kdiff.networks import flops

        return {"flops": flops(self.network, self.images.shape[1:], **{self.condition: self.labels.shape[1:]})}

    def by_hand(self, count: int) -> None:
        """The same steps without `fit`: what its convenience costs."""
        if not hasattr(self, "step"):
            from kdiff.interop import diffusers

            self.step = hand_written_step(diffusers.load(self.folder), self.images, self.labels, self.batch)
            self.step()  # JAX compiles again for the second, whose state comes from the first
        for _ in range(count):
            loss = self.step()
        float(loss)


def hand_written_step(network, images, labels, batch: int) -> Callable:
    """A training step in the backend's own language: noise, network, gradient, AdamW, averages; examples at hand."""
    import keras
    import numpy as np
    from keras import ops

    generator = np.random.default_rng(0)
    alphas = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)).astype("float32")

    def loss_of(call, x, label, t, noise, alpha):
        alpha = ops.reshape(alpha, (-1, 1, 1, 1))
        x_t = ops.sqrt(alpha) * x + ops.sqrt(1 - alpha) * noise
        return ops.mean(ops.square(call({"image": x_t, "time": ops.cast(t, "float32"), "label": label}) - noise))

    def example():
        rows, t = generator.integers(0, len(images), batch), generator.integers(0, 1000, batch)
        return images[rows], labels[rows], t.astype("int32"), alphas[t]

    if keras.backend.backend() == "torch":
        import torch

        averages = [weight.value.detach().clone() for weight in network.trainable_variables]
        weights = [weight.value for weight in network.trainable_variables]
        optimizer = torch.optim.AdamW(weights, 1e-4, fused=True)

        def step():
            x, label, t, alpha = (ops.convert_to_tensor(array) for array in example())
            loss = loss_of(lambda inputs: network(inputs, training=True), x, label, t, torch.randn_like(x), alpha)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_lerp_(averages, weights, 0.001)
            return loss.detach()

        return step

    optimizer = keras.optimizers.AdamW(1e-4, weight_decay=0.01)
    optimizer.build(network.trainable_variables)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        averages = [tf.Variable(weight.value) for weight in network.trainable_variables]

        @tf.function(autograph=False)
        def update(x, label, t, alpha):
            noise = tf.random.normal(tf.shape(x))
            with tf.GradientTape() as tape:
                loss = loss_of(lambda inputs: network(inputs, training=True), x, label, t, noise, alpha)
            weights = network.trainable_variables
            optimizer.apply(tape.gradient(loss, [weight.value for weight in weights]), weights)
            for average, weight in zip(averages, weights, strict=True):
                average.assign_add(0.001 * (weight.value - average))
            return loss

        return lambda: update(*map(tf.convert_to_tensor, example()))

    import jax

    def pure(state, key, x, label, t, alpha):
        trainable, other, slots, averages = state
        noise = jax.random.normal(key, x.shape)

        def loss_and_state(trainable):
            found = []

            def call(inputs):
                y, rest = network.stateless_call(trainable, other, inputs, training=True)
                found.append(rest)
                return y

            return loss_of(call, x, label, t, noise, alpha), found

        (loss, found), gradients = jax.value_and_grad(loss_and_state, has_aux=True)(trainable)
        trainable, slots = optimizer.stateless_apply(slots, gradients, trainable)
        averages = [average + 0.001 * (weight - average) for average, weight in zip(averages, trainable, strict=True)]
        return loss, (trainable, found[0], slots, averages)

    compiled = jax.jit(pure, donate_argnums=0)
    values = [[v.value for v in group] for group in (network.trainable_variables, network.non_trainable_variables)]
    state = [*values, [v.value for v in optimizer.variables], values[0]]
    memory = {"state": jax.tree.map(lambda value: value.copy(), state), "count": 0}

    def step():
        key = jax.random.key(memory["count"])
        loss, memory["state"] = compiled(memory["state"], key, *example())
        memory["count"] += 1
        return loss

    return step


def answer(contestant, job: str, count: int = 1, **options) -> dict:
    """Seconds a time, of so many; or what a job that is no race says."""
    started = time.perf_counter()
    if job == "sample":
        for _ in range(count):
            contestant.sample(**options)
    elif said := getattr(contestant, job)(count):
        return said
    return {"seconds": (time.perf_counter() - started) / count}


def cold(contestant_of: Callable, options: argparse.Namespace) -> dict:
    """From the start of the process to the end of the first training step; and the most memory that ten take, also
    without what the process held before the first: Python's libraries, TensorFlow for tf.data, weights and data.
    """
    contestant = contestant_of(options)
    ready, before = time.perf_counter(), peak()
    contestant.first()
    first = time.perf_counter() - ready
    contestant.train(9)
    return {"ready": ready - STARTED, "first step": first, "peak GiB": peak(), "training GiB": peak() - before}


def peak() -> float:
    """The most memory that this process has had, in GiB: the accelerator's, if there is one."""
    torch, jax, tf = (sys.modules.get(name) for name in ("torch", "jax", "tensorflow"))
    if torch and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    if jax and jax.default_backend() != "cpu":
        return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] / 2**30
    if tf and tf.config.get_visible_devices("GPU"):
        return tf.config.experimental.get_memory_info("GPU:0")["peak"] / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestant", choices=("diffusers", "kdiff", "write"))
    parser.add_argument("--network", choices=NETWORKS, default="unet")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--trained", action="store_true", help="no training: without averages and optimizer")
    parser.add_argument("--compiled", action="store_true", help="diffusers with torch.compile")
    parser.add_argument("--cold", action="store_true", help="measure one start, and end")
    return parser.parse_args()


def write(options: argparse.Namespace) -> None:
    """The weights that all start from. diffusers' DiT embeds time and label anew in each block; here, all alike."""
    import diffusers
    import torch

    torch.manual_seed(0)
    kind, network, channels = NETWORKS[options.network]
    model = getattr(diffusers, kind)(**network, in_channels=channels, out_channels=channels)
    if kind == "DiTTransformer2DModel":
        first, *others = (block.norm1.emb.state_dict() for block in model.transformer_blocks)
        for block in others:
            for name, array in block.items():
                array.copy_(first[name])
    model.save_pretrained(options.folder)


def main() -> None:
    options = arguments()
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no reply
    if options.contestant == "write":
        return write(options)
    kind = {"diffusers": Diffusers, "kdiff": Kdiff}[options.contestant]
    if options.cold:
        print(json.dumps(cold(kind, options)), file=replies)
        return None
    contestant = kind(options)
    print(json.dumps({"ready": time.perf_counter() - STARTED}), file=replies)
    for line in sys.stdin:
        print(json.dumps(answer(contestant, **json.loads(line))), file=replies)
    return None


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
