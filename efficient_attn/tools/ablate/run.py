"""A sweep from its command line to its table and picture."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from efficient_attn.config import require
from efficient_attn.tools.ablate import picture, table
from efficient_attn.tools.ablate.dry_run import estimate
from efficient_attn.tools.ablate.load import load
from efficient_attn.tools.ablate.pool import Pool, Task, accelerators, run_here
from efficient_attn.tools.ablate.results import Place, Results
from efficient_attn.tools.ablate.sweep import Scale, Sweep
from efficient_attn.tools.ablate.worker import Outcome
from efficient_attn.train.workdir import read_json, read_lines, write_json


@dataclass(frozen=True)
class Asked:
    """What the command line asks for; `processes` None is one for each GPU, 0 is this process."""

    spec: str
    scale: Scale
    seeds: int
    only: str
    workdir: Path
    processes: int | None
    dry_run: bool
    command: str


def ablate(asked: Asked, console: Console | None = None) -> bool:
    """Run a sweep, or what is left of it; whether every row that was asked for has a result.

    Raises:
        UserError: what the command line, the config or the directory does not allow.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    sweep = load(asked.spec, asked.scale)
    chosen = [i for i, (label, _) in enumerate(sweep.rows) if fnmatchcase(label, asked.only)]
    known = ", ".join(label for label, _ in sweep.rows)
    require(bool(chosen), f"--only={asked.only!r} matches none of the rows: {known}")
    place = Place(asked.workdir, sweep)
    if asked.dry_run:
        console.print(estimate(place, chosen, asked.seeds), markup=False)
        return True
    failures = _unequal(sweep, chosen)
    with place.hold():
        write_json(place.path / "sweep.json", _about(asked, sweep))
        tasks = [
            (index, seed)
            for seed in range(asked.seeds)
            for index in chosen
            if sweep.rows[index][0] not in failures
        ]
        done = _run(asked, place, tasks, failures, console)
        results = Results(sweep.rows, place.gather(asked.seeds))
        _write(asked, place, results, failures)
        _conclude(place, sweep, results, failures, asked, console)
    return done and not failures


def _unequal(sweep: Sweep, chosen: Sequence[int]) -> dict[str, str]:
    """Rows whose parameters differ from the first row's by more than the sweep allows."""
    if sweep.equal_parameters is None:
        return {}
    costs = {i: sweep.runner.cost(sweep.rows[i][1]) for i in {0, *chosen}}
    first = costs[0].parameters if costs[0] else 0
    found = {}
    for index in chosen:
        cost = costs[index]
        off = cost.parameters / first - 1 if cost and first else 0.0
        if cost and abs(off) > sweep.equal_parameters:
            found[sweep.rows[index][0]] = (
                f"its {cost.parameters:,} parameters differ by {100 * off:+.0f} % from the "
                f"{first:,} of {sweep.rows[0][0]}; {100 * sweep.equal_parameters:.0f} % are allowed"
            )
    return found


def _run(
    asked: Asked, place: Place, tasks: Sequence[Task], failures: dict[str, str], console: Console
) -> bool:
    """Run the tasks that are not finished; False when a signal stopped the sweep."""
    rows = place.sweep.rows
    left = [(i, seed) for i, seed in tasks if place.record(rows[i], seed) is None]
    if len(left) < len(tasks):
        console.print(f"{len(tasks) - len(left)} of {len(tasks)} runs are finished already")
    if not left:
        return True
    wanted = asked.processes if asked.processes is not None else max(1, len(accelerators()))
    processes = min(len(left), wanted)
    with Display(place, len(tasks), len(tasks) - len(left), console) as display:

        def told(task: Task, outcome: Outcome) -> None:
            label = rows[task[0]][0]
            if outcome.kind == "failed":
                failures[label] = f"{outcome.why} ({place.of(rows[task[0]], task[1])}/log.txt)"
            display.ended(task, outcome)

        if processes == 0:
            run_here(place, left, told)
            return all(place.record(rows[i], s) or rows[i][0] in failures for i, s in left)
        pool = Pool(place, asked.spec, asked.scale, processes)
        return pool.run(left, told=told, tick=lambda: display.tick(pool.busy()))


def _about(asked: Asked, sweep: Sweep) -> dict[str, Any]:
    """What sweep.json has while the rows run; its claims and failures come when they have ended."""
    return asdict(asked) | {
        "workdir": str(asked.workdir),
        "title": sweep.title,
        "source": sweep.source,
        "rows": [label for label, _ in sweep.rows],
    }


def _write(asked: Asked, place: Place, results: Results, failures: dict[str, str]) -> None:
    text = table.render(
        place.sweep, results, scale=asked.scale, command=asked.command, failures=failures
    )
    (place.path / "table.md").write_text(text)
    picture.draw(place.sweep, results, place.path)
    claims = [
        {"text": verdict.claim.text, "holds": verdict.holds, "why": verdict.why}
        for verdict in table.judge(place.sweep, results, asked.scale)
    ]
    ended = {"claims": claims, "failures": failures}
    write_json(place.path / "sweep.json", _about(asked, place.sweep) | ended)


def _conclude(
    place: Place, sweep: Sweep, results: Results, failures: dict[str, str], asked: Asked,
    console: Console,
) -> None:  # fmt: skip
    for verdict in table.judge(sweep, results, asked.scale):
        console.print(f"{verdict.claim.text}: {verdict}", markup=False)
    for label, why in failures.items():
        console.print(f"failed: {label}: {why}", markup=False)
    console.print(f"{len(results.records)} runs: {place.path / 'table.md'}", markup=False)


class Display:
    """The whole sweep's progress: a bar on a terminal, a line for each row that ends elsewhere."""

    def __init__(self, place: Place, total: int, done: int, console: Console):
        self.place, self.console = place, console
        self.total, self.done = total, done
        self.ran, self.began = 0, time.perf_counter()
        self._bar = Progress(
            MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[rows]}"),
            TimeElapsedColumn(), TextColumn("{task.fields[left]}"),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=total, completed=done, rows="", left="")

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def ended(self, task: Task, outcome: Outcome) -> None:
        """Say how a row ended, its first number, and what time the rest will take."""
        row, seed = self.place.sweep.rows[task[0]], task[1]
        self.ran += outcome.kind != "stopped"
        self.done += outcome.kind != "stopped"
        what = outcome.kind + (f": {outcome.why}" if outcome.why else "")
        record = self.place.record(row, seed) if outcome.kind == "done" else None
        if record is not None:
            column = self.place.sweep.columns[0]
            value = record.metrics.get(column.metric)
            if isinstance(value, (int, float)):
                what = f"{column.heading} {column.show(value)}"
            what += f" after {record.seconds:.0f} s"
        left = self._left(0.0)
        self.console.print(
            f"{self.done}/{self.total} {row[0]}, seed {seed}: {what}  {left}", markup=False
        )
        self._bar.update(self._task, completed=self.done, left=left)

    def tick(self, busy: Sequence[tuple[Task, float]]) -> None:
        """Show the rows at work, how far each is, and what time is left."""
        if self._bar.disable:
            return
        parts, begun = [], 0.0
        for (index, seed), _ in busy:
            row = self.place.sweep.rows[index]
            share = self._share(self.place.of(row, seed))
            begun += share
            parts.append(f"{row[0]} {share:.0%}" if share else row[0])
        self._bar.update(self._task, rows="; ".join(parts), left=self._left(begun))

    def _share(self, path: Path) -> float:
        """How much of a training is done, by its own log."""
        metrics, config = path / "metrics.jsonl", path / "config.json"
        lines = read_lines(metrics) if metrics.exists() and config.exists() else []
        return lines[-1]["step"] / read_json(config)["train"]["steps"] if lines else 0.0

    def _left(self, begun: float) -> str:
        """Time left, by the mean time of what has ended since this command began."""
        if self.ran + begun <= 0 or self.done >= self.total:
            return ""
        each = (time.perf_counter() - self.began) / (self.ran + begun)
        minutes, seconds = divmod(round(each * (self.total - self.done - begun)), 60)
        return f"eta {minutes}:{seconds:02d}"
