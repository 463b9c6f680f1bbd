"""Draw the architecture of kdiff: each room, a module or subpackage, stands above all that it imports.

python examples/rooms.py          # examples/pictures/rooms.png; seconds, and no backend is needed
"""

import ast
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kdiff"
PICTURE = ROOT / "examples/pictures/rooms.png"
HELPERS = {"base", "checks", "backend", "deprecated", "random", "writing"}  # which nearly every room imports
COLOURS = {
    "mathematics of one noise level": ("schedules predictions weightings times conversion gaussian losses", "#cfe3f7"),
    "from noise to data": ("denoisers solvers guidance operators sampling analytic tangents", "#d7efd0"),
    "networks": ("blocks networks encoders text contrastive", "#fbe3c4"),
    "training and systems": (
        "objectives model codecs cascade unclip students reflow lora control inversion",
        "#f3d2de",
    ),
}


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file: Path) -> set[str]:
    """The rooms that a module imports when it is imported; what functions import later does not count."""
    rooms = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kdiff":
            parts = node.module.split(".")
            rooms |= {parts[1]} if len(parts) > 1 else {name.name for name in node.names}
    return rooms


def rooms() -> dict[str, set[str]]:
    """What each room imports of the others."""
    uses = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        if (room := room_of(file)) not in HELPERS | {"__init__"}:
            uses.setdefault(room, set()).update(imported(file) - HELPERS - {room})
    return {room: used & uses.keys() for room, used in uses.items()}


def floors(uses: dict[str, set[str]]) -> list[list[str]]:
    """Rooms by the length of the longest way down; a way that comes back is an error, for imports go one way."""
    heights = {}
    while len(heights) < len(uses):
        ready = {room for room in uses.keys() - heights.keys() if uses[room] <= heights.keys()}
        if not ready:
            raise ValueError(f"these rooms import each other in a circle: {sorted(uses.keys() - heights.keys())}")
        heights |= {room: 1 + max((heights[used] for used in uses[room]), default=-1) for room in ready}
    return [sorted(room for room in heights if heights[room] == floor) for floor in range(max(heights.values()) + 1)]


def direct(uses: dict[str, set[str]]) -> dict[str, set[str]]:
    """Without the imports that another import makes too: the fewest lines that say who stands above whom."""
    below = {}
    for room in (room for floor in floors(uses) for room in floor):
        below[room] = uses[room].union(*(below[used] for used in uses[room]))
    return {room: used - set().union(*(below[other] for other in used)) for room, used in uses.items()}


def draw(uses: dict[str, set[str]]) -> Figure:
    colour = {room: shade for names, shade in COLOURS.values() for room in names.split()}
    order = list(colour)
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots()
    places, levels = {}, floors(uses)
    for height, names in enumerate(levels):
        names = sorted(names, key=lambda room: order.index(room) if room in order else len(order))
        places |= {room: ((i + 0.5) / len(names) * 10, height) for i, room in enumerate(names)}
    for room, used in direct(uses).items():
        for other in used:
            (x, y), (u, v) = places[room], places[other]
            axes.plot([x, u], [y, v], color="0.7", linewidth=0.8, zorder=0)
    for room, (x, y) in places.items():
        half = min(0.5, 4.5 / len(levels[y]))
        style = {"facecolor": colour.get(room, "0.94"), "edgecolor": "0.4"}
        axes.add_patch(FancyBboxPatch((x - half, y - 0.2), 2 * half, 0.4, "round,pad=0.02", **style))
        text = room.replace("_", "\n")
        axes.text(x, y, text, ha="center", va="center", fontsize=8.5 if half == 0.5 else 6.5)
    for i, (label, (_, shade)) in enumerate(COLOURS.items()):
        axes.text(0.1 + 2.6 * i, -0.75, f"  {label}  ", fontsize=9, backgroundcolor=shade, va="center")
    axes.set(xlim=(0, 10), ylim=(-1.0, len(levels) - 0.6))
    axes.axis("off")
    return figure


if __name__ == "__main__":
    draw(rooms()).savefig(PICTURE, dpi=110)
    print(PICTURE.relative_to(ROOT))
