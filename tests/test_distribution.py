"""Several devices: virtual ones of a CPU on JAX and TensorFlow, two processes on PyTorch. They do what one does.

Devices must be set before a backend starts: this file's `main` runs in processes of its own.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from kdiff import backend, blocks, distribution, networks

BACKEND = keras.backend.backend()
DEVICES = 2  # that share a batch
RANK = int(os.environ.get("RANK", 0))
ROWS = 20  # of which the last batch has 4


def one_model(network, accumulated=None, **options):
    import kdiff

    model = kdiff.DiffusionModel(network, ema=0.9, seed=11, **options)
    optimizer = keras.optimizers.Adam(1e-2, gradient_accumulation_steps=accumulated)
    model.compile(optimizer, metrics=["mae"], weighted_metrics=["mse"])
    return model


def transformer():
    import kdiff

    conditions = {"label": kdiff.blocks.LabelEmbedding(3, dropout=0.3)}
    network = kdiff.networks.DiT(16, 1, 2, kdiff.networks.adaptive_block(2), conditions=conditions)
    return one_model(network, schedule="linear_beta")


def unet():
    """Two levels, with convolutions between them."""
    import kdiff

    return one_model(kdiff.networks.UNet.residual(8, levels=2, depth=1))


def drawn(model, shapes):
    model.build(shapes)
    generator = np.random.default_rng(RANK)  # the other processes take the weights of the first
    for weight in model.network.weights:
        weight.assign(0.2 * generator.standard_normal(weight.shape))
    model.reset_ema()


def weights_of(model):
    return {
        "weights": np.concatenate([keras.ops.convert_to_numpy(weight).ravel() for weight in model.network.weights]),
        "averages": np.concatenate([keras.ops.convert_to_numpy(value).ravel() for value in model.ema_weights.values]),
    }


def one_step(model, x):
    """By the loss and the weights after a step: a U-Net takes long to compile."""
    drawn(model, {"image": x.shape})
    losses = model.train_on_batch(x, return_dict=True)
    return {**{name: np.array(value) for name, value in losses.items()}, **weights_of(model)}


def trained(model, x, labels=None, weights=None, used=True):
    """By the weights and losses that two epochs give, and, if it is `used`, the losses of validation and samples."""
    drawn(model, {"image": x.shape} if labels is None else {"image": x.shape, "label": labels.shape})
    conditions = {} if labels is None else {"label": labels[:5]}
    data = {"image": x, "label": labels, "sample_weight": weights}
    data = {name: rows for name, rows in data.items() if rows is not None}
    validation = data if used else None
    history = model.fit(data, epochs=2, batch_size=8, shuffle=False, validation_data=validation, verbose=0).history
    results = {**{name: np.array(values) for name, values in history.items()}, **weights_of(model)}
    if used:
        results["samples"] = model.sample(5, sampler="ddpm", steps=3, batch_size=3, **conditions)
    return results


def parted():
    """The rows that this process reads in each of two epochs, by PyTorch's sampler, and how many it trains on."""
    import torch

    import kdiff

    class Noted(kdiff.objectives.Denoising):
        def problem(self, model, x, conditions, keys, training):
            counts.append(len(x))
            return super().problem(model, x, conditions, keys, training)

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 16

        def __getitem__(self, index):
            read.append(index)
            return torch.full((3,), index / 16)

    model, orders = one_model(kdiff.networks.MLP(8, 1), codec="identity", objective=Noted()), []
    for inner in (False, True):
        sampler = torch.utils.data.DistributedSampler(Rows(), shuffle=True, seed=0)
        batches = torch.utils.data.BatchSampler(sampler, 4, True)
        options = {"batch_sampler": batches} if inner else {"sampler": sampler, "batch_size": 4}
        read, counts = [], []
        model.fit(torch.utils.data.DataLoader(Rows(), **options), epochs=2, verbose=0)
        orders.append(np.reshape(read[-16:], (2, 8)))  # after the first batch, whose shapes are looked at
        assert counts[-4:] == [4] * 4, counts
    read, counts = [], []
    model.train_on_batch(np.zeros((8, 3), "float32"))
    assert counts[-1] == 4, counts
    return {"orders": np.array(orders)}


def broken_off(x, folder, devices):
    """By the results of whole runs, and of those that are broken off in step 4 and go on, in a folder a process."""
    import kdiff

    def run(*callbacks):
        model = one_model(kdiff.networks.MLP(8, 1), codec="identity")
        drawn(model, {"image": x.shape})
        weights = np.linspace(0, 2, ROWS, dtype="float32")
        data = {"image": x, "sample_weight": weights}
        history = model.fit(data, epochs=2, batch_size=8, shuffle=False, verbose=0, callbacks=[*callbacks]).history
        return {**history, "samples": model.sample(4, steps=1), **weights_of(model)}

    def stop(batch, logs):
        steps.append(batch)
        if len(steps) == 5:
            raise InterruptedError

    results = {"whole": run()}
    own = folder / f"backup-{RANK}"
    kinds = {"backup": lambda: kdiff.BackupCallback(own / "kdiff", save_freq=2)}
    kinds["keras"] = lambda: keras.callbacks.BackupAndRestore(own / "keras")
    for name, kind in kinds.items() if devices == "many" else ():
        steps = []
        with pytest.raises(InterruptedError):
            run(kind(), keras.callbacks.LambdaCallback(on_train_batch_end=stop))
        keras.utils.set_random_seed(5 + RANK)
        if RANK:  # kdiff's is taken from the first process
            shutil.rmtree(own / "kdiff", ignore_errors=True)
        results[name] = run(kind())
    return results


def accumulated(x):
    """The error of accumulated gradients on TensorFlow's replicas."""
    import kdiff

    with pytest.raises(ValueError, match="cannot accumulate") as caught:
        one_model(kdiff.networks.MLP(8, 1), accumulated=2, codec="identity").fit(x, verbose=0)
    return {"error": np.array(str(caught.value))}


def laid_out(model):
    """The shapes of what a device has of x, before and after a step of 8 samples, as JAX's compiler laid it out."""
    import jax

    import kdiff

    shapes = []

    def look(x):
        jax.debug.inspect_array_sharding(x, callback=lambda layout: shapes.append(layout.shard_shape(x.shape)))

    class Seen(kdiff.solvers.DDIM):
        def step(self, denoise, schedule, x, *arguments):
            look(x)
            y, *results = super().step(denoise, schedule, x, *arguments)
            look(y)
            return y, *results

    model.sample(8, sampler=kdiff.Sampler(Seen(), steps=1))
    return {"shapes": np.array(shapes)}


def refused(model, x):
    """The errors of batches that the devices cannot share, and whether a step was made before them."""
    before, errors = keras.ops.convert_to_numpy(model.optimizer.iterations), []
    for data, size in ((x[:17], 8), (x[:18], 9)):
        try:
            model.fit(data, batch_size=size, verbose=0)
        except ValueError as error:
            errors.append(str(error))
    return {"errors": np.array(errors), "steps": keras.ops.convert_to_numpy(model.optimizer.iterations) - before}


def main(devices: str, folder: Path) -> None:
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    keras.utils.set_random_seed(3 + RANK)
    if BACKEND == "tensorflow" and devices == "many":
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * DEVICES)
    import kdiff

    backend.processes._BUCKET = 100  # numbers, so that several are summed up
    if devices in ("many", "8"):
        kdiff.distribution.data_parallel()
    if devices == "8":
        return backed_up(folder)
    if devices == "mesh":
        mesh = keras.distribution.DeviceMesh((2, 2), ["batch", "model"], keras.distribution.list_devices())
        layout = kdiff.networks.layout_map(mesh)
        keras.distribution.set_distribution(keras.distribution.ModelParallel(layout_map=layout))
    x = np.random.default_rng(0).uniform(-1, 1, (ROWS, 4, 4, 2)).astype("float32")
    labels = np.arange(ROWS, dtype="int32") % 3
    options = {"schedule": kdiff.schedules.LinearBeta(4), "codec": "identity", "weighting": "min_snr"}
    options |= {"prediction": kdiff.predictions.LearnedVariance("noise")}
    options |= {"objective": kdiff.objectives.LossAware(4, history=2, points="stratified")}
    network = kdiff.networks.MLP(8, 1, out_channels=4)
    # TensorFlow's strategies cannot accumulate gradients.
    both = transformer(), one_model(network, accumulated=None if BACKEND == "tensorflow" else 2, **options)
    weights = np.linspace(0, 2, ROWS, dtype="float32") ** 2
    results = {"transformer": trained(both[0], x, labels), "aware": trained(both[1], x[:, 0, 0], weights=weights)}
    if devices != "mesh":
        half = one_model(kdiff.networks.MLP(8, 1, dtype="mixed_float16"), codec="identity")
        heavy = np.where(np.arange(ROWS) == 7, 1e3, 0.05 * weights)  # too heavy for float16, on the last device
        results["half"] = trained(half, x[:, 0, 0], weights=heavy.astype("float32"), used=False)
    if BACKEND == "torch":
        results |= broken_off(x[:, 0, 0], folder, devices)
    if BACKEND == "jax" and devices != "many":
        results["unet"] = one_step(convolved := unet(), x[:8])
    if devices == "mesh":
        results |= {"layout": divided(both[0]), "layout_unet": divided(convolved)}
    if devices != "1" and BACKEND == "jax":
        results["samples"] = laid_out(both[1])
    if devices == "many":
        results["refused"] = accumulated(x[:, 0, 0]) if BACKEND == "tensorflow" else refused(both[1], x[:, 0, 0])
    if devices == "many":
        results["first"] = {"is": kdiff.distribution.is_first()}
    if devices == "many" and BACKEND == "torch":
        results["parted"] = parted()
    for name, values in results.items():
        np.savez(folder / f"{name}-{devices}-{RANK}.npz", **values)


def divided(model):
    """The shares of the numbers in weights, averages and optimizer that a device of the mesh has."""
    momenta = [one for one in model.optimizer.variables if one.name.endswith("momentum")]
    groups = {"weights": model.trainable_variables, "averages": model.ema_weights.values, "momenta": momenta}
    sizes = {
        name: [(np.prod(one.value.sharding.shard_shape(one.shape)), np.prod(one.shape)) for one in group]
        for name, group in groups.items()
    }
    return {name: np.array(size) for name, size in sizes.items()}


def backed_up(folder: Path) -> None:
    """Trains for six steps, or, where `killed` is to be, until the process is killed after four."""
    import kdiff

    x = np.random.default_rng(0).uniform(-1, 1, (48, 3)).astype("float32")
    keras.utils.set_random_seed(3)  # which the network's weights follow
    model = one_model(kdiff.networks.MLP(8, 1), codec="identity")
    losses = []
    note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: losses.append(float(logs["loss"])))
    callbacks = [kdiff.BackupCallback(folder / "backup", save_freq=2, delete_checkpoint=False), note]
    if os.environ.get("KILLED"):
        callbacks.append(keras.callbacks.LambdaCallback(on_train_batch_end=lambda b, logs: b == 4 and os._exit(9)))
    model.fit(x, batch_size=8, shuffle=False, verbose=0, callbacks=callbacks)
    values = [keras.ops.convert_to_numpy(one).ravel() for one in (*model.network.weights, *model.ema_weights.values)]
    np.savez(folder / "end.npz", weights=np.concatenate(values), loss=losses[-1])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))


def run(devices: str, folder: Path, *start: str, ends: int = 0, **environment: str) -> None:
    import kdiff

    environment |= {**os.environ, "PYTHONPATH": str(Path(kdiff.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    count = {"1": 1, "8": 8}.get(devices, 4)
    environment["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={count}"
    command = [sys.executable, *start, __file__, devices, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == ends, done.stderr[-4000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    run("1", folder)
    start = ("-m", "torch.distributed.run", "--nproc-per-node", str(DEVICES)) if BACKEND == "torch" else ()
    run("many", folder, *start)
    if BACKEND == "jax":
        run("mesh", folder)
    return {file.stem: dict(np.load(file)) for file in folder.glob("*.npz")}


MANY = [("transformer", "many"), ("aware", "many"), ("half", "many")]
MESH = [("transformer", "mesh"), ("aware", "mesh"), ("unet", "mesh")]


@pytest.mark.parametrize(("model", "devices"), [*MANY, *MESH] if BACKEND == "jax" else MANY)
def test_several_devices_do_what_one_does(results, model, devices):
    """The same times, noise, dropped labels and weights in the loss: one seed, one result.

    "aware" has sample weights and accumulates gradients. In the first batches of "half" a weight is too large for
    float16: the gradients of one of the devices overflow, and all leave the step out.
    """
    one, many = results[f"{model}-1-0"], results[f"{model}-{devices}-0"]
    assert one.keys() == many.keys()
    # JAX and PyTorch round the losses by up to 2.6e-7 in another way. TensorFlow's replicas halve and add up theirs: up
    # to 9.4e-7. Adam divides rounding errors by small gradients. In float16 the sums over the rows, which are the
    # gradients, are rounded by up to 5e-4: the losses differ by up to 6e-5, and the weights by 5e-4.
    exact, close = 1e-6 if BACKEND == "tensorflow" else 3e-7, 2e-4
    exact, close = (5e-4, 2e-3) if model == "half" else (exact, close)
    arrays = ("weights", "averages", "samples")
    for name in one.keys() - {*arrays}:
        np.testing.assert_allclose(many[name], one[name], rtol=exact, err_msg=name)
    for name in one.keys() & {*arrays}:
        np.testing.assert_allclose(many[name], one[name], atol=close, err_msg=name)


@pytest.mark.skipif(BACKEND != "jax", reason="models are divided on JAX")
@pytest.mark.parametrize("model", ["layout", "layout_unet"])
def test_averages_and_optimizer_lie_as_the_weights_do(results, model):
    layout = results[f"{model}-mesh-0"]
    here, whole = layout["weights"].T
    assert here.sum() < 0.8 * whole.sum(), "of these small networks, half of the numbers in two"
    np.testing.assert_array_equal(layout["momenta"], layout["weights"])
    np.testing.assert_array_equal(layout["averages"], layout["weights"])


@pytest.mark.skipif(BACKEND != "jax", reason="the layout is JAX's")
@pytest.mark.parametrize(("devices", "rows"), [("many", 2), ("mesh", 4)])
def test_samples_lie_on_all_devices(results, devices, rows):
    """Eight, inside the compiled step of a sampler: on each of four, and on two for batches of two for weights."""
    shapes = results[f"samples-{devices}-0"]["shapes"]
    assert len(shapes) > 1
    np.testing.assert_array_equal(shapes, [(rows, 2)] * len(shapes))


@pytest.mark.skipif(BACKEND != "jax", reason="eight devices of one process are JAX's")
def test_a_run_of_eight_devices_that_is_killed_goes_on(tmp_path):
    """The backup is of step 4, the kill in step 5."""
    run("8", tmp_path / "whole")
    run("8", tmp_path / "broken", ends=9, KILLED="yes")
    run("8", tmp_path / "broken")
    whole, broken = (dict(np.load(tmp_path / name / "end.npz")) for name in ("whole", "broken"))
    np.testing.assert_array_equal(broken["weights"], whole["weights"])
    assert broken["loss"] == whole["loss"]


@pytest.mark.skipif(BACKEND != "torch", reason="the processes are PyTorch's")
@pytest.mark.parametrize("model", ["transformer", "aware", "half", "whole"])
def test_processes_have_the_same_weights_to_the_last_bit(results, model):
    for name, values in results[f"{model}-many-0"].items():
        np.testing.assert_array_equal(results[f"{model}-many-1"][name], values, err_msg=name)


@pytest.mark.skipif(BACKEND != "torch", reason="the processes are PyTorch's")
@pytest.mark.parametrize("callback", ["backup", "keras"])
def test_runs_of_processes_with_folders_of_their_own_go_on(results, callback):
    """With the same weights and samples, and the losses of the epoch that was broken off."""
    whole, broken = results["whole-many-0"], results[f"{callback}-many-0"]
    np.testing.assert_allclose(whole["samples"], results["whole-1-0"]["samples"], atol=1e-6)
    for name, values in broken.items():
        if name in ("weights", "averages", "samples"):
            np.testing.assert_array_equal(values, whole[name], err_msg=name)
        else:
            np.testing.assert_allclose(values, whole[name][1:], rtol=2e-7, err_msg=name)


@pytest.mark.skipif(BACKEND != "torch", reason="the processes are PyTorch's")
def test_of_several_processes_one_is_the_first(results):
    assert [bool(results[f"first-many-{rank}"]["is"]) for rank in range(DEVICES)] == [True, False]


@pytest.mark.skipif(BACKEND != "torch", reason="the sampler is PyTorch's")
def test_parts_of_the_data_have_a_new_order_in_each_epoch(results):
    """Each process reads half, all of it and none of the other's; and a batch given to all is shared again."""
    orders = np.stack([results[f"parted-many-{rank}"]["orders"] for rank in range(DEVICES)], axis=2)
    for epochs in orders:
        for epoch in epochs:
            np.testing.assert_array_equal(np.sort(epoch.ravel()), np.arange(16))
        assert np.any(epochs[0] != epochs[1])


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the others accumulate gradients")
def test_gradients_that_replicas_cannot_accumulate(results):
    """Are refused before the first step; Keras would raise an error of `merge_call`."""
    assert "JAX and PyTorch can" in str(results["refused-many-0"]["error"])


@pytest.mark.skipif(BACKEND == "tensorflow", reason="its replicas may have different numbers of rows")
def test_batches_that_devices_cannot_share(results):
    """Are refused before the first step."""
    found = results["refused-many-0"]
    assert len(found["errors"]) == 2
    assert found["steps"] == 0
    assert "the last batch of 1 examples" in found["errors"][0]
    assert "a batch of 9 examples" in found["errors"][1]


@pytest.mark.skipif(BACKEND == "torch", reason="each process has the device of its number")
@pytest.mark.parametrize("devices", ["cpu:0", [], ["cpu:9"], ["tpu:0"]])
def test_devices_that_there_are_not(devices):
    with pytest.raises(TypeError if devices == "cpu:0" else ValueError, match=r"`devices` must be .*received: "):
        distribution.data_parallel(devices)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the strategies are TensorFlow's")
def test_several_machines_of_tensorflow(monkeypatch):
    """One of them is the first, and models are refused there."""
    import tensorflow as tf

    cluster = {"worker": ["a:1", "b:1"], "evaluator": ["c:1"]}
    for jobs, first in ((cluster, "worker"), ({**cluster, "chief": ["d:1"]}, "chief")):
        for kind in jobs:
            for number in range(len(jobs[kind])):
                spec = tf.train.ClusterSpec(jobs)
                resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(spec, task_type=kind, task_id=number)
                strategy = SimpleNamespace(cluster_resolver=resolver)
                monkeypatch.setattr(tf.distribute, "get_strategy", lambda strategy=strategy: strategy)
                assert distribution.is_first() == ((kind, number) == (first, 0))
    extended = SimpleNamespace(worker_devices=("cpu:0",))
    model = SimpleNamespace(distribute_strategy=SimpleNamespace(num_replicas_in_sync=2, extended=extended))
    with pytest.raises(ValueError, match="several machines"):
        backend.check_strategy(model)


NETWORKS = {
    "dit": lambda: networks.DiT(128, 2, 2, networks.adaptive_block(2)),
    "mmdit": lambda: networks.MMDiT(32, 2, conditions={"text": blocks.OptionalCondition()}),
    "uvit": lambda: networks.UViT(64, 3, 2),
    "unet": lambda: networks.UNet.transformer(32, levels=2, depth=1),
    "hybrid": lambda: networks.Hybrid.composed((64, 128), (1, 1)),
}


@pytest.mark.once
@pytest.mark.parametrize("name", NETWORKS)
def test_layouts_divide_most_of_each_network(name):
    """Each kernel by one of its own axes, at most once."""
    network = NETWORKS[name]()
    shapes = {"image": (None, 8, 8, 4), "time": (None,), **({"text": (None, 4, 8)} if name == "mmdit" else {})}
    with backend.unallocated():
        network.build(shapes)
    mesh = keras.distribution.DeviceMesh((1, 1), ["batch", "model"], ["cpu:0"])
    layout = networks.layout_map(mesh)
    sizes = {True: 0, False: 0}
    for variable in network.variables:
        found = layout[variable.path]
        assert found is None or len(found.axes) == len(variable.shape), variable.path
        if variable.path.endswith("/output/kernel"):  # it sums over what the layer before has divided
            assert tuple(found.axes) == ("model", None), variable.path
        sizes[found is not None] += int(np.prod(variable.shape))
    assert sizes[True] > 0.75 * (sizes[True] + sizes[False])


@pytest.mark.once
def test_layouts_check_what_they_are_given():
    def mesh(*names):
        return keras.distribution.DeviceMesh((1,) * len(names), names, ["cpu:0"])

    for wrong in ("x", None, 2):
        with pytest.raises(TypeError, match=r"must be a keras\.distribution\.DeviceMesh; received"):
            networks.layout_map(wrong)
    for names in (("batch",), ("batch", "model", "more"), ("model", "model"), ("batch", None)):
        with pytest.raises(ValueError, match="two axes with different names"):
            networks.layout_map(mesh(*names))
    for axes in (0, 7, "2", None):
        with pytest.raises(ValueError, match=r"`axes` must be one of \[1, 2, 3\]; received"):
            networks.layout_map(mesh("batch", "model"), axes)


@pytest.mark.once
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_convolutions_of_each_rank_are_divided_by_output_channels(axes):
    network = networks.UNet.residual(8, levels=1, depth=1)
    with backend.unallocated():
        network.build({"image": (None, *[8] * axes, 3), "time": (None,)})
    layout = networks.layout_map(keras.distribution.DeviceMesh((1, 1), ["batch", "model"], ["cpu:0"]), axes)
    kernels = [one for one in network.variables if "conv2d" in one.path and one.path.endswith("kernel")]
    assert kernels
    for kernel in kernels:
        assert layout[kernel.path].axes == (*[None] * (axes + 1), "model"), kernel.path
        assert len(kernel.shape) == axes + 2


@pytest.mark.once
@pytest.mark.parametrize("name", ["dit", "uvit", "unet", "hybrid"])
def test_networks_on_series_are_divided_too(name):
    network = NETWORKS[name]()
    with backend.unallocated():
        network.build({"image": (None, 8, 4), "time": (None,)})
    layout = networks.layout_map(keras.distribution.DeviceMesh((1, 1), ["batch", "model"], ["cpu:0"]), axes=1)
    found = [(one, layout[one.path]) for one in network.variables]
    assert all(one is None or len(one.axes) == len(variable.shape) for variable, one in found)
    sizes = [int(np.prod(variable.shape)) for variable, _ in found]
    assert sum(size for size, (_, one) in zip(sizes, found, strict=True) if one) > 0.6 * sum(sizes)


@pytest.mark.skipif(BACKEND != "jax", reason="models are divided on JAX")
@pytest.mark.parametrize(("axes", "wanted"), [(2, 1), (1, 2), (3, 1)])
def test_a_layout_for_another_number_of_axes(axes, wanted):
    """The error says what to give instead."""
    mesh = keras.distribution.DeviceMesh((1, 1), ["batch", "model"], keras.distribution.list_devices()[:1])
    shape = (None, *[8] * wanted, 4)
    try:
        for given, raises in ((axes, True), (wanted, False)):
            layout = networks.layout_map(mesh, given)
            keras.distribution.set_distribution(keras.distribution.ModelParallel(layout_map=layout))
            network = networks.UNet.residual(8, levels=1, depth=1)
            words = rf"for {axes + 2} axes; this kernel has {wanted + 2}.*`networks.layout_map\(mesh, axes=1\)` is for"
            with pytest.raises(ValueError, match=words) if raises else contextlib.nullcontext():
                network.build({"image": shape, "time": (None,)})
        networks.MLP(8, 1).build({"image": (None, 3), "time": (None,)})
    finally:
        keras.distribution.set_distribution(None)
