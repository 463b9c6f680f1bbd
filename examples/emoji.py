r"""Captioned pictures from a folder of emoji: each on backgrounds of eight colours, "cat face on blue".

    git clone --depth 1 https://github.com/googlefonts/noto-emoji        # Apache-2.0
    python examples/emoji.py noto-emoji/png/128 runs/emoji
    KERAS_BACKEND=torch python examples/latent_diffusion.py runs/emoji --captions --pixels --prediction data \
        --patch 16 --shift -2 --batch-size 64 --rate 2e-3 --guidance 1

The files are transparent pictures named after one Unicode character, such as emoji_u1f431.png or 1f431.png; others are
left out, and by default all but animals and fruit. One in eight of the pairs of emoji and colour goes to
OUT/test, the others to OUT/train, so that a model can be asked for pictures that it has never seen.
"""

import argparse
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

COLOURS = {
    "white": (255, 255, 255),
    "black": (32, 34, 42),
    "red": (226, 88, 88),
    "orange": (247, 168, 84),
    "yellow": (255, 224, 120),
    "green": (126, 200, 130),
    "blue": (110, 172, 238),
    "purple": (170, 140, 220),
}
ANIMALS_AND_FRUIT = ("1f345-1f353", "1f400-1f43f", "1f980-1f9ae")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the emoji")
    parser.add_argument("out", type=Path, help="the folder to write: train and test, each with .png and .txt files")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--ranges", nargs="+", default=ANIMALS_AND_FRUIT, help="of code points, such as 1f600-1f64f")
    return parser.parse_args()


def emoji(folder: Path, ranges: list[str]) -> Iterator[tuple[str, Image.Image]]:
    """The name and the picture of each character in the ranges, in the order of their code points."""
    limits = [[int(end, 16) for end in one.split("-")] for one in ranges]
    found = {}
    for path in folder.iterdir():
        if match := re.fullmatch(r"(?:emoji_u)?([0-9a-f]{4,5})(?:[-_]fe0f)?\.png", path.name):
            found[int(match[1], 16)] = path
    for code, path in sorted(found.items()):
        name = unicodedata.name(chr(code), "").lower()
        if name and any(first <= code <= last for first, last in limits):
            yield name, Image.open(path).convert("RGBA")


def on_background(picture: Image.Image, colour: tuple[int, int, int], size: int) -> Image.Image:
    """The picture in the middle of a square, with a margin of one sixteenth of its side."""
    inner = size - size // 8
    picture = picture.convert("RGBa").resize((inner, inner), Image.Resampling.LANCZOS).convert("RGBA")
    result = Image.new("RGBA", (size, size), (*colour, 255))
    result.alpha_composite(picture, (size // 16, size // 16))
    return result.convert("RGB")


def main() -> None:
    options = arguments()
    count = {"train": 0, "test": 0}
    for row, (name, picture) in enumerate(emoji(options.folder, options.ranges)):
        for column, (colour, value) in enumerate(COLOURS.items()):
            split = "test" if column == row % len(COLOURS) else "train"
            folder = options.out / split
            folder.mkdir(parents=True, exist_ok=True)
            stem = f"{name} on {colour}"
            on_background(picture, value, options.image_size).save(folder / f"{stem}.png")
            (folder / f"{stem}.txt").write_text(stem, encoding="utf-8")
            count[split] += 1
    if not count["train"]:
        raise SystemExit(
            f"emoji: no pictures named after a character in {' '.join(options.ranges)} in {options.folder}"
        )
    print(f"In {options.out.resolve()}: {count['train']} pictures in train, {count['test']} in test")


if __name__ == "__main__":
    main()
