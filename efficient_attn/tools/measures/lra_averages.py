"""Long Range Arena's averages over its tasks, of the sweeps of configs/ablations/lra.py.

python -m efficient_attn.tools.measures.lra_averages runs/ablations/lra

The directory holds one for each task: listops, text, retrieval, image, pathfinder.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from efficient_attn.config import require
from efficient_attn.tools.table import row
from efficient_attn.train.flags import run
from efficient_attn.train.workdir import read_lines

TASKS = ("listops", "text", "retrieval", "image", "pathfinder")
CHANCE = 0.5
"""Of Path-X, where every mechanism of the paper fails."""


class Averages(NamedTuple):
    """five: over the five tasks, as the paper prints it. six: with Path-X as 50 %, as S4 and later
    papers do."""

    five: float
    six: float


def averages(accuracies: Mapping[str, float]) -> Averages | None:
    """Both averages of one mechanism's accuracies by task; None where a task is missing.

    Raises:
        UserError: a task that is none of the five.
    """
    strange = sorted(set(accuracies) - set(TASKS))
    require(not strange, f"no task of the arena: {', '.join(strange)}; known: {', '.join(TASKS)}")
    if len(accuracies) < len(TASKS):
        return None
    total = sum(accuracies.values())
    return Averages(total / 5, (total + CHANCE) / 6)


def gather(root: Path) -> dict[str, dict[str, float]]:
    """{mechanism: {task: mean accuracy over its seeds}} of the sweeps root/TASK.

    A mechanism goes by the name in front of its options, which differ between tasks.

    Raises:
        UserError: none of the directories has a result.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for task in TASKS:
        file = root / task / "results.jsonl"
        for record in read_lines(file) if file.exists() else []:
            name = record["label"].partition("(")[0]
            found.setdefault(name, {}).setdefault(task, []).append(record["metrics"]["accuracy"])
    require(
        bool(found),
        f"no results in {root}; run configs/ablations/lra.py:TASK with --workdir={root}/TASK first",
    )
    return {
        name: {task: float(np.mean(values)) for task, values in by_task.items()}
        for name, by_task in found.items()
    }


def render(accuracies: Mapping[str, Mapping[str, float]]) -> str:
    """Table 1 in Markdown, in %: a row for each mechanism, both averages where all tasks are."""
    lines = [
        row(["mechanism", *TASKS, "mean of five", "with Path-X as 50"]),
        row(["---", *["--:"] * (len(TASKS) + 2)]),
    ]
    for name, by_task in accuracies.items():
        cells = [f"{100 * by_task[t]:.2f}" if t in by_task else "not run" for t in TASKS]
        both = averages(by_task)
        cells += [f"{100 * value:.2f}" for value in both] if both else ["", ""]
        lines.append(row([f"`{name}`", *cells]))
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Print the table of a directory."""
    require(len(argv) == 2, "name the directory of the sweeps, such as runs/ablations/lra")
    print(render(gather(Path(argv[1]))))


if __name__ == "__main__":
    run(main)
