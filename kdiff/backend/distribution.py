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
    "data_parallel",
    "device_count",
    "first_row",
    "gathered",
    "is_first_process",
    "is_parted",
    "laid_out_as",
    "mean_of_processes",
    "on_devices",
    "over_devices",
    "rows_of_process",
    "share_of_loss",
    "share_training",
    "strategy_of",
    "whole_batch",
]

_BUCKET = 2**23  # numbers that PyTorch's processes add up at once


def data_parallel(devices: Sequence[str] | None = None) -> None:
    """As in `kdiff.distribution.data_parallel`."""
    if BACKEND == "jax":
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        devices = devices or [one.name for kind in ("GPU", "CPU") for one in tf.config.list_logical_devices(kind)]
        kind = "GPU" if any("GPU" in name for name in devices) else "CPU"
        strategy = tf.distribute.MirroredStrategy([name for name in devices if kind in name.upper()])
        tf.distribute.experimental_set_strategy(strategy)
    else:
        _join_processes(devices)


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
        return resolver is None or resolver.task_type in (None, "chief") or resolver.task_id == 0
    return _processes() == 1 or _process() == 0


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
    return ops.sum(ops.where(ops.arange(len(sizes), dtype="int32") < here, sizes, 0))


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


def is_parted(data: Any) -> bool:
    """Whether a PyTorch `DataLoader` gives each process a part of its own, by a `DistributedSampler`."""
    if _processes() == 1:
        return False
    import torch

    return isinstance(getattr(data, "sampler", None), torch.utils.data.DistributedSampler)


def rows_of_process(batch: Any) -> Any:
    """Of a nest of tensors, the rows that this process trains on.

    Raises:
        ValueError: if they cannot be shared out equally.
    """
    if (processes := _processes()) == 1:
        return batch
    count = len(next(leaf for leaf in tree.flatten(batch) if leaf is not None))
    if count % processes:
        raise ValueError(
            f"{processes} processes cannot share a batch of {count} examples equally: choose a batch size that "
            f"{processes} divides, and drop what is left over, `dataset.batch(size, drop_remainder=True)`"
        )
    first = _process() * (size := count // processes)
    return tree.map_structure(lambda leaf: None if leaf is None else leaf[first : first + size], batch)


def share_training(model: keras.Model) -> None:
    """Has PyTorch's processes train one model: with the values of the first, its random numbers, and mean gradients."""
    if _processes() == 1:
        return
    import torch

    for variable in (*model.variables, *model.optimizer.variables):
        torch.distributed.broadcast(variable.value.data, 0)
    states = [random.getstate(), np.random.get_state(), torch.get_rng_state()]  # noqa: NPY002
    torch.distributed.broadcast_object_list(states, 0)
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])
    reduction = _MeanGradients([variable.value for variable in model.trainable_variables])
    model.__dict__["_reduction"] = reduction  # by itself it would be a part of the model, and saved


class _MeanGradients:
    """When a backward pass ends, the gradients of these parameters become their means over the processes."""

    def __init__(self, parameters: list):
        self.parameters, self.due = parameters, False
        for parameter in parameters:
            if hasattr(parameter, "_mean_gradient"):
                parameter._mean_gradient.remove()
            parameter._mean_gradient = parameter.register_post_accumulate_grad_hook(self.note)

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
        return model.distribute_strategy.num_replicas_in_sync
    if BACKEND == "torch":
        return _processes()
    import jax

    distribution = keras.distribution.distribution()
    return 1 if distribution is None or jax.process_count() > 1 else distribution.num_model_replicas


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
