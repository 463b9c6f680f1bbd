"""`python -m kdiff.demo model.keras`."""

import argparse
from pathlib import Path

from kdiff.demo import launch, load


def main(arguments: list[str] | None = None) -> None:
    """Loads the models and shows the page until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m kdiff.demo", description="A page on which trained models draw.")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a .keras file, or a folder of diffusers")
    names = "names of the labels of a condition, in their order; may be given more than once"
    parser.add_argument("--classes", action="append", default=[], metavar="label=cat,dog", help=names)
    parser.add_argument("--port", type=int, help="of 127.0.0.1; otherwise the first that is free from 7860 on")
    options = parser.parse_args(arguments)
    try:
        models = {name: load(path) for name, path in _names(options.models).items()}
        launch(models, dict(map(_named, options.classes)), server_port=options.port)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))


def _names(paths: list[str]) -> dict[str, str]:
    """The paths by the names of their tabs: that of the file, or the path where several files have it."""
    stems = [Path(path).resolve().stem for path in paths]
    return {path if stems.count(stem) > 1 else stem: path for stem, path in zip(stems, paths, strict=True)}


def _named(text: str) -> tuple[str, list[str]]:
    name, equals, names = text.partition("=")
    if not equals:
        raise ValueError(f"--classes must be a condition and its names, such as label=cat,dog; received: {text}")
    return name, names.split(",")


if __name__ == "__main__":
    main()
