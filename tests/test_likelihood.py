"""Likelihoods, against entropies and densities that are known, and a derivation of improved DDPM's terms in NumPy."""

import math

import keras
import numpy as np
import pytest
from keras import ops
from scipy import stats

import kdiff
from kdiff import analytic, codecs, likelihood, predictions, schedules, solvers, times
from kdiff.objectives import LossAware, LossAwareBound, VariationalBound
from kdiff.schedules import Marginal
from tests.toys import compiled_model, draw_weights, images, mostly_once, numpy, tiny_network

STD = 0.5
ENTROPY = 0.5 * math.log(2.0 * math.pi * math.e * STD**2)
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(12)
WEIGHTS = WEIGHTS / WEIGHTS.sum()
# All pairs of a node of the data's distribution and one of the noise's, so that expectations are sums.
DATA = (STD * np.repeat(NODES, 12))[:, None].astype("float32")
NOISE = np.tile(NODES, 12)[:, None].astype("float32")
SHARES = np.outer(WEIGHTS, WEIGHTS).ravel()
GAUSSIAN = analytic.Gaussian([0.0], STD**2)
MIXTURE = analytic.GaussianMixture([[-0.8, 0.1], [0.7, -0.4]], [0.05, 0.02], [0.3, 0.7])


def posterior_variance(m):
    """Var[x | x_t] of N(0, STD^2)."""
    return STD**2 * m.sigma**2 / (m.alpha**2 * STD**2 + m.sigma**2)


def expected_bound(schedule, steps, variance, grid="trailing"):
    options = {"decoder": "density", "noise": lambda step, shape: NOISE, "batch_size": len(DATA), "grid": grid}
    report = likelihood.bound(GAUSSIAN, DATA, schedule=schedule, steps=steps, variance=variance, **options)
    return float(SHARES @ report.nats)


class TestBound:
    @pytest.mark.parametrize("steps", mostly_once([10, 40]))
    @pytest.mark.parametrize(
        "schedule",
        mostly_once([schedules.CosineBeta(40), schedules.VarianceExploding(0.01, 50.0), schedules.Rectified()], 2),
        ids=repr,
    )
    def test_exact_reverse_process_gives_the_entropy(self, schedule, steps):
        """Whatever the schedule and the number of steps, all terms together; but for p(x_1) = N(0, sigma_1^2 I)."""
        end = schedule.at(1.0)
        ratio = float(numpy(end.alpha)) ** 2 * STD**2 / float(numpy(end.sigma)) ** 2
        missing = 0.5 * (ratio - math.log1p(ratio))  # KL of the true q(x_1) to it
        assert expected_bound(schedule, steps, posterior_variance) == pytest.approx(ENTROPY + missing, abs=1e-4)

    @pytest.mark.once
    def test_a_run_that_begins_before_the_end_has_its_own_prior(self):
        """N(0, sigma^2 I) at its first time, t = 1/2 of two steps: with the KL to it, the bound is exact again."""
        start = schedules.Cosine().at(np.float32(times.Leading()(schedules.Cosine(), 2)[0]))
        ratio = float(numpy(start.alpha)) ** 2 * STD**2 / float(numpy(start.sigma)) ** 2
        found = expected_bound(schedules.Cosine(), 2, posterior_variance, "leading")
        assert found == pytest.approx(ENTROPY + 0.5 * (ratio - math.log1p(ratio)), abs=1e-4)
        assert ratio > 0.1

    @pytest.mark.parametrize(
        ("make", "steps", "small", "large"),
        [
            (schedules.CosineBeta, 10, 1.30503, 0.79336),
            pytest.param(schedules.CosineBeta, 100, 1.51923, 0.78982, marks=pytest.mark.once),
            pytest.param(schedules.CosineBeta, 1000, 1.25578, 0.85416, marks=pytest.mark.once),
            pytest.param(schedules.LinearBeta, 1000, 1.29572, 0.84046, marks=pytest.mark.once),
            pytest.param(schedules.CosineBeta, 4000, 1.19959, 0.87195, marks=[pytest.mark.once, pytest.mark.thorough]),
        ],
    )
    def test_fixed_variances_cost_what_they_cost(self, make, steps, small, large):
        """Figures of a derivation in float64."""
        for variance, expected in {"small": small, "large": large, posterior_variance: 0.72579}.items():
            assert expected_bound(make(steps), steps, variance) == pytest.approx(expected, abs=2e-5)

    @pytest.mark.once
    @pytest.mark.parametrize("variance", ["small", "large", "learned"])
    def test_terms_are_those_of_improved_ddpm(self, variance):
        """`calc_bpd_loop` of the paper's code, derived again; its normal distribution function is a fit, 1e-3 off."""
        steps = 6
        betas = np.linspace(0.02, 0.5, steps)
        network, prediction = tiny_network((4, 4, 1)), predictions.Noise()
        if variance == "learned":
            network = kdiff.networks.UNet.residual(width=8, levels=1, out_channels=2)
            prediction = predictions.LearnedVariance("noise")
        model = kdiff.DiffusionModel(network, schedules.BetaTable(betas), prediction, ema=None, times="discrete")
        model.build((None, 4, 4, 1))
        draw_weights(model.network)
        images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1)).astype("uint8")
        noise = np.random.default_rng(1).standard_normal((steps, 3, 4, 4, 1)).astype("float32")
        options = {"variance": variance, "clip": True, "noise": lambda step, shape: noise[step], "batch_size": 3}
        report = likelihood.bound(model, images, **options)
        x, bars = images / 127.5 - 1.0, np.cumprod(1.0 - betas)
        before = np.append(1.0, bars[:-1])
        small = betas * (1.0 - before) / (1.0 - bars)
        small[0] = small[1]
        for i in reversed(range(steps)):
            eps = noise[steps - 1 - i]
            x_t = np.sqrt(bars[i]) * x + np.sqrt(1.0 - bars[i]) * eps
            m = model.schedule.at(np.float32((i + 1) / steps))
            output = numpy(model.output(ops.convert_to_tensor(x_t, "float32"), m, {})).astype("float64")
            x_hat = np.clip((x_t - np.sqrt(1.0 - bars[i]) * output[..., :1]) / np.sqrt(bars[i]), -1.0, 1.0)
            gain = np.sqrt(before[i]) * betas[i] / (1.0 - bars[i])
            kept = np.sqrt(1.0 - betas[i]) * (1.0 - before[i]) / (1.0 - bars[i])
            log_variance = np.log({"small": small[i], "large": betas[i] if i else small[i], "learned": 1.0}[variance])
            if variance == "learned":
                share = (output[..., 1:] + 1.0) / 2.0
                log_variance = share * np.log(betas[i]) + (1.0 - share) * np.log(small[i])
            mean, guess = gain * x + kept * x_t, gain * x_hat + kept * x_t
            ratio = np.log(small[i]) - log_variance
            divergence = 0.5 * (-1.0 - ratio + np.exp(ratio) + (mean - guess) ** 2 * np.exp(-log_variance))
            deviation = np.exp(0.5 * log_variance)
            upper = np.where(x > 0.999, 1.0, stats.norm.cdf(x + 1 / 255, guess, deviation))
            lower = np.where(x < -0.999, 0.0, stats.norm.cdf(x - 1 / 255, guess, deviation))
            term = divergence if i else -np.log(upper - lower)
            expected = term.sum(axis=(1, 2, 3)).mean()
            assert report.curve.nats[steps - 1 - i] == pytest.approx(expected, rel=2e-5)
        end = 0.5 * bars[-1] * (x**2).sum(axis=(1, 2, 3)) / (1.0 - bars[-1])
        np.testing.assert_allclose(report.terms["prior"], end, rtol=1e-5)

    @pytest.mark.once
    def test_the_same_in_any_batches(self):
        """The noise is each example's own, and the last batch is filled up and cut."""
        x = MIXTURE.sample(7)
        some, whole = (
            likelihood.bound(MIXTURE, x, schedule="cosine", steps=4, batch_size=size).nats for size in (3, 64)
        )
        np.testing.assert_allclose(some, whole, rtol=1e-5)

    @pytest.mark.once
    def test_what_is_refused(self):
        model = kdiff.DiffusionModel(tiny_network(), "cosine_beta")
        model.build((None, 8, 8, 1))
        with pytest.raises(ValueError, match="levels"):
            likelihood.bound(model, np.full((2, 8, 8, 1), 0.1234, "float32"), steps=2)
        with pytest.raises(ValueError, match="schedule"):
            likelihood.bound(MIXTURE, MIXTURE.sample(2))
        with pytest.raises(ValueError, match="leave out"):
            likelihood.bound(model, np.zeros((2, 8, 8, 1), "uint8"), schedule="cosine")
        with pytest.raises(ValueError, match="no data"):
            likelihood.bound(MIXTURE, MIXTURE.sample(2)[:0], schedule="cosine")
        with pytest.raises(ValueError, match="no variance"):
            likelihood.bound(model, np.zeros((2, 8, 8, 1), "uint8"), steps=2, variance="learned")
        with pytest.raises(ValueError, match="`steps`"):
            likelihood.bound(MIXTURE, MIXTURE.sample(2), schedule="cosine", steps=1)
        with pytest.raises(TypeError, match="denoiser"):
            likelihood.bound(3, np.zeros((2, 2)), schedule="cosine")


class Nodes(times.TimeSampler):
    """Gauss-Legendre nodes in log-SNR, each for all pairs of data and noise."""

    def __init__(self, count: int):
        self.count = count

    def __call__(self, schedule, batch, key):
        clean, noisy = (float(numpy(end)) for end in schedule.log_snr_ends())
        nodes, self.weights = np.polynomial.legendre.leggauss(self.count)
        log_snr = noisy + (clean - noisy) * (nodes + 1.0) / 2.0
        return schedule.time(np.repeat(log_snr, batch // self.count).astype("float32"))

    def density(self, schedule, t):
        clean, noisy = (float(numpy(end)) for end in schedule.log_snr_ends())
        return ops.abs(schedule.slope(t)) / (clean - noisy)


class TestContinuous:
    @pytest.mark.parametrize("low", [-15.0, -13.3])
    def test_exact_denoiser_gives_the_entropy(self, low):
        """Over +-15 of log-SNR 1e-6 are missing; up to 5, 0.0133 (Kingma et al. 2021 learn such ends)."""
        high, nodes = (15.0, Nodes(40)) if low == -15.0 else (5.0, Nodes(40))
        x, noise = np.tile(DATA, (40, 1)), np.tile(NOISE, (40, 1))
        options = {"times": nodes, "draws": 1, "decoder": "density", "noise": lambda draw, shape: noise}
        schedule = schedules.Cosine(low, high)
        report = likelihood.continuous_bound(GAUSSIAN, x, schedule=schedule, batch_size=len(x), **options)
        shares = np.outer(nodes.weights / 2.0, SHARES).ravel()
        parts = {name: float(shares @ term) for name, term in report.terms.items()}
        expected = (6.80685, -6.08106) if low == -15.0 else (1.82015, -1.08106)
        assert (parts["diffusion"], parts["reconstruction"]) == pytest.approx(expected, abs=1e-4)
        assert sum(parts.values()) == pytest.approx(ENTROPY + (0.0133 if high == 5.0 else 0.0), abs=1e-4)

    def test_an_end_before_that_of_the_schedule(self):
        """The terms are those of a schedule that ends there, here at 5."""
        x = STD * np.random.default_rng(0).standard_normal((20_000, 1)).astype("float32")
        options = {"schedule": schedules.Cosine(), "decoder": "density", "batch_size": len(x)}
        report = likelihood.continuous_bound(GAUSSIAN, x, max_log_snr=5.0, **options)
        diffusion = report.terms["diffusion"]
        error = diffusion.std() / math.sqrt(len(x))
        assert error < 0.03
        assert diffusion.mean() == pytest.approx(1.82015, abs=4.0 * error)
        assert report.terms["reconstruction"].mean() == pytest.approx(-1.08106, abs=1e-4)
        assert 4.0 < report.curve.log_snr.max() < 5.0
        assert float(numpy(schedules.Cosine().log_snr(np.float32(report.start)))) == pytest.approx(5.0, abs=1e-3)
        x, options["draws"] = x[:2], 1
        assert likelihood.continuous_bound(GAUSSIAN, x, max_log_snr=20.0, **options).curve.log_snr.max() > 5.0
        assert not likelihood.continuous_bound(GAUSSIAN, x, max_log_snr=-15.0, **options).terms["diffusion"].any()
        with pytest.raises(ValueError, match=r"`max_log_snr` must be a number in \[-15.0, inf\]"):
            likelihood.continuous_bound(GAUSSIAN, x, max_log_snr=-16.0, **options)

    @pytest.mark.once
    @pytest.mark.parametrize("log_snr", [13.3, 9.0, 4.0])
    def test_the_decoder_of_levels_is_a_softmax_over_all(self, log_snr):
        levels = np.arange(256) / 127.5 - 1.0
        x = np.random.default_rng(0).choice(levels, (4, 3, 3, 1))
        x[0, 0, 0], x[0, 0, 1] = -1.0, 1.0
        noise = np.random.default_rng(1).standard_normal(x.shape)
        spread = np.exp(-0.5 * log_snr)
        logits = -0.5 * ((x + spread * noise)[..., None] - levels) ** 2 / spread**2
        own = -0.5 * noise**2
        expected = (np.logaddexp.reduce(logits, axis=-1) - own).sum(axis=(1, 2, 3))
        found = likelihood.Levels().nats_of_signal(*(ops.convert_to_tensor(v, "float32") for v in (x, noise)), log_snr)
        np.testing.assert_allclose(numpy(found), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.once
    def test_times_need_a_density(self):
        class Silent(times.TimeSampler):
            pass

        with pytest.raises(ValueError, match="density"):
            likelihood.continuous_bound(GAUSSIAN, DATA, schedule="cosine", times=Silent())


FLOWS = [schedules.Cosine(), schedules.VarianceExploding(0.002, 3000.0), schedules.Rectified()]


class TestFlow:
    @pytest.mark.parametrize("solver", mostly_once(["rk4", "heun", "dpm2"]))
    @pytest.mark.parametrize("schedule", mostly_once(FLOWS), ids=repr)
    def test_it_is_the_density(self, schedule, solver):
        """To what is left of the data at the noisy end: with sigma_max = 80 the means are missed by 0.008 nats."""
        x = MIXTURE.sample(8)
        report = likelihood.ode(MIXTURE, x, schedule=schedule, solver=solver, steps=50 if solver == "rk4" else 100)
        exact = -numpy(MIXTURE.log_prob(x, Marginal(*(np.float32(v) for v in (0.0, 1.0, 0.0, 40.0)))))
        np.testing.assert_allclose(report.nats, exact, atol=1e-3 if solver == "rk4" else 1e-2)

    @pytest.mark.once
    def test_hutchinson_is_unbiased_within_its_interval(self):
        x = np.repeat(MIXTURE.sample(1), 300, axis=0)
        options = {"schedule": "cosine", "steps": 12, "batch_size": 300}
        exact = likelihood.ode(MIXTURE, x[:1], **options).mean
        report = likelihood.ode(MIXTURE, x, probes=likelihood.Hutchinson(2), **options)
        assert 0 < report.standard_error < 0.1
        assert abs(report.mean - exact) < 4.0 * report.standard_error

    @pytest.mark.once
    def test_the_bound_is_above_it(self):
        x = MIXTURE.sample(400)
        flow = likelihood.ode(MIXTURE, x, schedule="cosine", steps=12, batch_size=400)
        bound = likelihood.bound(MIXTURE, x, schedule="cosine", steps=40, batch_size=400)
        assert bound.interval()[1] > bound.mean > flow.interval()[0]
        assert bound.mean - flow.mean > -2.0 * math.hypot(bound.standard_error, flow.standard_error)

    @pytest.mark.parametrize("solver", mostly_once(["adaptive", "dpm_solver_pp", "deis", "pndm", "dpm_solver_fast"]))
    def test_it_is_the_density_by_solvers_with_a_memory(self, solver):
        """The adaptive one makes its own steps; without its memory each of the others has an error of 0.15."""
        x = MIXTURE.sample(8)
        options = {"solver": solver, "steps": 100}
        if solver == "adaptive":
            options = {"solver": solvers.Adaptive(1e-5, 1e-5), "steps": 1}
        exact = likelihood.ode(MIXTURE, x, schedule="cosine").nats
        found = likelihood.ode(MIXTURE, x, schedule="cosine", **options).nats
        np.testing.assert_allclose(found, exact, atol=1e-3 if solver == "adaptive" else 0.04)

    @pytest.mark.once
    @pytest.mark.parametrize(
        ("solver", "schedule"),
        [*(("rk4", schedule) for schedule in FLOWS), (solvers.Adaptive(1e-5, 1e-5), FLOWS[0])],
        ids=repr,
    )
    def test_encoded_data_is_sampled_again(self, solver, schedule):
        x = MIXTURE.sample(4)
        noise = likelihood.encode(MIXTURE, x, solver=solver, schedule=schedule)
        again = kdiff.Sampler(solver, steps=50)(MIXTURE, schedule, x.shape, x=noise)
        np.testing.assert_allclose(numpy(again), x, atol=2e-4)

    @pytest.mark.once
    def test_steps_are_doubled_to_a_tolerance(self):
        x, exact = MIXTURE.sample(8), {"schedule": "cosine", "steps": 100}
        exact = likelihood.ode(MIXTURE, x, **exact).mean
        options = {"schedule": "cosine", "solver": "heun", "steps": 5}
        assert abs(likelihood.ode(MIXTURE, x, **options).mean - exact) > 0.01
        assert abs(likelihood.ode(MIXTURE, x, tolerance=0.01, **options).mean - exact) < 0.01
        options = {"schedule": "cosine", "grid": "leading"}  # whose beginning moves with the number of steps
        found = likelihood.ode(MIXTURE, x, tolerance=0.01, steps=5, **options).mean
        assert found == pytest.approx(likelihood.ode(MIXTURE, x, steps=100, **options).mean, abs=0.01)
        for schedule, steps in (("cosine", 1), (schedules.CosineBeta(100), 30)):
            with pytest.raises(ValueError, match="more `steps`"):
                likelihood.ode(MIXTURE, x, tolerance=1e-6, schedule=schedule, solver="ddim", steps=steps)

    @pytest.mark.once
    def test_dequantised_images_are_on_the_levels(self):
        model = compiled_model()
        model.build((None, 8, 8, 1))
        with pytest.raises(ValueError, match="256 levels"):
            likelihood.ode(model, np.full((2, 8, 8, 1), 0.1234, "float32"), steps=2)

    @pytest.mark.once
    def test_other_solvers_are_refused(self):
        with pytest.raises(ValueError, match="deterministic"):
            likelihood.ode(MIXTURE, MIXTURE.sample(2), schedule="cosine", solver="ddpm")

    def test_of_a_model_with_conditions(self):
        """The network's Jacobian, and one row of a label an example, also where rows are repeated."""
        model = kdiff.DiffusionModel(kdiff.networks.MLP(8, 1, conditions={"label": kdiff.blocks.LabelEmbedding(3)}),
                                     codec="identity", ema=None)  # fmt: skip
        model.build({"image": (None, 2), "label": (None,)})
        draw_weights(model.network, scale=0.5)
        x, label = MIXTURE.sample(6), np.arange(6) % 3
        report = likelihood.ode(model, {"image": x, "label": label}, steps=12, batch_size=4)
        for i in range(3):
            alone = likelihood.ode(model, (x[i : i + 1], label[i : i + 1]), steps=12, batch_size=1)
            assert alone.nats[0] == pytest.approx(report.nats[i], abs=1e-3)
        same = likelihood.ode(model, {"image": x, "label": 0 * label}, steps=12, batch_size=4)
        assert abs(same.nats[1] - report.nats[1]) > 0.01

    @pytest.mark.once
    def test_dequantised_images(self):
        """Uniform data on the levels, of which a Gaussian knows the variance alone: 8 bits and the difference."""
        images = np.random.default_rng(0).integers(0, 256, (64, 4, 4, 1)).astype("uint8")
        std = 256 / 127.5 / math.sqrt(12.0)
        data = analytic.Gaussian(np.zeros((4, 4, 1)), std**2)
        options = {"schedule": "cosine", "steps": 20, "dequantise": True}
        report = likelihood.ode(data, images / 127.5 - 1.0, **options)
        expected = 8.0 + math.log2(std / (256 / 127.5)) + 0.5 * math.log2(2.0 * math.pi * math.e)
        assert report.bits_per_dim == pytest.approx(expected, abs=4.0 * report.bits_per_dim_error)


class TestWavelets:
    """A transform with W W^T = I changes no likelihood: that of a network that gives 0 is the same in both spaces."""

    codecs = (codecs.Pixels(), codecs.Haar(1))
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1)).astype("uint8")

    def model(self, codec):
        """Its head is zero."""
        network = kdiff.networks.UNet.residual(8, 1, 1)
        return kdiff.DiffusionModel(network, schedules.Cosine(-8.0, 8.0), codec=codec, ema=None)

    def reports(self, measure, **options):
        drawn = np.random.default_rng(1).standard_normal((17, 6, 4, 4, 1)).astype("float32")
        for codec in self.codecs:
            model = self.model(codec)
            model.build((None, 4, 4, 1))

            def noise(step, shape, codec=codec):
                return numpy(codec.encode(ops.convert_to_tensor(drawn[step])))

            yield measure(model, self.images, **options, **({"noise": noise} if measure is not likelihood.ode else {}))

    @pytest.mark.parametrize("measure", mostly_once([likelihood.bound, likelihood.continuous_bound, likelihood.ode], 2))
    def test_the_likelihood_is_that_of_the_pixels(self, measure):
        options = {} if measure is likelihood.continuous_bound else {"steps": 10}
        pixels, wavelets = self.reports(measure, **options)
        assert pixels.terms.keys() == wavelets.terms.keys()
        for name, nats in pixels.terms.items():
            np.testing.assert_allclose(wavelets.terms[name], nats, rtol=1e-4, atol=1e-3)

    def test_as_a_metric(self):
        found = []
        for codec in self.codecs:
            model = self.model(codec)
            model.compile(metrics=[likelihood.BitsPerDim()])
            found.append(
                model.evaluate(np.tile(self.images, (20, 1, 1, 1)), verbose=0, return_dict=True)["bits_per_dim"]
            )
        assert found[1] == pytest.approx(found[0], abs=4.0 * model.metrics[-1].standard_error())

    @pytest.mark.once
    def test_variances_that_differ_do_not_rotate(self):
        model = self.model(codecs.Haar(1))
        model.build((None, 4, 4, 1))
        with pytest.raises(ValueError, match=r"levels of images that Haar\(\) transforms need a variance"):
            likelihood.bound(model, self.images, steps=2, variance=lambda m: 0.1 * ops.ones((1, 2, 2, 4)))

    @pytest.mark.once
    def test_a_codec_of_ones_own_makes_no_images(self):
        """Latents and other data have a density, whatever the range of the examples."""

        class Thrice(codecs.Pixels):
            images = None

            def encode(self, examples, key=None):
                return 3.0 * super().encode(examples)

        model = compiled_model(codec=Thrice())
        model.build((None, 8, 8, 1))
        assert likelihood.ode(model, images(2), steps=2).terms.keys() == {"noise", "volume"}
        assert np.isfinite(likelihood.bound(model, images(2), steps=2).mean)
        assert np.isfinite(likelihood.continuous_bound(model, images(2)).mean)


class TestBitsPerDim:
    def images(self, count=24):
        return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1)).astype("uint8")

    def test_in_fit_and_evaluate(self, tmp_path):
        images = self.images()
        model = compiled_model(metrics=["mae", likelihood.BitsPerDim()], schedule=schedules.Cosine(-10.0, 10.0))
        history = model.fit(images, batch_size=8, validation_data=images[:16], verbose=0).history
        assert {"mae", "bits_per_dim", "val_mae", "val_bits_per_dim"} < set(history)
        assert history["bits_per_dim"] != history["val_bits_per_dim"]
        found = model.evaluate(images, return_dict=True, verbose=0, batch_size=8)["bits_per_dim"]
        bound = likelihood.continuous_bound(model, images, draws=8, times=model.times)
        error = math.hypot(bound.bits_per_dim_error, model.metrics[-1].standard_error())
        assert found == pytest.approx(bound.bits_per_dim, abs=4.0 * error)
        assert error < 0.5 * found
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        assert loaded.evaluate(images, return_dict=True, verbose=0, batch_size=8)["bits_per_dim"] == pytest.approx(
            found
        )

    def test_an_end_before_that_of_the_schedule(self):
        model = compiled_model(metrics=[likelihood.BitsPerDim(max_log_snr=5.0)], schedule=schedules.Cosine(-8.0, 12.0))
        images = np.tile(self.images(), (40, 1, 1, 1))
        found = model.evaluate(images, return_dict=True, verbose=0, batch_size=64)["bits_per_dim"]
        bound = likelihood.continuous_bound(model, images, draws=2, max_log_snr=5.0)
        error = math.hypot(bound.bits_per_dim_error, model.metrics[-1].standard_error())
        assert error < 0.05 * found
        assert found == pytest.approx(bound.bits_per_dim, abs=4.0 * error)

    def test_times_that_learn(self):
        """What is drawn by probabilities that differ is divided by them: the mean is that of any times."""
        options = {"schedule": schedules.Cosine(-4.0, 4.0), "ema": None}
        aware = compiled_model(metrics=[likelihood.BitsPerDim()], objective=LossAware(4, history=1), **options)
        aware.build((None, 8, 8, 1))
        aware.objective.past_losses.assign([[1.0], [2.0], [4.0], [8.0]])
        aware.objective.counts.assign([1, 1, 1, 1])
        images = np.tile(self.images(32), (16, 1, 1, 1))
        found = aware.evaluate(images, return_dict=True, verbose=0)["bits_per_dim"]
        error = aware.metrics[-1].standard_error()
        bound = likelihood.continuous_bound(aware, images[:32], draws=16)
        assert found == pytest.approx(bound.bits_per_dim, abs=4.0 * math.hypot(error, bound.bits_per_dim_error))
        assert error < 0.05 * found

    @pytest.mark.once
    def test_running_mean_and_spread(self):
        metric = likelihood.BitsPerDim()
        values = np.random.default_rng(0).standard_normal((3, 5)).astype("float32") + 100.0
        for part in values:
            metric.add(ops.convert_to_tensor(part))
        assert float(numpy(metric.result())) == pytest.approx(values.mean(), rel=1e-6)
        assert metric.standard_error() == pytest.approx(values.std(ddof=1) / math.sqrt(15), rel=1e-4)
        for scale in (0.005, 100.0):
            again = likelihood.BitsPerDim()
            for part in values:
                again.add(ops.convert_to_tensor(part), np.full(5, scale))
            assert again.standard_error() == pytest.approx(metric.standard_error(), rel=1e-3)
        small = likelihood.BitsPerDim()  # each of the numbers but the first changes the mean by less than float32 sees
        small.add(ops.ones((1,)), np.array([1e6]))
        for _ in range(400):
            small.add(2.0 * ops.ones((1,)), np.array([0.0625]))
        assert float(numpy(small.result())) == pytest.approx(1.0 + 25.0 / 1000025.0, abs=2e-7)
        weighted = likelihood.BitsPerDim()
        weighted.add(ops.convert_to_tensor(values[0]), np.array([1.0, 0.0, 0.0, 0.0, 3.0]))
        assert float(numpy(weighted.result())) == pytest.approx((values[0, 0] + 3 * values[0, 4]) / 4, rel=1e-6)

    @pytest.mark.once
    def test_it_needs_a_density(self):
        class Fixed(times.TimeSampler):
            def __call__(self, schedule, batch, key):
                return 0.5 * ops.ones(batch)

        with pytest.raises(ValueError, match="density"):
            compiled_model(metrics=[likelihood.BitsPerDim()], times=Fixed())


class TestReport:
    report = likelihood.Report({"a": np.array([1.0, 3.0]), "b": np.array([0.0, 2.0])}, 2)

    @pytest.mark.once
    def test_figures(self):
        assert self.report.mean == 3.0
        assert self.report.bits_per_dim == pytest.approx(1.5 / math.log(2.0))
        assert self.report.standard_error == pytest.approx(math.sqrt(8.0 / 2.0))
        low, high = self.report.interval(0.95)
        assert (high - 3.0, 3.0 - low) == pytest.approx((1.959964 * 2.0,) * 2, rel=1e-6)
        assert "(n = 2): a 1.443, b 0.7213" in str(self.report)

    @pytest.mark.once
    def test_plot(self, tmp_path):
        pytest.importorskip("matplotlib")
        likelihood.bound(MIXTURE, MIXTURE.sample(8), schedule="cosine", steps=5).plot(tmp_path / "terms.png")
        assert (tmp_path / "terms.png").stat().st_size > 5000
        with pytest.raises(ValueError, match="no curve"):
            self.report.plot()


class TestObjective:
    @pytest.mark.parametrize("objective", [VariationalBound, LossAwareBound])
    def test_the_pure_bound_trains_the_mean(self, objective):
        """Its loss is T times a term, and its gradient reaches the mean, which the hybrid's bound does not.

        The same with times that are drawn where the terms are large, which they are by their size.
        """
        network = kdiff.networks.MLP(8, 1, out_channels=4)
        options = {"prediction": predictions.LearnedVariance("noise"), "codec": "identity", "ema": None}
        objective = objective(10, history=40) if objective is LossAwareBound else objective()
        options |= {"objective": objective, "times": "discrete"}
        model = kdiff.DiffusionModel(network, schedules.CosineBeta(10), **options)
        model.compile(keras.optimizers.SGD(1e-6))
        x = (np.random.default_rng(0).integers(0, 256, (256, 2)) / 127.5 - 1.0).astype("float32")
        model.build((None, 2))
        draw_weights(model.network)
        terms = likelihood.bound(model, x, decoder="levels").terms
        expected = np.mean(terms["diffusion"] + terms["reconstruction"]) / 2.0
        # Of 10,240 draws, which vary by four times their mean.
        many = np.tile(x, (40, 1))
        assert model.evaluate(many, batch_size=10240, verbose=0) == pytest.approx(expected, rel=0.15)
        before = numpy(network.head.kernel)
        model.fit(x, batch_size=256, verbose=0)
        assert np.abs(numpy(network.head.kernel) - before)[:, :2].min() > 0  # the columns of the mean
        if isinstance(objective, LossAwareBound):
            model.fit(many, batch_size=10240, verbose=0)
            assert numpy(objective.probabilities()).max() > 2 / 10
            assert model.evaluate(many, batch_size=10240, verbose=0) == pytest.approx(expected, rel=0.05)

    @pytest.mark.once
    def test_it_needs_a_learned_variance(self):
        with pytest.raises(ValueError, match="LearnedVariance"):
            kdiff.DiffusionModel(tiny_network(), objective=VariationalBound())


@pytest.mark.once
@pytest.mark.parametrize("measure", [likelihood.bound, likelihood.continuous_bound, likelihood.ode])
def test_data_that_the_model_does_not_take(measure):
    model = compiled_model()
    with pytest.raises(ValueError, match="no weights yet"):
        measure(model, images(2))
    model.build((None, 8, 8, 1))
    for x in (images(2)[0], list(images(2)), images(2).transpose(0, 3, 1, 2), images(2, (6, 6, 1))):
        with pytest.raises(ValueError, match=r"must be as those that the model learns.*received the shape"):
            measure(model, x)
