"""What holds for the package as a whole: what it imports, in which direction, and what it says of itself."""

import ast
import functools
import importlib
import inspect
import os
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import keras
import pytest

import kdiff

PACKAGE = Path(kdiff.__file__).parent
FILES = sorted(file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py"))

# A part may import what stands before it, on each of these paths that it is on. So mathematics, neural blocks and
# pipelines meet in nothing but the foundations.
FOUNDATIONS = (
    "deprecated",
    "circular_padding",
    "backend",
    "base",
    "random",
    "gaussian",
    "identity_attention",
    "reuse",
    "encodings",
    "writing",
    "text",
    "checks",
    "distribution",
    "compiling",
)
MATHEMATICS = (
    "schedules",
    "predictions",
    "conversion",
    "denoisers",
    "weightings",
    "times",
    "tangents",
    "solvers",
    "losses",
    "objectives",
    "operators",
    "degradations",
    "guidance",
    "sampling",
    "analytic",
)
LAST = ("pictures", "autoencoding", "evaluation")
PATHS = (
    (
        *FOUNDATIONS,
        *MATHEMATICS,
        "codecs",
        "ema",
        "averages",
        "lora",
        "inversion",
        "model",
        "doctor",
        "students",
        "reflow",
        "likelihood",
        "pictures",
        "scenes",
        "data",
        "periodic",
        "callbacks",
        "posthoc",
    ),
    (*FOUNDATIONS, "blocks", "networks", "control"),
    (*FOUNDATIONS, "blocks", "encoders"),
    (*FOUNDATIONS, "pictures", "scenes", "data"),
    (
        *FOUNDATIONS,
        "blocks",
        "encoders",
        "networks",
        "control",
        *MATHEMATICS,
        "codecs",
        "ema",
        "averages",
        "lora",
        "inversion",
        "model",
        "students",
        "reflow",
        "cascade",
        "contrastive",
        "unclip",
        "interop",
        *LAST,
        "demo",
    ),
)
BACKENDS = {"tensorflow", "jax", "torch"}
# Beyond Keras and NumPy, which are all that the core requires. tf.data feeds every backend, so `data` has TensorFlow.
REQUIREMENTS = {
    "backend": BACKENDS,
    "schedules": {"matplotlib"},
    "objectives": {"matplotlib"},
    "likelihood": {"matplotlib"},
    "pictures": {"PIL", "matplotlib"},
    "text": {"tokenizers", "keras_hub"},
    "encoders": {"tokenizers", "sentencepiece"},
    "interop": {"h5py", "safetensors"},
    "evaluation": {"scipy", "sklearn", "keras_hub"},
    "callbacks": {"h5py"},  # which Keras requires
    "posthoc": {"h5py", "matplotlib"},
    "demo": {"gradio"},
    "data": {"PIL", "keras_cv", "sklearn", "tensorflow", "tensorflow_datasets"},
}


def part(file: str) -> str:
    """The part of kdiff that a file belongs to: "schedules", "blocks", ..."""
    return file.partition("/")[0].removesuffix(".py")


@functools.cache
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

other_backends = pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="TensorFlow is the backend")


def test_everything_can_be_imported():
    """Of one backend and its extra alone, in nox's session `alone`: all but the pipelines, which need TensorFlow."""
    for module in MODULES:
        importlib.import_module(module.replace("/", "."))


LOADED = "print(*sorted({'tensorflow', 'gradio'} & {name.partition('.')[0] for name in sys.modules}))"
MAKE = """
from kdiff import DiffusionModel, Sampler, schedules
from kdiff.networks import UNet
sampler = Sampler("dpm_solver_pp", "karras", guidance="clip")
assert sampler.clone() == sampler
model = DiffusionModel(UNet.residual(8, levels=2), schedules.LinearBeta().clone())
model.build((None, 8, 8, 1))
"""


@pytest.mark.data  # where TensorFlow is installed: without it, nothing here would work if it were imported
@other_backends
def test_tensorflow_and_gradio_are_left_alone():
    """By what is imported, and by what is made, compared and copied: Keras would import it to serialise any object."""
    result = run("\n".join([IMPORT_ALL, LOADED, MAKE, LOADED]))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


@pytest.mark.once
@pytest.mark.parametrize("file", [file for file in FILES if file != "__init__.py"])
def test_imports_go_one_way(file):
    here = part(file)
    before = [set(path[: path.index(here) + 1]) for path in PATHS if here in path]
    assert before, f"{here} has no place in PATHS"
    modules = (name.partition(".") for name in imported(file))
    assert {rest.partition(".")[0] for package, _, rest in modules if package == "kdiff"} <= set.intersection(*before)


@pytest.mark.once
@pytest.mark.parametrize("file", FILES)
def test_imports_only_what_is_required(file):
    free = {"kdiff", "keras", "numpy", *sys.stdlib_module_names}
    assert {name.partition(".")[0] for name in imported(file)} - free <= REQUIREMENTS.get(part(file), set())


@pytest.mark.once
@pytest.mark.parametrize("file", [file for file in FILES if part(file) != "backend"])
def test_only_the_backend_names_a_backend(file):
    nodes = list(ast.walk(parse(file)))
    words = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    assert words.isdisjoint(BACKENDS)  # `import_module("jax")`, or a comparison with the backend's name
    assert {"keras.backend.backend", "keras.config.backend"}.isdisjoint(calls | imported(file))


def module_of(file: str):
    return importlib.import_module(f"kdiff/{file}".removesuffix(".py").removesuffix("/__init__").replace("/", "."))


PARTS = [pytest.param(file, marks=pytest.mark.data) if part(file) == "data" else file for file in FILES]


@pytest.mark.once
@pytest.mark.parametrize("file", PARTS)
def test_public_names_are_documented(file):
    """But for what a base of kdiff documents, or Keras defines, and a class overrides."""
    own = [
        value
        for value in vars(module_of(file)).values()
        if getattr(value, "__module__", "") == module_of(file).__name__
    ]
    classes = [value for value in own if inspect.isclass(value) and not value.__name__.startswith("_")]
    keras_defines = {name for base in (keras.layers.Layer, keras.Model, keras.callbacks.Callback) for name in dir(base)}
    for value in own:
        if (inspect.isclass(value) or inspect.isfunction(value)) and not value.__name__.startswith("_"):
            assert value.__doc__, f"{value.__name__} has no docstring"
    for kind in classes:
        for name, member in vars(kind).items():
            member = getattr(member, "__func__", member)  # of a class method
            if isinstance(member, (types.FunctionType, property)) and not name.startswith("_"):
                documented = any(getattr(vars(base).get(name), "__doc__", None) for base in kind.__mro__)
                assert documented or name in keras_defines, f"{kind.__name__}.{name} has no docstring"


def public(file: str) -> set[str]:
    """The names that a file defines, or of a package also imports, without an underscore before them."""
    names = set()
    for node in parse(file).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.ImportFrom) and file.endswith("__init__.py"):
            names |= {alias.asname or alias.name for alias in node.names}
    return {name for name in names if not name.startswith("_")}


@pytest.mark.once
@pytest.mark.parametrize("file", [file for file in FILES if "/_" not in file.replace("/__init__", "")])
def test_all_names_what_is_public(file):
    """`__all__` of every public module is its definitions; of a package, what it offers."""
    (listed,) = [
        ast.literal_eval(node.value)
        for node in parse(file).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert set(listed) == public(file)
    assert len(listed) == len(set(listed))


@pytest.mark.once
def test_init_only_names_things():
    """And finds `kdiff.data` and `kdiff.demo`, the parts that are imported late."""
    _, *statements, late = parse("__init__.py").body
    assert isinstance(late, ast.FunctionDef)
    assert late.name == "__getattr__"
    names = {ast.unparse(node.targets[0]) for node in statements if isinstance(node, ast.Assign)}
    assert all(isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign)) for node in statements)
    assert {"__version__"} <= names <= {"__version__", "__all__"}


def test_version_is_that_of_the_installed_package():
    installed = [found.version for found in metadata.distributions(name="kdiff", path=[str(PACKAGE.parent)])]
    if not installed:
        pytest.skip("kdiff is imported from a checkout")
    assert installed == [kdiff.__version__]


@pytest.mark.data
@pytest.mark.once
def test_data_is_found_without_its_own_import():
    """In a new process, which has imported kdiff alone; and a name that is not there is an AttributeError."""
    code = "import kdiff; kdiff.data.images; kdiff.demo.page; assert not hasattr(kdiff, 'dat')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.once
def test_a_test_file_is_found_from_its_modules_name():
    """test_room.py, test_room_module.py or test_module.py, and what goes on with an underscore."""
    of_all = {"backends_agree", "compositions", "examples", "package", "readme"}
    modules = {"_".join(Path(file).with_suffix("").parts) for file in FILES}
    modules = {module.removesuffix("___init__") for module in modules} | {Path(file).stem for file in FILES}
    named = [file.stem.removeprefix("test_") for file in Path(__file__).parent.glob("test_*.py")]
    lost = [name for name in named if not any(f"{name}_".startswith(f"{module}_") for module in modules)]
    assert set(lost) == of_all
