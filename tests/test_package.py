"""What holds for the package as a whole: what it imports, in which direction, and what it says of itself."""

import ast
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import keras
import pytest

import kdiff

PACKAGE = Path(kdiff.__file__).parent
FILES = sorted(file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py"))

# A part may import what stands before it, on each of these paths that it is on. So mathematics, neural blocks and
# pipelines meet in nothing but the foundations.
FOUNDATIONS = ("base", "backend", "random", "identity_attention", "text")
MATHEMATICS = (
    "schedules",
    "predictions",
    "conversion",
    "weightings",
    "times",
    "objectives",
    "solvers",
    "operators",
    "guidance",
    "sampling",
    "analytic",
)
PATHS = (
    (
        *FOUNDATIONS,
        *MATHEMATICS,
        "codecs",
        "inputs",
        "averages",
        "model",
        "images",
        "shapes",
        "data",
        "callbacks",
        "evaluation",
    ),
    (*FOUNDATIONS, "blocks", "networks"),
    (*FOUNDATIONS, "images", "shapes", "data"),
    (*FOUNDATIONS, "blocks", "networks", *MATHEMATICS, "codecs", "inputs", "averages", "model", "interop"),
)
BACKENDS = {"tensorflow", "jax", "torch"}
# Beyond Keras and NumPy, which are all that the core requires. tf.data feeds every backend, so `data` has TensorFlow.
REQUIREMENTS = {
    "backend": BACKENDS,
    "schedules": {"matplotlib"},
    "objectives": {"matplotlib"},
    "images": {"PIL", "matplotlib"},
    "text": {"tokenizers", "keras_hub"},
    "interop": {"safetensors", "torch"},
    "data": {"PIL", "keras_cv", "sklearn", "tensorflow", "tensorflow_datasets"},
}


def part(file: str) -> str:
    """The part of kdiff that a file belongs to: "schedules", "blocks", ..."""
    return file.partition("/")[0].removesuffix(".py")


def parse(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(encoding="utf-8"))


def imported(file: str) -> set[str]:
    """What a file imports, at its top or inside a function, by absolute names."""
    package = ["kdiff", *file.split("/")[:-1]]
    names = set()
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*start, *filter(None, [node.module])])
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


def run(code: str) -> subprocess.CompletedProcess:
    """Run `code` in a Python of its own, on the same backend."""
    environment = {**os.environ, "KERAS_BACKEND": keras.backend.backend(), "PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


# Every module but the pipelines, so that a TensorFlow import hidden in one of them is seen.
MODULES = [f"kdiff/{file}".removesuffix(".py").removesuffix("/__init__") for file in FILES if part(file) != "data"]
IMPORT_ALL = "import sys, " + ", ".join(MODULES).replace("/", ".")

# What the search for modules finds where TensorFlow is not installed: nothing.
HIDE_TENSORFLOW = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, *args):
        return None if name.partition(".")[0] == "tensorflow" else super().find_spec(name, *args)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


other_backends = pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="TensorFlow is the backend")


@other_backends
def test_import_leaves_tensorflow_alone():
    pytest.importorskip("tensorflow", reason="what is not installed is never imported")
    result = run(IMPORT_ALL + "\nprint(*sorted(m for m in sys.modules if m.partition('.')[0] == 'tensorflow'))")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


@other_backends
def test_import_works_without_tensorflow():
    result = run(HIDE_TENSORFLOW + IMPORT_ALL)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("file", [file for file in FILES if file != "__init__.py"])
def test_imports_go_one_way(file):
    here = part(file)
    before = [set(path[: path.index(here) + 1]) for path in PATHS if here in path]
    assert before, f"{here} has no place in PATHS"
    modules = (name.partition(".") for name in imported(file))
    assert {rest.partition(".")[0] for package, _, rest in modules if package == "kdiff"} <= set.intersection(*before)


@pytest.mark.parametrize("file", FILES)
def test_imports_only_what_is_required(file):
    free = {"kdiff", "keras", "numpy", *sys.stdlib_module_names}
    assert {name.partition(".")[0] for name in imported(file)} - free <= REQUIREMENTS.get(part(file), set())


@pytest.mark.parametrize("file", [file for file in FILES if part(file) != "backend"])
def test_only_the_backend_names_a_backend(file):
    nodes = list(ast.walk(parse(file)))
    words = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    assert words.isdisjoint(BACKENDS)  # `import_module("jax")`, or a comparison with the backend's name
    assert {"keras.backend.backend", "keras.config.backend"}.isdisjoint(calls | imported(file))


@pytest.mark.parametrize("file", FILES)
def test_public_names_are_documented(file):
    def check(node, where):
        for child in ast.iter_child_nodes(node):
            definition = isinstance(child, (ast.ClassDef, ast.FunctionDef))
            if definition and not child.name.startswith("_"):
                assert ast.get_docstring(child), f"{where}.{child.name} has no docstring"
                if isinstance(child, ast.ClassDef):
                    check(child, f"{where}.{child.name}")

    check(parse(file), file)


def test_init_is_short_and_only_names_things():
    assert len((PACKAGE / "__init__.py").read_text().splitlines()) <= 40
    _, *statements = parse("__init__.py").body
    names = {ast.unparse(node.targets[0]) for node in statements if isinstance(node, ast.Assign)}
    assert all(isinstance(node, (ast.ImportFrom, ast.Assign)) for node in statements)
    assert {"__version__"} <= names <= {"__version__", "__all__"}


def test_version_is_that_of_the_installed_package():
    installed = [found.version for found in metadata.distributions(name="kdiff", path=[str(PACKAGE.parent)])]
    if not installed:
        pytest.skip("kdiff is imported from a checkout")
    assert installed == [kdiff.__version__]
