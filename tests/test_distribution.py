"""Several devices: virtual ones of a CPU on JAX and TensorFlow, two processes on PyTorch. They do what one does.

Devices must be set before a backend starts: this file's `main` runs in processes of its own.
"""

import os
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


def one_model(network, **options):
    import kdiff

    model = kdiff.DiffusionModel(network, ema=0.9, seed=11, **options)
    model.compile(keras.optimizers.Adam(1e-2), metrics=["mae"])
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


def trained(model, x, labels=None):
    """By the weights and the losses that two epochs give, the samples, and the losses of validation."""
    drawn(model, {"image": x.shape} if labels is None else {"image": x.shape, "label": labels.shape})
    conditions = {} if labels is None else {"label": labels[:5]}
    data = {"image": x} if labels is None else {"image": x, "label": labels}
    history = model.fit(data, epochs=2, batch_size=8, shuffle=False, validation_data=data, verbose=0).history
    return {
        **{name: np.array(values) for name, values in history.items()},
        "samples": model.sample(5, sampler="ddpm", steps=3, batch_size=3, **conditions),
        **weights_of(model),
    }


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
    both = transformer(), one_model(network, **options)
    results = {"transformer": trained(both[0], x, labels), "aware": trained(both[1], x[:, 0, 0])}
    if BACKEND == "jax" and devices != "many":
        results["unet"] = one_step(convolved := unet(), x[:8])
    if devices == "mesh":
        results |= {"layout": divided(both[0]), "layout_unet": divided(convolved)}
    if devices == "many" and BACKEND != "tensorflow":
        results["refused"] = refused(both[1], x[:, 0, 0])
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


MANY = [("transformer", "many"), ("aware", "many")]
MESH = [("transformer", "mesh"), ("aware", "mesh"), ("unet", "mesh")]


@pytest.mark.parametrize(("model", "devices"), [*MANY, *MESH] if BACKEND == "jax" else MANY)
def test_several_devices_do_what_one_does(results, model, devices):
    """The same times, noise, dropped labels and weights in the loss: one seed, one result."""
    one, many = results[f"{model}-1-0"], results[f"{model}-{devices}-0"]
    assert one.keys() == many.keys()
    arrays = ("weights", "averages", "samples")
    for name in one.keys() - {*arrays}:
        np.testing.assert_allclose(many[name], one[name], rtol=1e-6, err_msg=name)
    for name in one.keys() & {*arrays}:
        # Adam divides rounding errors by small gradients.
        np.testing.assert_allclose(many[name], one[name], atol=2e-4, err_msg=name)


@pytest.mark.skipif(BACKEND != "jax", reason="models are divided on JAX")
@pytest.mark.parametrize("model", ["layout", "layout_unet"])
def test_averages_and_optimizer_lie_as_the_weights_do(results, model):
    layout = results[f"{model}-mesh-0"]
    here, whole = layout["weights"].T
    assert here.sum() < 0.8 * whole.sum(), "of these small networks, half of the numbers in two"
    np.testing.assert_array_equal(layout["momenta"], layout["weights"])
    np.testing.assert_array_equal(layout["averages"], layout["weights"])


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
@pytest.mark.parametrize("model", ["transformer", "aware"])
def test_processes_have_the_same_weights_to_the_last_bit(results, model):
    for name, values in results[f"{model}-many-0"].items():
        np.testing.assert_array_equal(results[f"{model}-many-1"][name], values, err_msg=name)


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
