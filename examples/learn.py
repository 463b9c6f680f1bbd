# %% [markdown]
# # A diffusion model, from the data to the samples
#
# This page trains a diffusion model on real handwritten digits, and looks at each part of it on the way: the data, the
# noise, the loss written by hand, the training, the samples, and what the network has learned. It takes about five
# minutes on two cores, as a script or as a notebook:
#
#     KERAS_BACKEND=jax python examples/learn.py         # or tensorflow, or torch
#     jupyter lab examples/learn.ipynb

# %%
import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")  # before Keras is imported

import keras
import numpy as np
from keras import ops
from matplotlib.figure import Figure
from PIL import Image

import kdiff
from kdiff import data, pictures

OUT = Path("runs/learn")
OUT.mkdir(parents=True, exist_ok=True)
EPOCHS = 16


def show(name, images=None, columns=None):
    """Saves a grid of images, unless it is saved already, and returns it, which a notebook displays."""
    if images is not None:
        pictures.save_png(OUT / name, images, columns=columns)
    return Image.open(OUT / name)


# %% [markdown]
# ## 1. The data
#
# 1,500 digits, with labels, as a `tf.data` pipeline of whole batches of 64, so of 1,472 in each epoch: float32 in
# [-1, 1], with shape (batch, 16, 16, 1). A diffusion model learns to draw more of them.

# %%
dataset = data.images("digits", image_size=16, labels=True)
digits = np.concatenate([batch["image"] for batch in dataset.as_numpy_iterator()])
print(digits.shape, digits.dtype, digits.min(), digits.max())
show("data.png", digits[:40], columns=20)

# %% [markdown]
# ## 2. The forward process
#
# Noise is mixed into the data: x_t = alpha(t) x + sigma(t) noise. At t = 0 it is data, at t = 1 it is noise. The
# schedule says how much of each there is; here alpha = cos(pi t / 2) and sigma = sin(pi t / 2), nearly.

# %%
schedule = kdiff.schedules.Cosine()
noise = kdiff.random.normal(kdiff.random.key_of(0), digits[:3].shape)
times = np.linspace(0.0, 1.0, 11)
forward = [schedule(digits[i : i + 1], noise[i : i + 1], float(t)) for i in range(3) for t in times]
for t in (0.1, 0.5, 0.9):
    m = schedule.at(t)
    print(f"t = {t}: alpha {float(m.alpha):.2f}, sigma {float(m.sigma):.2f}, log-SNR {float(m.log_snr):5.1f}")
show("forward.png", ops.concatenate(forward), columns=len(times))

# %% [markdown]
# ## 3. What the network learns
#
# Shown x_t and t, the network is to say what was mixed. It may be asked for the data, for the noise, or for another
# mixture of the two; we ask for the *velocity*, alpha noise - sigma x, which is well behaved at both ends. All of
# training is in these eight lines:


# %%
def loss_by_hand(network, x, key):
    t = kdiff.random.uniform(kdiff.random.fold_in(key, 0), (len(x),))  # a time for each picture
    noise = kdiff.random.normal(kdiff.random.fold_in(key, 1), x.shape)
    m = schedule.at(t).like(x)
    x_t = m.alpha * x + m.sigma * noise
    target = m.alpha * noise - m.sigma * x
    output = network({"image": x_t, "time": 1000.0 * t})
    return ops.mean((output - target) ** 2)


# %% [markdown]
# The network is a small U-Net: down to 4 x 4 pixels and up again, with skip connections, and told the time. A
# `DiffusionModel` puts schedule, prediction and network together. It is a `keras.Model`; its `fit` computes the loss
# above, and keeps an exponential moving average of the weights, with which it samples.

# %%
conditions = {"label": kdiff.blocks.LabelEmbedding(10)}
network = kdiff.networks.UNet.residual(width=16, levels=3, depth=1, multipliers=(1, 2, 2), conditions=conditions)
model = kdiff.DiffusionModel(network, schedule=schedule, prediction="velocity", ema=0.99)
steps = EPOCHS * int(dataset.cardinality())
model.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(3e-3, steps), clipnorm=1.0))
kdiff.networks.summary(network, (16, 16, 1))

# %% [markdown]
# Before training the network answers 0, and the loss is the mean square of the target, by hand and in the model:

# %%
label = np.zeros(256, "int32")
by_model = model.evaluate({"image": digits[:256], "label": label}, verbose=0)
by_hand = loss_by_hand(lambda inputs: network({**inputs, "label": label}), digits[:256], kdiff.random.key_of(1))
print(f"loss by hand {float(by_hand):.3f}, of the model {by_model:.3f} (other times, other noise)")

# %% [markdown]
# ## 4. Training

# %%
losses = keras.callbacks.LambdaCallback(
    on_epoch_end=lambda epoch, logs: print(f"epoch {epoch + 1:2}: loss {logs['loss']:.4f}")
)
history = model.fit(dataset, epochs=EPOCHS, verbose=0, callbacks=[losses])
pictures.loss_plot(OUT / "loss.png", history)
show("loss.png")

# %% [markdown]
# ## 5. Sampling
#
# Start from noise. At each step the network's output gives an estimate of the clean picture, x_hat, and the solver
# moves a little way towards it. First row: x_t; second row: x_hat. It sees a digit in the noise long before we do.

# %%
sampler = kdiff.Sampler("dpm_solver_pp", "uniform_log_snr", steps=15)
run = list(model.sample_steps(1, sampler=sampler, seed=1, label=0))
show("steps.png", np.concatenate([s.x for s in run] + [s.x_hat for s in run]), columns=len(run))

labels = np.tile(np.arange(10), 4)
samples = model.sample(len(labels), sampler=sampler, seed=1, label=labels)
show("samples.png", samples, columns=10)

# %% [markdown]
# ## 6. What was learned
#
# *How well, at which noise level?* The error of x_hat on test digits, between that of the best constant guess, at t =
# 1, and nothing, at t = 0: with little noise the picture is nearly given; with much, the network can do no better than
# the mean digit of the class.

# %%
test = data.images("digits", image_size=16, labels=True, split="test", batch_size=64)
batch = next(test.as_numpy_iterator())
x, label = batch["image"], batch["label"]
levels = np.linspace(0.02, 0.98, 13)
errors = []
for i, t in enumerate(levels):
    noise = kdiff.random.normal(kdiff.random.key_of(10 + i), x.shape)
    x_hat = model.denoise(schedule(x, noise, float(t)), schedule.at(np.full(len(x), t)), label=label)
    errors.append(float(ops.mean((x_hat - x) ** 2)))
figure = Figure(figsize=(6, 3), layout="constrained")
axes = figure.subplots()
axes.plot(levels, errors, "o-", label="the network")
axes.axhline(np.mean((x - digits.mean(0)) ** 2), color="gray", linestyle=":", label="the mean of all digits")
axes.set(xlabel="t  (0 = data, 1 = noise)", ylabel="mean squared error of x_hat")
axes.legend()
figure.savefig(OUT / "errors.png", dpi=110)
show("errors.png")

# %% [markdown]
# *Are the samples copies?* The distance from each sample to the nearest training digit, beside that of test digits,
# which are certainly none. If samples were copies, theirs would be much smaller.


# %%
def nearest(images):
    difference = np.asarray(images)[:, None] - digits[None]
    return np.sqrt((difference**2).mean((2, 3, 4))).min(1)


print(f"median distance to the nearest training digit: samples {np.median(nearest(samples)):.3f}, "
      f"test digits {np.median(nearest(x)):.3f}")  # fmt: skip

# %% [markdown]
# *How many steps are needed?* The same noise, by a solver of second order, in 3 to 50 steps, one row each:

# %%
rows = [model.sample(10, steps=steps, sampler=sampler, seed=1, label=np.arange(10)) for steps in (3, 5, 10, 20, 50)]
show("few-steps.png", np.concatenate(rows), columns=10)

# %% [markdown]
# ## 7. If you come from a tutorial
#
# Many tutorials have a `GaussianDiffusion` with tables indexed by a step i = 0 ... T - 1, and a `SimpleUNet`. Both are
# here under other names, with the same numbers: step i is the time t = (i + 1) / T.
#
# | tutorial | kdiff |
# |---|---|
# | `GaussianDiffusion(1000, schedule="linear")` | `schedules.LinearBeta(1000)` |
# | `GaussianDiffusion(1000, schedule="cosine")` | `schedules.CosineBeta(1000)` |
# | `sqrt_alpha_cumprod[i]`, `sqrt_one_minus_alpha_cumprod[i]` | `m = schedule.at(t)`: `m.alpha`, `m.sigma` |
# | `q_sample(x, i, noise)` | `schedule(x, noise, t)` |
# | `posterior_mean_coef1`, `posterior_mean_coef2`, `posterior_variance` | `schedule.posterior(x, x_t, now, then)` |
# | `p_sample` in a loop | `Sampler("ddpm", "all")` |
# | `DDIMSampler(ddim_steps=50, eta=0)` | `Sampler("ddim", "linspace", 50)`, with steps rounded, not truncated |
# | `training_loss`, an optimizer and a loop | `model.compile`, `model.fit` |
# | `SimpleUNet` | `networks.SimpleUNet`; `interop.original.simple_unet(state_dict)` takes its weights |

# %%
T = 1000
betas = np.linspace(1e-4, 0.02, T)
alpha_cumprod = np.cumprod(1 - betas)  # the tutorial's table

linear = kdiff.schedules.LinearBeta(T)
i = 300
now, then = linear.at((i + 1) / T), linear.at(i / T)
mean, variance = linear.posterior(np.zeros((1, 1)), np.ones((1, 1)), now, then)
coefficient = (1 - alpha_cumprod[i - 1]) * np.sqrt(1 - betas[i]) / (1 - alpha_cumprod[i])
print("alpha    ", np.sqrt(alpha_cumprod[i]), float(now.alpha))
print("mean     ", coefficient, float(mean[0, 0]))
print("variance ", betas[i] * (1 - alpha_cumprod[i - 1]) / (1 - alpha_cumprod[i]), float(variance))
np.testing.assert_allclose(float(now.alpha), np.sqrt(alpha_cumprod[i]), rtol=1e-5)
np.testing.assert_allclose(float(mean[0, 0]), coefficient, rtol=1e-4)

# %% [markdown]
# ## 8. What next
#
# The mathematics, two equations and what follows from them: [two_equations.md](two_equations.md). Conditions, guidance
# and editing: [guidance.md](guidance.md). Your own schedule, solver or block: [extend.md](extend.md).
