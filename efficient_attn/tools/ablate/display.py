"""What a sweep says of itself while it runs."""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from efficient_attn.tools.ablate.pool import Task
from efficient_attn.tools.ablate.results import Place
from efficient_attn.tools.ablate.worker import Outcome
from efficient_attn.train.workdir import read_json, read_lines


class Display:
    """The whole sweep's progress: a bar on a terminal, a line for each run that ends everywhere.

    total, done: runs in all, and those that were finished before.
    """

    def __init__(self, place: Place, total: int, done: int, console: Console):
        self.place, self.console = place, console
        self.total, self.done = total, done
        self._worked, self._shares, self._first = 0.0, {}, {}
        self._began = time.perf_counter()
        self._bar = Progress(
            MofNCompleteColumn(), BarColumn(bar_width=20), TimeElapsedColumn(),
            TextColumn("{task.fields[left]}  {task.fields[rows]}"),
            console=console, disable=not console.is_terminal, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=total, completed=done, rows="", left="")

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def ended(self, task: Task, outcome: Outcome) -> None:
        """Say how a run ended, its first number, and what time the rest will take."""
        row, seed = self.place.sweep.rows[task[0]], task[1]
        self._shares.pop(task, None)
        if outcome.kind != "stopped":
            self.done += 1
            self._worked += 1 - self._first.get(task, 0.0)
        what = outcome.kind + (f": {outcome.why}" if outcome.why else "")
        record = self.place.record(row, seed) if outcome.kind == "done" else None
        if record is not None:
            column = self.place.sweep.columns[0]
            value = record.metrics.get(column.metric)
            if isinstance(value, (int, float)):
                what = f"{column.heading} {column.show(value)}"
            what += f" after {record.seconds:.0f} s"
        left = self._left()
        said = f"{self.done}/{self.total} {row[0]}, seed {seed}: {what}  {left}".rstrip()
        self.console.print(said, markup=False)
        self._bar.update(self._task, completed=self.done, left=left)

    def tick(self, busy: Sequence[tuple[Task, float]]) -> None:
        """Show the rows at work, how far each is, and what time is left."""
        if self._bar.disable:
            return
        parts = []
        for task, _ in busy:
            row = self.place.sweep.rows[task[0]]
            share = self._shares[task] = _share(self.place.of(row, task[1]))
            self._first.setdefault(task, share)
            parts.append(f"{row[0]} {share:.0%}" if share else row[0])
        self._bar.update(self._task, rows="; ".join(parts), left=self._left())

    def _left(self) -> str:
        """Time left, by the pace of this command: what others had done before is not its work."""
        under_way = sum(share - self._first[task] for task, share in self._shares.items())
        worked = self._worked + under_way
        left = self.total - self.done - sum(self._shares.values())
        if worked <= 0 or left <= 0:
            return ""
        seconds = round((time.perf_counter() - self._began) / worked * left)
        hours, minutes = divmod(seconds // 60, 60)
        return f"eta {hours}:{minutes:02d}:{seconds % 60:02d}"


def _share(path: Path) -> float:
    """How much of a training is done, by its own log."""
    metrics, config = path / "metrics.jsonl", path / "config.json"
    lines = read_lines(metrics) if metrics.exists() and config.exists() else []
    return lines[-1]["step"] / read_json(config)["train"]["steps"] if lines else 0.0
