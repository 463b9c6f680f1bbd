"""What a type checker says of typical use: `mypy tests/typed_usage.py`, of nox's session `lint`. It is not run.

A line with `type: ignore` is a wrong use: were it accepted, the ignoring would be unused, which is an error too.
"""

import keras
import numpy as np

import kdiff
from kdiff import data, guidance, interop, networks, pictures, predictions, schedules, solvers, times, weightings
from kdiff.blocks import LabelEmbedding, TextEncoder

network = networks.UNet.residual(width=16, levels=2, conditions={"label": LabelEmbedding(10, dropout=0.1)})
model = kdiff.DiffusionModel(
    network,
    schedule=schedules.Shifted(schedules.Cosine(), 0.5),
    prediction=predictions.Velocity,
    times="stratified",
    weighting=weightings.MinSNR(5.0),
    sampler=kdiff.Sampler(solvers.Heun(), times.Karras(7.0), steps=20),
    ema=[0.99, 0.999],
)
model.compile(keras.optimizers.Adam(1e-3), metrics=["mae"])
model.build({"image": (None, 16, 16, 1), "label": (None,)})
model.fit(data.images("digits", image_size=16, labels=True), epochs=2, callbacks=[kdiff.SampleCallback("runs")])

samples: np.ndarray = model.sample(4, label=3, guidance=2.0, seed=[0, 1, 2, 3])
model.sample(4, sampler="ddim", guidance=[guidance.ClassifierFree(2.0), "clip"], schedule="rectified", label=None)
for step in model.sample_steps(4, label=[0, 1, 2, 3], steps=20):
    index: int = step.index
noise: np.ndarray = model.invert(samples, sampler=solvers.DDIM, label=3)
x_hat = model.denoise(noise, model.schedule.at(0.5), label=np.zeros(4))
path = pictures.save_png("samples.png", samples, columns=2).with_suffix(".gif")

sampler: kdiff.Sampler = kdiff.Sampler("dpm_solver_pp").replaced(steps=10)
schedule: schedules.NoiseSchedule = schedules.NoiseSchedule.get("cosine")
name: str = repr(schedule.clone())
text = TextEncoder(kdiff.text.Bytes(80), width=64)
loaded = interop.diffusers.load("folder")
mean, variance = schedule.posterior(samples, samples, schedule.at(0.5), schedule.at(0.25))

kdiff.DiffusionModel(network, schedule=3)  # type: ignore[arg-type]
kdiff.DiffusionModel(network, "cosine", predictions.Velocity(), "uniform")  # type: ignore[call-arg]
kdiff.DiffusionModel(network, ema="0.999")  # type: ignore[arg-type]
kdiff.DiffusionModel(network, weights="min_snr")  # type: ignore[call-arg]
kdiff.Sampler(solver=20)  # type: ignore[arg-type]
kdiff.Sampler("ddim", "karras", steps="20")  # type: ignore[arg-type]
model.sample("four")  # type: ignore[arg-type]
model.sample(4, "ddim")  # type: ignore[call-arg]
model.sample(4, steps=2.5)  # type: ignore[arg-type]
model.sample(4, guidance={"scale": 2.0})  # type: ignore[arg-type]
model.sample(4).save("samples.png")  # type: ignore[attr-defined]
solvers.Heun(order="two")  # type: ignore[call-arg]
pictures.save_png("samples.png", samples, columns="two")  # type: ignore[arg-type]
kdiff.DiffusionModels(network)  # type: ignore[operator]
