"""Everything composes with everything: combinations in which each object takes part, and the published recipes whole.

Each object that has a name takes part, with its defaults, so a new one is tested as soon as it is defined.
"""

import inspect
import random as python_random
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

import kdiff
from kdiff import Sampler, objectives, predictions, random, schedules, solvers, times, weightings
from tests.toys import MIXTURE, numpy

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from recipes import RECIPES, network

OP_BY_OP = keras.backend.backend() != "jax"  # which would compile each operation: the whole step is fewer programs

# What has no defaults, or long ones.
ARGUMENTS = {
    "Jumps": ("trailing", 4, 2),
    "BetaTable": (np.linspace(1e-3, 0.2, 40),),
    "AlphaBarTable": (np.linspace(0.99, 0.01, 30),),
    "Shifted": (schedules.Cosine(), 1.0),
    "ZeroTerminalSNR": (schedules.LinearBeta(),),
    "Times": ([1.0, 0.7, 0.5, 0.2, 0.0],),
    "Sigmas": ([3.0, 2.0, 1.0, 0.5, 0.0],),
}


def all_of(base, but=()):
    """One of each public class below `base` that is kdiff's own, but for those below some."""
    kinds = [kind for kind in base.names().values() if kind.__module__.startswith("kdiff.")]
    kinds = [kind for kind in kinds if not issubclass(kind, but)]
    return [kind(*ARGUMENTS.get(kind.__name__, ())) for kind in kinds]


SCHEDULES = all_of(schedules.NoiseSchedule)
PREDICTIONS = all_of(predictions.Prediction)
WEIGHTINGS = [None, *all_of(weightings.Weighting)]
TIMES = all_of(times.TimeSampler)
# VariationalBound goes with LearnedVariance alone, LearnedSchedule with Learned, others with a teacher or an interval;
# they have tests of their own.
PARTICULAR = (objectives.VariationalBound, objectives.LearnedSchedule, objectives.Taught, objectives.Shortcut)
OBJECTIVES = all_of(objectives.Objective, but=PARTICULAR)
GRIDS = [grid for grid in all_of(times.TimeGrid) if not isinstance(grid, times.All)]
SOLVERS = [solver for solver in all_of(solvers.Solver) if not isinstance(solver, solvers.DDIMInversion)]


def combined(names, *families):
    """As many combinations as the largest family has objects: each object is in one at least, at random with which."""
    generator, count = python_random.Random(names), max(map(len, families))
    columns = [[one for _ in range(count) for one in generator.sample(family, len(family))] for family in families]
    return pytest.mark.parametrize(names, list(zip(*(column[:count] for column in columns), strict=True)), ids=repr)


def fitting(sampler, schedule):
    """A sampler of discrete times, or an objective that learns them, with as many as the schedule has."""
    if isinstance(sampler, times.Discrete) and schedule.num_steps is None:
        return times.Discrete(100)
    if isinstance(sampler, objectives.LossAware):
        return objectives.LossAware(schedule.num_steps or 100)
    return sampler


@combined("schedule, prediction, weighting, sampler", SCHEDULES, PREDICTIONS, WEIGHTINGS, TIMES)
def test_training_problems_are_sound(schedule, prediction, weighting, sampler):
    """Times lie in [0, 1], the target is finite, its weight is not negative, and a perfect network has x_hat = x."""
    sampler = fitting(sampler, schedule)
    x, noise = (random.normal(random.key_of(seed), (16, 2)) for seed in (1, 2))
    t = sampler(schedule, 16, random.key_of(3))
    assert numpy(t).shape == (16,)
    assert np.all((numpy(t) >= 0) & (numpy(t) <= 1))
    m = schedule.at(t)
    target = prediction.target(x, noise, m)
    assert np.all(np.isfinite(numpy(target)))
    weight = objectives.loss_weight(schedule, prediction, weighting, sampler, m)
    assert weight is None or np.all(np.isfinite(numpy(weight)) & (numpy(weight) >= 0))
    output = ops.concatenate([target] * prediction.factor, axis=-1)
    x_hat = numpy(prediction.denoise(output, schedule(x, noise, t), m))
    # The rounding error of the target comes back multiplied by the gain.
    size = np.abs(numpy(target)).max(axis=-1) * numpy(prediction.gain(m)) + np.abs(numpy(x)).max()
    assert np.all(np.abs(x_hat - numpy(x)).max(axis=-1) <= 1e-4 * size + 1e-4)


class Points(keras.layers.Layer):
    """A network for points in the plane, of one dense layer, with as many outputs as the prediction wants."""

    def __init__(self, factor=1):
        super().__init__()
        self.factor = factor

    def build(self, shapes):
        self.dense = keras.layers.Dense(2 * self.factor)
        self.dense.build((None, 3))

    def call(self, inputs, training=None):
        return self.dense(ops.concatenate([inputs["image"], inputs["time"][:, None] / 1000.0], axis=-1))


@combined("schedule, prediction, weighting, sampler, objective", SCHEDULES, PREDICTIONS, WEIGHTINGS, TIMES, OBJECTIVES)
def test_a_training_step_changes_the_weights(schedule, prediction, weighting, sampler, objective):
    """One step of the whole model; the loss is finite, and so are the weights that it leaves."""
    options = {"times": fitting(sampler, schedule), "objective": fitting(objective, schedule), "weighting": weighting}
    network_ = Points(prediction.factor)
    model = kdiff.DiffusionModel(network_, schedule, prediction, codec="identity", **options)
    model.compile(keras.optimizers.Adam(1e-2), run_eagerly=OP_BY_OP)
    model.build((None, 2))
    before = numpy(network_.dense.kernel).copy()
    loss = model.train_on_batch(MIXTURE.sample(8))
    after = numpy(network_.dense.kernel)
    assert np.isfinite(loss)
    assert np.all(np.isfinite(after))
    assert np.any(after != before)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_every_solver_runs_compiled(solver):
    """`sample`, compiled where the backend compiles, gives what the loop gives op by op, with a network's weights."""
    if solver.learned:
        pytest.skip("needs a learned variance: its own test")
    keras.utils.set_random_seed(0)
    model = kdiff.DiffusionModel(Points(), "cosine", "velocity", codec="identity")
    model.build((None, 2))
    sampler = Sampler(solver, steps=6)
    plain = sampler(model.denoise, model.schedule, (3, 2), seed=2)
    compiled = model.sample(3, sampler=sampler, seed=2)
    np.testing.assert_allclose(compiled, numpy(plain), rtol=2e-3, atol=2e-3 * np.abs(numpy(plain)).max())


def through(prediction):
    """The exact denoiser of the mixture as a network that answers with this prediction."""

    def denoise(x_t, m):
        x_hat = MIXTURE(x_t, m)
        output = prediction.target(x_hat, (x_t - m.alpha * x_hat) / m.sigma, m)
        return prediction.denoise(ops.concatenate([output] * prediction.factor, axis=-1), x_t, m)

    return denoise


@combined("schedule, solver, grid, prediction, to_zero", SCHEDULES, SOLVERS, GRIDS, PREDICTIONS, [False, True])
def test_samples_are_sound(schedule, solver, grid, prediction, to_zero):
    """A short run ends among the data, far from the noise that it began with."""
    steps = 4 if isinstance(grid, (times.Times, times.Sigmas)) else 12
    if isinstance(grid, times.Times) and (not to_zero or schedule.num_steps):
        to_zero, schedule = True, schedules.Cosine()
    denoise = through(prediction)
    if solver.learned:
        plain = denoise

        def denoise(x_t, m):
            return plain(x_t, m), ops.full_like(x_t, 0.5)

    sampler = Sampler(solver, grid, steps, to_zero=to_zero)
    if isinstance(schedule, schedules.Laplace) and not isinstance(grid, (times.Trailing, times.Times, times.Sigmas)):
        schedule = schedules.Cosine()  # whose ends float32 can tell from 0 and 1: some grids say by an error if not
    x = numpy(sampler(denoise, schedule, (16, 2)))
    assert np.all(np.isfinite(x))
    # Stochastic solvers, and PNDM's warm-up, need more steps than these to be near; their own tests have them.
    if to_zero and not solver.stochastic and not isinstance(solver, solvers.PNDM):
        assert np.abs(x).max() < 6.0  # the data lies within 1.5 or so


def drawn(generator):
    """A random composition: the arguments of a model, and of its sampler. No effort is made that they go together."""
    families = SCHEDULES, PREDICTIONS, WEIGHTINGS, TIMES, [*GRIDS, times.All()], SOLVERS
    schedule, prediction, weighting, sampler, grid, solver = (generator.choice(family) for family in families)
    guided, to_zero = generator.choice([(), "clip", "dynamic_threshold"]), generator.choice([True, False])
    run = {"solver": solver, "grid": grid, "steps": generator.choice([None, 1, 2, 7]), "guidance": guided}
    model = {"schedule": schedule, "prediction": prediction, "weighting": weighting, "times": sampler}
    return model, {**run, "to_zero": to_zero}


SEEDS = {"torch": range(6), "jax": [0], "tensorflow": [1]}  # the same on each, and slower elsewhere


@pytest.mark.parametrize("seed", SEEDS[keras.backend.backend()])
def test_any_composition_is_sound_or_refused(seed, tmp_path):
    """Training and samples are finite, and the same after saving; or a ValueError names what does not go together."""
    objects, run = drawn(python_random.Random(seed))
    network_ = kdiff.networks.MLP(8, 1, out_channels=2 * objects["prediction"].factor)
    names = {type(one).__name__ for one in (*objects.values(), *run.values())} | {"Sampler", "steps"}
    refused = None
    try:
        model = kdiff.DiffusionModel(network_, **objects, codec="identity", sampler=Sampler(**run))
        model.compile("adam", run_eagerly=OP_BY_OP)
        loss, samples = model.train_on_batch(MIXTURE.sample(16)), model.sample(2)
    except ValueError as error:
        refused = str(error)
    if refused:
        assert sum(name in refused for name in names) >= 2, refused
        return
    assert np.isfinite(loss)
    assert np.isfinite(samples).all()
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras").sample(2)
    np.testing.assert_allclose(again, samples, rtol=1e-4, atol=1e-4 * np.abs(samples).max())


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_train_sample_and_save(name, tmp_path):
    """Whole models, compiled, as examples/recipes.py has them; the loaded model draws the same samples."""
    objects, sampler = RECIPES[name]
    model = kdiff.DiffusionModel(network(16), codec="identity", **objects)
    model.compile(keras.optimizers.Adam(1e-3))
    x = MIXTURE.sample(64)
    losses = model.fit(x, batch_size=32, epochs=2, verbose=0).history["loss"]
    assert np.all(np.isfinite(losses))
    sampler = sampler.clone(steps=None if isinstance(sampler.grid, times.All) else 6)
    if isinstance(sampler.grid, times.All):
        sampler = sampler.clone(grid=times.Trailing(), steps=6)
    samples = model.sample(4, sampler=sampler)
    assert np.all(np.isfinite(samples))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.sample(4, sampler=sampler), samples, rtol=1e-4, atol=1e-4)


@pytest.mark.once
def test_a_model_is_sampled_under_another_schedule():
    """Noise levels are what counts: from the same noise level, samples of the two schedules agree as steps grow."""
    model = kdiff.DiffusionModel(network(16), "cosine", "velocity", codec="identity", time_label="log_snr")
    model.build((None, 2))
    same, other = (
        model.sample(4, sampler=Sampler("ddim", "uniform_log_snr", 200), schedule=schedule)
        for schedule in (schedules.Cosine(-10.0, 10.0), schedules.Rectified(0.0067))
    )
    np.testing.assert_allclose(same, other, atol=0.05)


@pytest.mark.once
@pytest.mark.parametrize(
    "base", [schedules.NoiseSchedule, predictions.Prediction, weightings.Weighting, solvers.Solver]
)
def test_documentation_names_its_source(base):
    """Every object says where it comes from: a year, at least."""
    import re

    for kind in base.names().values():
        if kind.__module__.startswith("kdiff."):
            text = inspect.getdoc(kind) + inspect.getdoc(inspect.getmodule(kind))
            assert re.search(r"\b(18|19|20)\d\d\b", text), f"{kind.__name__} names no source"


@pytest.mark.once
@pytest.mark.parametrize(
    "one", [*SCHEDULES, *PREDICTIONS, *WEIGHTINGS[1:], *TIMES, *OBJECTIVES, *GRIDS, *SOLVERS], ids=repr
)
def test_repr_is_the_constructor_call(one):
    names = dict(vars(schedules))  # some names mean other things in other modules: there is more than one Uniform
    for module in (predictions, weightings, times, objectives, solvers):
        home = {name: kind for name, kind in vars(module).items() if isinstance(kind, type)}
        names = {**names, **home} if type(one).__module__.startswith(module.__name__) else {**home, **names}
    if "<array" not in repr(one):
        again = eval(repr(one), {"array": np.array, **names})
        assert repr(again) == repr(one)
        assert again == one or isinstance(one, keras.layers.Layer)
    assert type(one).from_config(one.get_config()).get_config() == one.get_config()


@pytest.mark.once
def test_explain_prints_call_equation_and_source(capsys):
    schedules.CosineBeta(100).explain()
    text = capsys.readouterr().out
    assert text.startswith("CosineBeta(num_steps=100)")
    assert "eq. 17" in text
    assert "alpha_bar(t) = f(t) / f(0)" in text
