"""What was published of image models: `published.csv`, and the survey's table 3, `survey.csv`.

Accuracies are top-1 on ImageNet's validation set, in percent; multiply-adds are in 10^9 for one
image. "timm" and a tag: measured by timm's authors on those weights; "arXiv": printed in the paper,
or, where it is said, beside the code that was released with it.
"""

import csv
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


class Published(NamedTuple):
    """A network's figures as printed: a string has the digits that were given, "" none."""

    name: str
    image_size: str
    params_M: str
    gmacs: str
    top1: str
    source: str


class SurveyRow(NamedTuple):
    """A row of table 3 of Liu et al. (2024, arXiv 2404.07236) as printed, and our network for it.

    name, our_size, options: the network; name is empty where this project has none. corrected: what
    is misprinted.
    """

    category: str
    model: str
    image_size: str
    params_M: str
    images_per_s: str
    gflops: str
    top1: str
    name: str
    our_size: str
    options: str
    corrected: str


def published() -> dict[tuple[str, int], Published]:
    """Every network's figures by its name and image size."""
    rows = [Published(**row) for row in _read("published.csv")]
    return {(row.name, int(row.image_size)): row for row in rows}


def survey() -> list[SurveyRow]:
    """The rows of the survey's table 3, in its order."""
    return [SurveyRow(**row) for row in _read("survey.csv")]


def _read(name: str) -> list[dict[str, str]]:
    with (HERE / name).open(newline="") as file:
        return list(csv.DictReader(file))


def agrees(value: float, printed: str) -> bool:
    """Whether a number rounds to what was printed, to all its digits."""
    digits = len(printed.partition(".")[2])
    return abs(value - float(printed)) <= 0.5 * 10**-digits * (1 + 1e-9)
