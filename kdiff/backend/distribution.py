"""One model on several devices: by `keras.distribution` on JAX, `tf.distribute` on TensorFlow, processes on PyTorch.

JAX sees a batch as a whole wherever its rows are. On the other two each device computes some rows of a batch: a replica
of a `tf.distribute` strategy, or a process that torchrun has started, of which every one is given the whole batch.
"""

import contextlib
import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from kdiff.backend.running import BACKEND

__all__ = [
    "check_shares",
    "check_strategy",
    "data_parallel",
    "device_count",
    "first_row",
    "gathered",
    "is_first_process",
    "is_parted",
    "laid_out_as",
    "mean_of_processes",
    "of_first_process",
    "on_devices",
    "over_devices",
    "parting_sampler",
    "rows_of_process",
    "share_of_loss",
    "share_training",
    "sharers",
    "strategy_of",
    "whole_batch",
]

_BUCKET = 2**23  # numbers that PyTorch's processes add up at once


def data_parallel(devices: Sequence[str] | None = None) -> None:
    """As in `kdiff.distribution.data_parallel`."""
    if BACKEND == "torch":
        _join_processes(devices)
        return
    if devices is not None:
        devices = _checked_devices(devices)
    if BACKEND == "jax":
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    else:
        import tensorflow as tf

        tf.distribute.experimental_set_strategy(tf.distribute.MirroredStrategy(devices or _alike_devices()))


def _alike_devices() -> list[str]:
    """The GPUs that TensorFlow sees, or else its CPUs, as "gpu:0"."""
    import tensorflow as tf

    devices = [_device_name(one.name) for kind in ("GPU", "CPU") for one in tf.config.list_logical_devices(kind)]
    return [name for name in devices if name.startswith(devices[0][:3])]


def _device_name(name: str) -> str:
    """The short form, "gpu:0", of a name such as "/job:localhost/replica:0/task:0/device:GPU:0"."""
    return ":".join(name.lower().replace("/", ":").split(":")[-2:])


def _checked_devices(devices: Any) -> list[str]:
    """Raises an error unless these are names of devices, all of one kind."""
    if isinstance(devices, str) or not all(isinstance(name, str) for name in devices):
        raise TypeError(f"data_parallel: `devices` must be a list of names; received: {devices!r}")
    if BACKEND == "tensorflow":
        import tensorflow as tf

        known = [_device_name(one.name) for one in tf.config.list_logical_devices()]
    else:
        known = keras.distribution.list_devices()
    named = [_device_name(name) for name in devices]
    if not named or not set(named) <= set(known) or len({name.split(":")[0] for name in named}) > 1:
        raise ValueError(
            f"data_parallel: `devices` must be some of {known}, all of one kind; received: {list(devices)}"
        )
    return named


def _join_processes(devices) -> None:
    import torch

    if devices is not None:
        raise ValueError(
            "data_parallel: on PyTorch each process has one device, of its own number; give no `devices`, and have "
            f"`torchrun --nproc-per-node` start as many processes; received: {devices}"
        )
    if torch.distributed.is_initialized():
        return
    if "LOCAL_RANK" not in os.environ:
        raise RuntimeError(
            "data_parallel: on PyTorch there is one process a device: start the script with "
            "`torchrun --nproc-per-node 8 train.py`"
        )
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")


def _processes() -> int:
    """How many processes train one model, on PyTorch; 1 elsewhere."""
    if BACKEND != "torch":
        return 1
    import torch

    group = torch.distributed
    return group.get_world_size() if group.is_available() and group.is_initialized() else 1


def _process() -> int:
    import torch

    return torch.distributed.get_rank()


def is_first_process() -> bool:
    """As in `kdiff.distribution.is_first`."""
    if BACKEND == "jax":
        import jax

        return jax.process_index() == 0
    if BACKEND == "tensorflow":
        import tensorflow as tf

        resolver = tf.distribute.get_strategy().cluster_resolver
        if resolver is None or resolver.task_type is None:
            return True
        first = "chief" if "chief" in resolver.cluster_spec().jobs else "worker"
        return resolver.task_type == first and resolver.task_id == 0
    return _processes() == 1 or _process() == 0


def check_strategy(model: keras.Model) -> None:
    """Raises a ValueError for TensorFlow's strategies of several machines."""
    if BACKEND != "tensorflow":
        return
    strategy = model.distribute_strategy
    if (count := strategy.num_replicas_in_sync) > 1 and count > len(strategy.extended.worker_devices):
        raise ValueError(
            f"{type(strategy).__name__} of several machines cannot train or sample kdiff's models: Keras 3.15 takes no "
            "batches that are dictionaries there. MirroredStrategy has the devices of one machine; several machines "
            "train with JAX or PyTorch"
        )


def strategy_of(model: keras.Model) -> contextlib.AbstractContextManager:
    """The scope in which the variables of `model` are to be made: that of its `tf.distribute` strategy, if any."""
    return model.distribute_strategy.scope() if BACKEND == "tensorflow" else contextlib.nullcontext()


def laid_out_as(variable: keras.Variable, weight: keras.Variable) -> None:
    """Has a variable lie on the devices as another of its shape does; elsewhere than on JAX all lie on each."""
    if BACKEND == "jax" and getattr(weight, "_layout", None) is not None:
        variable._layout = weight._layout
        variable.assign(variable.value)


# A part of a batch, inside a step


def _replica():
    """The replica of a `tf.distribute` strategy of several that this code runs on; None elsewhere."""
    if BACKEND != "tensorflow":
        return None
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return context if context is not None and context.num_replicas_in_sync > 1 else None


def first_row(batch: Any) -> Any:
    """The number in the whole batch of the first of the `batch` rows that are here; None if all are."""
    if _processes() > 1:
        return _process() * batch
    if (replica := _replica()) is None:
        return None
    here = replica.replica_id_in_sync_group
    if isinstance(batch, int):
        return here * batch
    sizes = gathered(ops.reshape(batch, (1,)))
    return ops.sum(ops.where(ops.arange(replica.num_replicas_in_sync, dtype="int32") < here, sizes, 0))


def whole_batch(batch: Any) -> Any:
    """How many rows the whole batch has of which `batch` are here."""
    if (replica := _replica()) is None:
        return batch * _processes()
    return (
        batch * replica.num_replicas_in_sync if isinstance(batch, int) else ops.sum(gathered(ops.reshape(batch, (1,))))
    )


def gathered(x: Any) -> Any:
    """The rows of all devices, in their order, of a tensor whose rows here are `x`."""
    if (replica := _replica()) is not None:
        return replica.all_gather(x, axis=0)
    return _from_processes(x) if _processes() > 1 else x


def _from_processes(x):
    import torch

    parts = [torch.empty_like(x) for _ in range(_processes())]
    torch.distributed.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def share_of_loss(value: Any) -> Any:
    """The share of a mean over these rows in that over the whole batch, where the devices' losses are added up."""
    replica = _replica()
    return value if replica is None else value / replica.num_replicas_in_sync


# PyTorch's processes


def parting_sampler(data: Any) -> Any:
    """The `DistributedSampler` by which a PyTorch `DataLoader` gives each process a part of its own; None if none."""
    if BACKEND != "torch":
        return None
    import torch

    samplers = getattr(data, "sampler", None), getattr(getattr(data, "batch_sampler", None), "sampler", None)
    return next((one for one in samplers if isinstance(one, torch.utils.data.DistributedSampler)), None)


def is_parted(data: Any) -> bool:
    """Whether each of several processes is given a part of its own."""
    return _processes() > 1 and parting_sampler(data) is not None


def sharers() -> int:
    """Among how many devices of this process, or processes, a batch must be shared out equally."""
    if BACKEND == "torch":
        return _processes()
    distribution = keras.distribution.distribution() if BACKEND == "jax" else None
    if distribution is None:  # TensorFlow's replicas may have different numbers of rows
        return 1
    import jax

    return 1 if jax.process_count() > 1 else distribution.num_model_replicas


def check_shares(count: int, devices: int, name: str = "a batch") -> None:
    """Raises a ValueError unless so many devices can share so many examples equally."""
    if count % devices:
        raise ValueError(
            f"{devices} devices cannot share {name} of {count} examples equally: choose a batch size that {devices} "
            "divides, and leave out what remains, `dataset.batch(size, drop_remainder=True)`"
        )


def rows_of_process(batch: Any) -> Any:
    """Of a nest of tensors, the rows that this process trains on.

    Raises:
        ValueError: if they cannot be shared out equally.
    """
    if (processes := _processes()) == 1:
        return batch
    count = len(next(leaf for leaf in tree.flatten(batch) if leaf is not None))
    check_shares(count, processes)
    first = _process() * (size := count // processes)
    return tree.map_structure(lambda leaf: None if leaf is None else leaf[first : first + size], batch)


def of_first_process(function: Callable[[], Any]) -> Any:
    """On PyTorch, what `function` returns or raises in the first process, in each; elsewhere `function()`."""
    if _processes() == 1:
        return function()
    import torch

    found = [None, None]
    if _process() == 0:
        try:
            found[0] = function()
        except Exception as error:  # which the others, that wait, raise too
            found[1] = error
    torch.distributed.broadcast_object_list(found, 0)
    if found[1] is not None:
        raise found[1]
    return found[0]


def share_training(model: keras.Model, anew: bool = True) -> None:
    """Has PyTorch's processes train one model: with the values of the first, its random numbers, and mean gradients.

    If not `anew`, only where they do not yet: with this optimizer and these weights.
    """
    if _processes() == 1:
        return
    parameters = [variable.value for variable in model.trainable_variables]
    before = model.__dict__.get("_reduction")
    if not anew and before is not None and before.is_of(model.optimizer, parameters):
        return
    import torch

    for variable in (*model.variables, *model.optimizer.variables):
        torch.distributed.broadcast(variable.value.data, 0)
    states = [random.getstate(), np.random.get_state(), torch.get_rng_state()]  # noqa: NPY002
    torch.distributed.broadcast_object_list(states, 0)
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])
    # By itself it would be a part of the model, and saved.
    model.__dict__["_reduction"] = _MeanGradients(model.optimizer, parameters)


class _MeanGradients:
    """When a backward pass ends, the gradients of these parameters become their means over the processes."""

    def __init__(self, optimizer: Any, parameters: list):
        self.optimizer, self.parameters, self.due = optimizer, parameters, False
        for parameter in parameters:
            if hasattr(parameter, "_mean_gradient"):
                parameter._mean_gradient.remove()
            parameter._mean_gradient = parameter.register_post_accumulate_grad_hook(self.note)

    def is_of(self, optimizer: Any, parameters: list) -> bool:
        """Whether it is of this optimizer and these parameters."""
        return optimizer is self.optimizer and list(map(id, parameters)) == list(map(id, self.parameters))

    def note(self, parameter) -> None:
        import torch

        if not self.due:
            self.due = True
            torch.autograd.Variable._execution_engine.queue_callback(self.reduce)

    def reduce(self) -> None:
        """All of one order: that of the parameters."""
        self.due = False
        bucket, size = [], 0
        for gradient in [parameter.grad for parameter in self.parameters if parameter.grad is not None]:
            if bucket and (size + gradient.numel() > _BUCKET or gradient.dtype != bucket[0].dtype):
                self.mean(bucket)
                bucket, size = [], 0
            bucket.append(gradient)
            size += gradient.numel()
        if bucket:
            self.mean(bucket)

    def mean(self, gradients: list) -> None:
        import torch

        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        torch.distributed.all_reduce(flat)
        flat /= _processes()
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [p.reshape(g.shape) for p, g in zip(parts, gradients, strict=True)])


def mean_of_processes(results: dict[str, Any]) -> dict[str, Any]:
    """The means over PyTorch's processes of metrics by name; nests of them stay."""
    names = [name for name, value in results.items() if ops.is_tensor(value) and not value.shape]
    if _processes() == 1 or not names:
        return results
    import torch

    values = torch.stack([results[name].detach().to(torch.float32) for name in names])
    torch.distributed.all_reduce(values)
    return {**results, **dict(zip(names, values / _processes(), strict=True))}


# Sampling


def device_count(model: keras.Model) -> int:
    """Among how many devices the rows of a batch that is sampled are shared."""
    if BACKEND == "tensorflow":
        check_strategy(model)
        return model.distribute_strategy.num_replicas_in_sync
    return sharers()


def on_devices(x: Any) -> Any:
    """A tensor of rows as JAX shares it among the devices, if they can have equally many; elsewhere the tensor."""
    distribution = keras.distribution.distribution() if BACKEND == "jax" else None
    if distribution is None:
        return x
    import jax

    if jax.process_count() > 1 or len(x) % distribution.num_model_replicas:
        return x
    return keras.distribution.distribute_tensor(x, distribution.get_data_layout(x.shape))


def over_devices(model: keras.Model, function: Callable[[np.ndarray], np.ndarray], rows: np.ndarray) -> np.ndarray:
    """`function(rows)`, a row of the result for each; each device makes some of them.

    Args:
        model: whose devices they are.
        function: makes an array of rows, whatever others there are.
        rows: as many for each device.
    """
    count = device_count(model)
    if count == 1 or BACKEND == "jax":  # where a tensor knows where its rows are
        return function(rows)
    parts = np.split(rows, count)
    if BACKEND == "torch":
        made = ops.convert_to_tensor(function(parts[_process()]))
        return ops.convert_to_numpy(_from_processes(made))
    import tensorflow as tf

    def on(device, part):
        with model.distribute_strategy.scope(), tf.device(device):  # where it finds the weights of that device
            return function(part)

    with ThreadPoolExecutor(count) as threads:
        return np.concatenate(list(threads.map(on, model.distribute_strategy.extended.worker_devices, parts)))
