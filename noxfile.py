"""The test runner: `pip install nox && nox` runs all that follows, on the Python that runs nox.

    lint            ruff's rules and format
    tests(backend)  the suite where `kdiff[backend]` is all there is: the extra is enough, and on JAX and PyTorch
                    nothing misses TensorFlow, which is not installed; tests that need it skip themselves
    together        one environment with every extra: the backends compared, and on each the tests marked `data` or
                    `reference`, which the other sessions skip

`nox -s "tests(jax)"` runs one session, `nox -- -k unet` hands what follows `--` to pytest, `nox -R` reuses the
environments as they are.
"""

import nox

BACKENDS = ("tensorflow", "jax", "torch")

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "virtualenv"  # which comes with pip: constraints.txt is written for pip
nox.options.reuse_venv = "yes"  # pip brings an old environment up to date in seconds


def install(session: nox.Session, *requirements: str) -> None:
    """Install what the ranges of pyproject.toml allow and constraints.txt pins."""
    session.install("-c", "constraints.txt", *requirements)


def pytest(session: nox.Session, backend: str, *files: str, marked: str | None = None) -> None:
    """Run the tests on the installed package: unlike `python -m pytest`, `pytest` puts no checkout before it."""
    # A selection after `--` may leave nothing to run here, which pytest reports as exit code 5.
    success = (0, 5) if session.posargs else (0,)
    # Small programs leave cores idle, so each core has a process of its own.
    split = () if files else ("-n", "auto", "--dist", "worksteal")
    chosen = ("-m", marked) if marked else ()
    arguments = (*files, *split, *chosen, *session.posargs)
    session.run("pytest", *arguments, env={"KERAS_BACKEND": backend}, success_codes=success)


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
        pytest(session, backend, marked="data or reference")
