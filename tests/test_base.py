import copy
import pickle

import keras
import numpy as np
import pytest

import kdiff
from kdiff import codecs, predictions, schedules, solvers, times, weightings
from kdiff.base import Configurable, Value
from kdiff.guidance import Guidance
from kdiff.schedules import NoiseSchedule
from kdiff.times import TimeGrid
from tests.toys import SCHEDULES, numpy

pytestmark = pytest.mark.once

OBJECTS = [
    *SCHEDULES,
    schedules.LinearBeta(10, beta_end=0.5),
    predictions.Velocity(),
    weightings.MinSNR(3.0),
    times.Discrete(7),
    times.Leading(offset=1),
    times.LogSNR(0.5),
    solvers.DDPM("large"),
    solvers.DDIM(eta=0.3),
    kdiff.Sampler(solvers.DDIM(0.5), "leading", 20),
    codecs.Pixels(),
    codecs.Haar(2),
]


class Ramp(NoiseSchedule):
    """A schedule of a user's own: six lines."""

    def __init__(self, scale=10.0):
        super().__init__()
        self.scale = scale

    def log_snr(self, t):
        return self.scale * (1.0 - 2.0 * t)

    def time(self, log_snr):
        return (1.0 - log_snr / self.scale) / 2.0


@pytest.mark.parametrize("thing", [*OBJECTS, Ramp(4.0)], ids=repr)
def test_an_object_is_its_constructor_arguments(thing):
    config = keras.saving.serialize_keras_object(thing)
    for twin in (
        keras.saving.deserialize_keras_object(config),
        type(thing).get(config),
        thing.clone(),
        copy.copy(thing),
        copy.deepcopy(thing),
        pickle.loads(pickle.dumps(thing)),
    ):
        assert twin == thing
        assert hash(twin) == hash(thing)
        assert repr(twin) == repr(thing)


def test_repr_is_the_constructor_call():
    assert repr(schedules.Cosine()) == "Cosine()"
    assert repr(solvers.DDIM(eta=0.3)) == "DDIM(eta=0.3)"
    assert eval(repr(solvers.DDPM("large")), vars(solvers)) == solvers.DDPM("large")


def test_equality_and_changes():
    assert solvers.DDIM(0.5) != solvers.DDIM(0.2)
    assert solvers.DDIM() != solvers.DDPM()
    assert schedules.BetaTable([0.1, 0.2]) != schedules.BetaTable([0.1, 0.3])
    assert solvers.DDIM(0.5).clone(eta=0.2) == solvers.DDIM(0.2)
    assert kdiff.Sampler().clone(solver=solvers.DDPM()) == kdiff.Sampler("ddpm")


def test_get_by_name_class_object_and_config():
    cosine = schedules.CosineBeta()
    for identifier in ("cosine_beta", "CosineBeta", "cosine-beta", schedules.CosineBeta, cosine):
        assert NoiseSchedule.get(identifier) == cosine
    assert NoiseSchedule.get(cosine) is cosine
    assert isinstance(NoiseSchedule.get("ramp"), Ramp)


def test_get_says_what_is_known():
    with pytest.raises(ValueError, match=r"Unknown Solver 'dimm'. Did you mean 'ddim'\? Known: \[.*'ddim'.*'ddpm'"):
        solvers.Solver.get("dimm")
    with pytest.raises(TypeError, match="Prediction expected"):
        predictions.Prediction.get(3)
    with pytest.raises(TypeError, match="Prediction expected"):
        predictions.Prediction.get(schedules.Cosine())
    for foreign in ({}, {"a": 1}, {"class_name": "Cosine"}, {"class_name": 5}):
        with pytest.raises(TypeError, match=r"NoiseSchedule expected.*received: \{"):
            NoiseSchedule.get(foreign)
    for family, name in ((TimeGrid, "times"), (NoiseSchedule, "beta_table"), (NoiseSchedule, schedules.BetaTable)):
        with pytest.raises(ValueError, match=r"is more than a name: give (Times\(times|BetaTable\(beta)"):
            family.get(name)
    with pytest.raises(ValueError, match="no object's configuration"):
        NoiseSchedule.get({"class_name": "__numpy__", "config": {}})


def test_a_schedule_of_ones_own_works_everywhere():
    t = np.float32([0.0, 0.4, 1.0])
    np.testing.assert_allclose(numpy(Ramp().time(Ramp().log_snr(t))), t, atol=1e-6)
    x = kdiff.Sampler("ddim", steps=3)(lambda x, m: 0.0 * x + 0.5, Ramp(30.0), (2, 2))
    np.testing.assert_allclose(numpy(x), 0.5, atol=1e-4)


def test_configurable_needs_no_more_than_a_constructor():
    class Pair(Value):
        def __init__(self, left, right=(1, 2)):
            self.left, self.right = left, right

    assert Pair("a").get_config()["left"] == "a"
    assert Pair.from_config(Pair("a", (3,)).get_config()) == Pair("a", (3,))
    assert issubclass(Value, Configurable)


@pytest.mark.once
def test_an_argument_must_not_hide_a_method():
    """Its value would be called in place of the method, long after the class was written."""
    with pytest.raises(TypeError, match="`start` hides a method of that name"):

        class Late(Guidance):
            def __init__(self, start=0.5):
                self.start = start


def test_names_of_other_libraries():
    """Each alias is one of a class that is there, in the letters that `get` compares, and no name of ours."""
    from kdiff import predictions, schedules, solvers

    families = (predictions.Prediction, schedules.NoiseSchedule, solvers.Solver)
    for family in families:
        ours = {name.replace("_", "") for name in family.names()}
        for alias, name in family.aliases.items():
            assert alias.isalnum()
            assert alias not in ours
            assert name in family.names()
            assert family.get(alias) == family.get(name)
    assert solvers.Solver.get("DPM++") == solvers.Solver.get("dpmpp_2m") == solvers.DPMSolverPP()
    assert predictions.Prediction.get("v_prediction") == predictions.Velocity()
    assert schedules.NoiseSchedule.get("squaredcos_cap_v2") == schedules.CosineBeta()


@pytest.mark.once
def test_names_are_those_that_people_type():
    from kdiff import blocks, guidance, networks, solvers

    assert {"dit", "uvit", "unet", "simple_unet", "ncsnpp"} <= set(networks.Network.names())
    assert "convnext_block" in blocks.Block.names()
    assert "pigdm" in guidance.Guidance.names()
    assert {"unipc", "dpm_solver_pp_3m_sde"} <= set(solvers.Solver.names())
    assert solvers.Solver.get("uni_pc") == solvers.UniPC()  # as it was
