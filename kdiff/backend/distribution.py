"""One model on several devices: by `keras.distribution` on JAX, `tf.distribute` on TensorFlow, processes on PyTorch.

JAX sees a batch as a whole wherever its rows are. On the other two each device computes some rows of a batch: a replica
of a `tf.distribute` strategy, or a process (`processes.py`).
"""

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np
from keras import ops

from kdiff.backend.processes import join_processes, process, processes, rows_of_processes
from kdiff.backend.running import BACKEND

__all__ = [
    "check_layout",
    "check_strategy",
    "data_parallel",
    "device_count",
    "first_row",
    "gathered",
    "is_first_process",
    "laid_out_as",
    "on_devices",
    "over_devices",
    "prepare_for_replicas",
    "share_of_loss",
    "sharers",
    "strategy_of",
    "whole_batch",
]


def data_parallel(devices: Sequence[str] | None = None) -> None:
    """As in `kdiff.distribution.data_parallel`."""
    if BACKEND == "torch":
        join_processes(devices)
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
    return process() == 0


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


def check_layout(path: str, axes: int) -> None:
    """Raises a ValueError unless the layout of `keras.distribution.ModelParallel` is for a kernel of so many axes."""
    distribution = keras.distribution.distribution() if BACKEND == "jax" else None
    layout = None if distribution is None else distribution.get_tensor_layout(path)
    if layout is not None and len(layout.axes) != axes:
        raise ValueError(
            f"{path}: the layout map gives {tuple(layout.axes)}, for {len(layout.axes)} axes; this kernel has {axes}. "
            "`networks.layout_map(mesh, axes=1)` is for series, `axes=2` for images, `axes=3` for volumes; a layout "
            "for this kernel alone has its whole path as the key"
        )


def laid_out_as(variable: keras.Variable, weight: keras.Variable) -> None:
    """Has a variable lie on the devices as another of its shape does; elsewhere than on JAX all lie on each."""
    if BACKEND == "jax" and getattr(weight, "_layout", None) is not None:
        variable._layout = weight._layout
        variable.assign(variable.value)


def prepare_for_replicas(model: keras.Model) -> None:
    """Has loss scaling leave out a step in which the gradients of any replica overflow.

    Keras leaves it out if those of the first do, as if all had the same, and adds up what overflows in the others.

    Raises:
        ValueError: if the optimizer accumulates gradients and there are several replicas.
    """
    if BACKEND != "tensorflow" or model.distribute_strategy.num_replicas_in_sync == 1:
        return
    import tensorflow as tf

    optimizer = model.optimizer
    if steps := getattr(getattr(optimizer, "inner_optimizer", optimizer), "gradient_accumulation_steps", None):
        raise ValueError(
            "fit: Keras 3.15 cannot accumulate gradients under TensorFlow's strategies of several devices; received "
            f"`gradient_accumulation_steps={steps}`. One device, JAX and PyTorch can; or choose larger batches"
        )
    if not hasattr(optimizer, "check_finite") or "check_finite" in vars(optimizer):
        return
    finite_here = optimizer.check_finite

    def check_finite(gradients):
        finite = tf.cast(finite_here(gradients), tf.float32)
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.MEAN, finite) == 1.0

    object.__setattr__(optimizer, "check_finite", check_finite)  # past Keras, which would track and save it


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
    if processes() > 1:
        return process() * batch
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
        return batch * processes()
    return (
        batch * replica.num_replicas_in_sync if isinstance(batch, int) else ops.sum(gathered(ops.reshape(batch, (1,))))
    )


def gathered(x: Any) -> Any:
    """The rows of all devices, in their order, of a tensor whose rows here are `x`."""
    if (replica := _replica()) is not None:
        return replica.all_gather(x, axis=0)
    return rows_of_processes(x)


def share_of_loss(value: Any) -> Any:
    """The share of a mean over these rows in that over the whole batch, where the devices' losses are added up."""
    replica = _replica()
    return value if replica is None else value / replica.num_replicas_in_sync


def sharers() -> int:
    """Among how many devices of this process, or processes, a batch must be shared out equally."""
    if BACKEND == "torch":
        return processes()
    distribution = keras.distribution.distribution() if BACKEND == "jax" else None
    if distribution is None:  # TensorFlow's replicas may have different numbers of rows
        return 1
    import jax

    return 1 if jax.process_count() > 1 else distribution.num_model_replicas


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
        made = ops.convert_to_tensor(function(parts[process()]))
        return ops.convert_to_numpy(rows_of_processes(made))
    import tensorflow as tf

    def on(device, part):
        with model.distribute_strategy.scope(), tf.device(device):  # where it finds the weights of that device
            return function(part)

    with ThreadPoolExecutor(count) as threads:
        return np.concatenate(list(threads.map(on, model.distribute_strategy.extended.worker_devices, parts)))
