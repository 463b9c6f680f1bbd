"""Write the notebooks from their sources, learn.py and two_equations.md, and run them: they hold their pictures.

    pip install jupytext nbclient ipykernel && KERAS_BACKEND=jax python examples/notebooks.py

Ten minutes on two cores. A test compares the cells of each notebook with its source, and runs them.
"""

import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat

HERE = Path(__file__).parent
SOURCES = ("learn.py", "two_equations.md")


def notebook_of(source: str) -> nbformat.NotebookNode:
    """The notebook, without outputs; cells are numbered, so that a new run changes what is new alone."""
    notebook = jupytext.read(HERE / source)
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
    return notebook


def tidied(outputs: list) -> list:
    """Without the warnings of the backend and second copies of pictures; what is printed is one text."""
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    shown = [output for output in outputs if "data" in output]
    for output in shown:
        output.data = {kind: value for kind, value in output.data.items() if kind != "image/jpeg"}
    return [*([nbformat.v4.new_output("stream", name="stdout", text=printed)] if printed else []), *shown]


def main() -> None:
    from nbclient import NotebookClient

    for source in sys.argv[1:] or SOURCES:
        notebook = notebook_of(source)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "pictures").mkdir()
            NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": folder}}).execute()
        for cell in notebook.cells:
            cell.metadata = {}
            if cell.cell_type == "code":
                cell.outputs = tidied(cell.outputs)
        path = (HERE / source).with_suffix(".ipynb")
        nbformat.write(notebook, path)
        print(path.name, f"{path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
