"""The test runner: `pip install nox && nox` runs all of the following, with the Python that runs nox.

    lint            ruff's rules and format, and what a type checker says of typical use
    alone(backend)  a selection of tests with only `kdiff[backend,plot]` installed: the extra is sufficient, and on JAX
                    and PyTorch only kdiff.data needs TensorFlow, which is not installed
    together        one environment with every extra: the backends compared, scores compared with those of other
                    packages, then the suite on each
    thorough        not by default: everything on each backend, including slow tests, such as all pairs of guidance
                    rules compiled
    mutation        not by default: mutation testing of the mathematics (tests/mutation.py)

Tests marked `once`, whose result does not depend on the backend, run only on PyTorch; likewise all cases of a test with
many, such as all predictions on all schedules, of which the other backends run one each, in turn. `nox -s "alone(jax)"`
runs one session, `nox -- -k unet` passes the arguments after `--` to pytest, `nox -R` reuses the environments
unchanged. Without nox, in an environment with `kdiff[jax,test,plot]`, JAX is tested as here by
`KERAS_BACKEND=jax pytest -n auto -m "not once" --cases 1`.
"""

from pathlib import Path

import nox

BACKENDS = ("tensorflow", "jax", "torch")
ONCE = "torch"  # starts fastest
COMPARED = "tests/test_backends_agree.py"
# In a folder of their own: transformers computes otherwise where torchvision is installed.
PEERS = ("torchmetrics", "lightning-utilities", "torch-fidelity", "pytorch-fid", "prdc", "torchvision")
MEASURED = ("tests/test_evaluation_reference.py", "tests/test_evaluation_inception.py")
ALONE = ("package", "base", "callbacks", "model_feeding", "model_parts", "text")
SPLIT = ("-n", "auto", "--dist", "worksteal")  # small programs leave cores idle, so each core has its own process
SHARE = ("-m", "not once", "--cases", "1")  # for the backends other than ONCE
JAX_CACHE = str(Path(__file__).parent / ".nox" / "jax-cache")  # the sessions compile many of the same programs

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "virtualenv"  # it includes pip:  constraints.txt is written for pip
nox.options.reuse_venv = "yes"  # pip updates an old environment in seconds


def install(session: nox.Session, *requirements: str) -> None:
    """Install within the ranges of pyproject.toml, with the pins of constraints.txt.

    Only a fraction of the thousands of files is ever imported, and then compiled; pip would compile all, for minutes.
    """
    session.install("--no-compile", "-c", "constraints.txt", *requirements)


def pytest(session: nox.Session, backend: str, *arguments: str, **environment: str) -> None:
    """Run tests of the installed package: unlike `python -m pytest`, `pytest` does not put the checkout on the path."""
    # A selection after `--` may leave no tests here, which pytest reports as exit code 5.
    success = (0, 5) if session.posargs else (0,)
    environment |= {"KERAS_BACKEND": backend, "JAX_COMPILATION_CACHE_DIR": JAX_CACHE}
    session.run("pytest", *arguments, *session.posargs, env=environment, success_codes=success)


@nox.session
def lint(session: nox.Session) -> None:
    """Check the rules, the format and the types."""
    install(session, "ruff", "mypy", "numpy")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")


@nox.session
@nox.parametrize("backend", BACKENDS, ids=BACKENDS)
def alone(session: nox.Session, backend: str) -> None:
    """Import everything, train, save and sample with one backend and without the others."""
    install(session, f".[{backend},plot]", "pytest", "pytest-xdist")
    pytest(session, backend, *(f"tests/test_{name}.py" for name in ALONE), *SPLIT, *SHARE)


@nox.session
def together(session: nox.Session) -> None:
    """Compare the backends, and run the suite on each, regardless of failures on the others."""
    install(session, ".[all]")
    peers = str(Path(session.virtualenv.location) / "peers")
    install(session, "--no-deps", "--upgrade", "--target", peers, *PEERS)
    # The first starts a process for each backend.
    runs = [(ONCE, {}, COMPARED), (ONCE, {"PEERS": peers}, *MEASURED)]
    runs += [(one, {}, "--ignore", COMPARED, *SPLIT, *(() if one == ONCE else SHARE)) for one in BACKENDS]
    failed = []
    for backend, environment, *arguments in runs:
        try:
            pytest(session, backend, *arguments, **environment)
        except nox.command.CommandFailed:
            failed.append(backend)
    if failed:
        session.error(f"failed on {failed}")


@nox.session(default=False)
def thorough(session: nox.Session) -> None:
    """Run everything on each backend."""
    install(session, ".[all]")
    for backend in BACKENDS:
        session.run("pytest", "--thorough", *session.posargs, env={"KERAS_BACKEND": backend})


@nox.session(default=False)
def mutation(session: nox.Session) -> None:
    """Mutate the mathematics at 200 places, one at a time: 90 % of the mutants must fail a test of their module."""
    install(session, f".[{ONCE},test]", "cosmic-ray")
    environment = {"KERAS_BACKEND": ONCE, "OMP_NUM_THREADS": "1"}
    session.run("python", "tests/mutation.py", *session.posargs, env=environment)
