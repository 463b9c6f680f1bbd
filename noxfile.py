"""The test runner: `pip install nox && nox` runs all that follows, on the Python that runs nox.

    lint            ruff's rules and format
    tests(backend)  the suite where `kdiff[backend]` is all there is: the extra is enough, and on JAX and PyTorch
                    nothing misses TensorFlow, which is not installed; tests that need it skip themselves
    together        one environment with every extra: the backends compared, and on each the tests marked `data` or
                    `reference` that the other sessions skip
    thorough        not by default: on each backend everything, and what takes minutes, such as all pairs of guidance
                    rules compiled
    mutation        not by default: is a change of the mathematics noticed? (tests/mutation.py)

What says the same on every backend, tests marked `once`, runs on one of them, PyTorch; so does every case of a test
with many, such as all predictions on all schedules, of which the others run two each, not the same ones.
`nox -s "tests(jax)"` runs one session, `nox -- -k unet` hands what follows `--` to pytest, where `--cases 1` is one
case of each test, `nox -R` reuses the environments as they are.
"""

from pathlib import Path

import nox

BACKENDS = ("tensorflow", "jax", "torch")
ONCE = "torch"  # starts fastest
JAX_CACHE = str(Path(__file__).parent / ".nox" / "jax-cache")  # the sessions compile many programs alike

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "virtualenv"  # which comes with pip: constraints.txt is written for pip
nox.options.reuse_venv = "yes"  # pip brings an old environment up to date in seconds


def install(session: nox.Session, *requirements: str) -> None:
    """Install what the ranges of pyproject.toml allow and constraints.txt pins.

    Of the thousands of files a fraction is ever imported, and compiled then: pip would compile all, for minutes.
    """
    session.install("--no-compile", "-c", "constraints.txt", *requirements)


def pytest(session: nox.Session, backend: str, *files: str, marked: str | None = None) -> None:
    """Run the tests on the installed package: unlike `python -m pytest`, `pytest` puts no checkout before it."""
    # A selection after `--` may leave nothing to run here, which pytest reports as exit code 5.
    success = (0, 5) if session.posargs else (0,)
    # Small programs leave cores idle, so each core has a process of its own.
    split = () if files else ("-n", "auto", "--dist", "worksteal")
    marks = [f"({marked})"] * bool(marked) + ["not once"] * (backend != ONCE)
    chosen = ("-m", " and ".join(marks)) if marks else ()
    chosen += ("--cases", "2") if backend != ONCE and not files else ()
    environment = {"KERAS_BACKEND": backend, "JAX_COMPILATION_CACHE_DIR": JAX_CACHE}
    session.run("pytest", *files, *split, *chosen, *session.posargs, env=environment, success_codes=success)


@nox.session
def lint(session: nox.Session) -> None:
    """Check the rules and the format."""
    install(session, "ruff")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
@nox.parametrize("backend", BACKENDS, ids=BACKENDS)
def tests(session: nox.Session, backend: str) -> None:
    """Run the suite with one backend and nothing of the others."""
    install(session, f".[{backend},test,plot]")
    pytest(session, backend)


@nox.session
def together(session: nox.Session) -> None:
    """Run on each backend what needs TensorFlow's pipelines or diffusers, and compare the backends."""
    install(session, ".[all]")
    pytest(session, "tensorflow", "tests/test_backends_agree.py")
    for backend in BACKENDS:
        # PyTorch, diffusers and transformers are all that `reference` needs: tests(torch) has run those on PyTorch.
        pytest(session, backend, marked="data" if backend == ONCE else "data or reference")


@nox.session(default=False)
def thorough(session: nox.Session) -> None:
    """Run everything on each backend."""
    install(session, ".[all]")
    for backend in BACKENDS:
        session.run("pytest", "--thorough", *session.posargs, env={"KERAS_BACKEND": backend})


@nox.session(default=False)
def mutation(session: nox.Session) -> None:
    """Change the mathematics at 200 places, each alone: of the changes 90 % must fail a test of their module."""
    install(session, f".[{ONCE},test]", "cosmic-ray")
    environment = {"KERAS_BACKEND": ONCE, "OMP_NUM_THREADS": "1"}
    session.run("python", "tests/mutation.py", *session.posargs, env=environment)
