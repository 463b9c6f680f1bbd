"""The examples that are quick enough to run, and the pages that they write."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    environment = {**os.environ, "KERAS_BACKEND": keras.backend.backend()}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_catalogue_is_up_to_date():
    sys.path.append(str(EXAMPLES))
    from catalogue import PAGE, catalogue

    assert PAGE.read_text(encoding="utf-8") == catalogue(), "run `python examples/catalogue.py`"


def test_recipes(tmp_path):
    pytest.importorskip("matplotlib")
    output = run("recipes.py", "--steps", "20", "--only", "Rectified flow", "--out", str(tmp_path / "recipes.png"))
    assert "Rectified flow" in output
    assert (tmp_path / "recipes.png").stat().st_size > 10_000


@pytest.mark.data
def test_the_architectures():
    sys.path.append(str(EXAMPLES))
    from architectures import architectures

    from kdiff.networks import parameters

    for name, make in architectures(10).items():
        assert 5e5 < parameters(make(), (28, 28, 1)) < 2e6, name
