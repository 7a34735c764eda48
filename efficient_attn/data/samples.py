"""A picture of Pathfinder images: `python -m efficient_attn.data.samples --out samples.png`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from efficient_attn.data import cache
from efficient_attn.data.pathfinder import PRESETS, compose

WIDTH = 1024  # pixels of the picture


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the picture: circles joined in the first row, apart in the second, and so on."""
    parser = argparse.ArgumentParser(description="Draw images of Pathfinder.")
    parser.add_argument("--out", type=Path, required=True, help="the picture, such as samples.png")
    parser.add_argument("--preset", default="32", choices=list(PRESETS), help="the image size")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if given.rows < 1:
        parser.error(f"--rows must be at least 1, not {given.rows}")
    options, draw = PRESETS[given.preset], cache.stream(f"{given.seed}/samples/0")
    columns = min(8, WIDTH // options.size)
    rows = [
        np.hstack([compose(options, draw).picture(label=1 - row % 2) for _ in range(columns)])
        for row in range(given.rows)
    ]
    larger = np.ones((WIDTH // rows[0].shape[1],) * 2, np.uint8)
    PIL.Image.fromarray(np.kron(np.vstack(rows), larger)).save(given.out)
    print(f"{given.out}: {given.rows} rows of {columns}, joined and apart in turn")


if __name__ == "__main__":
    main()
