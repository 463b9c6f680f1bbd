"""Training an autoencoder of diffusers in a plain PyTorch loop gives the losses that `AutoencoderTrainer.fit` gives."""

import keras
import numpy as np
import pytest
from keras import ops

from kdiff import random
from kdiff.autoencoding import AutoencoderTrainer
from kdiff.interop import autoencoders

pytestmark = [pytest.mark.reference, pytest.mark.once]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

STEPS, RATE, KL = 50, 1e-3, 1e-3


def test_fifty_steps(tmp_path):
    """Of L1 + KL, from the same weights and with the same noise."""
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2)
    model.save_pretrained(tmp_path)
    x = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 3)).astype("float32")
    trainer = AutoencoderTrainer(autoencoders.load(tmp_path).autoencoder, kl=KL)
    trainer.compile(keras.optimizers.Adam(RATE))
    ours = trainer.fit(x, batch_size=4, epochs=STEPS, shuffle=False, verbose=0).history["loss"]

    images, theirs = torch.tensor(np.moveaxis(x, -1, 1).copy()), []
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, eps=1e-7)
    model.train()
    for step in range(STEPS):
        posterior = model.encode(images).latent_dist
        key = random.fold_in(random.key_of(0), step, random.TRAINING)
        noise = ops.convert_to_numpy(random.normal(key, (4, 8, 8, 2)))
        latents = posterior.mean + posterior.std * torch.tensor(np.moveaxis(noise, -1, 1).copy())
        decoded = model.decode(latents).sample
        loss = (images - decoded).abs().mean() + KL * posterior.kl().mean() / x[0].size
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        theirs.append(float(loss.detach()))
    assert theirs[-1] < 0.9 * theirs[0]
    np.testing.assert_allclose(ours, theirs, atol=1e-3)  # Adam divides by roots of small numbers
    print("DIFFERENCE", np.abs(np.array(ours) - theirs).max())
