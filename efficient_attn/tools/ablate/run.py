"""A sweep from its command line to its table and picture."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rich.console import Console

from efficient_attn.config import require
from efficient_attn.tools.ablate import picture, table
from efficient_attn.tools.ablate.display import Display
from efficient_attn.tools.ablate.dry_run import estimate, weigh
from efficient_attn.tools.ablate.load import load
from efficient_attn.tools.ablate.pool import Pool, Task, accelerators, run_here
from efficient_attn.tools.ablate.results import Place, Record, Results, read_records
from efficient_attn.tools.ablate.sweep import Scale, Sweep
from efficient_attn.tools.ablate.table import Failure, Verdict
from efficient_attn.tools.ablate.worker import Outcome
from efficient_attn.train.workdir import read_json, write_json

ABOUT = "sweep.json"


@dataclass(frozen=True)
class Asked:
    """What the command line asks for; `processes` None is one for each GPU, 0 is this process.

    adopt: results.jsonl of other work directories.
    """

    spec: str
    scale: Scale
    seeds: int
    only: str
    workdir: Path
    processes: int | None
    dry_run: bool
    command: str
    adopt: Sequence[Path] = ()


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
    adopted = {file: _adopted(asked, file) for file in asked.adopt}
    if asked.dry_run:
        require(not adopted, "--dry_run keeps nothing; leave out --adopt")
        console.print(estimate(place, chosen, asked.seeds), markup=False)
        return True
    tasks = [(index, seed) for seed in range(asked.seeds) for index in chosen]
    refused = weigh(sweep, chosen)[1] if sweep.equal_parameters is not None else {}
    with place.hold():
        _check(place, asked)
        for file, records in adopted.items():
            kept = place.adopt(records)
            console.print(f"{kept} of {len(records)} runs taken from {file}", markup=False)
        write_json(place.path / ABOUT, _about(asked, sweep))
        _run(asked, place, tasks, set(refused), console)
        failed = place.failures()
        failures = _failures(refused, failed)
        results = Results(sweep.rows, place.gather())
        verdicts = table.judge(sweep, results, asked.scale)
        _write(asked, place, results, verdicts, failures)
        _conclude(place, results, verdicts, failures, console)
        unfinished = _unfinished(place, tasks)
        runs = [(sweep.rows[i][0], seed) for i, seed in unfinished]
        left = [run for run in runs if run[0] not in refused and run not in failed]
        if left:
            console.print(f"stopped: {len(left)} of {len(tasks)} runs are left; run it again")
    return not unfinished


def _check(place: Place, asked: Asked) -> None:
    """Refuse a directory that holds another sweep, whose table would be written over."""
    file = place.path / ABOUT
    there = read_json(file) if file.exists() else asdict(asked)
    for name, mine in (("spec", asked.spec), ("scale", asked.scale)):
        flag = "--config" if name == "spec" else "--scale"
        require(
            there[name] == mine,
            f"{place.path} holds a sweep of {flag}={there[name]}, not {mine}; choose another "
            "--workdir",
        )


def _adopted(asked: Asked, adopted: Path) -> list[Record]:
    """The records of a file to adopt; their sweep may have had its data elsewhere.

    Raises:
        UserError: they are missing or damaged, or of another ablation, argument or scale.
    """
    records = read_records(adopted)
    page = adopted.name != "results.jsonl"
    file = adopted.with_suffix(".json") if page else adopted.with_name(ABOUT)
    require(file.is_file(), f"{file} is missing, which says what {adopted} is of; copy both")
    about = read_json(file)
    whole = isinstance(about, dict) and {"spec", "scale"} <= about.keys()
    require(whole, f"{file} is damaged: it has no spec and scale; run its sweep again")
    for flag, theirs, mine in (("config", about["spec"], asked.spec),
                               ("scale", about["scale"], asked.scale)):  # fmt: skip
        require(
            _without_paths(theirs) == _without_paths(mine),
            f"{adopted} is of --{flag}={theirs}, not {mine}",
        )
    return records


def _without_paths(spec: str) -> list[str]:
    file, _, argument = spec.partition(":")
    return [Path(file).name, *(part for part in argument.split(",") if part and "/" not in part)]


def _unfinished(place: Place, tasks: Sequence[Task]) -> list[Task]:
    return [(i, seed) for i, seed in tasks if place.record(place.sweep.rows[i], seed) is None]


def _failures(
    refused: Mapping[str, str], failed: Mapping[tuple[str, int], str]
) -> dict[str, Failure]:
    """By the runs' names, those of other commands too."""
    failures = {label: Failure(label, "refused", why) for label, why in refused.items()}
    several = any(seed > 0 for _, seed in failed)
    for (label, seed), why in failed.items():
        failures[label + f", seed {seed}" * several] = Failure(label, "failed", why)
    return failures


def _run(
    asked: Asked, place: Place, tasks: Sequence[Task], refused: set[str], console: Console
) -> None:
    """Run the tasks that are not finished but for the rows that are refused."""
    rows = place.sweep.rows
    unfinished = _unfinished(place, tasks)
    left = [(i, seed) for i, seed in unfinished if rows[i][0] not in refused]
    done = len(tasks) - len(unfinished)
    if done:
        console.print(f"{done} of {len(tasks)} runs are finished already")
    if not left:
        return
    wanted = asked.processes if asked.processes is not None else max(1, len(accelerators()))
    with Display(place, len(left) + done, done, console) as display:

        def told(task: Task, outcome: Outcome) -> None:
            if outcome.kind == "failed":
                row, seed = rows[task[0]], task[1]
                log = place.of(row, seed) / "log.txt"
                place.fail(row, seed, outcome.why + f" ({log})" * log.exists())
            display.ended(task, outcome)

        if wanted == 0:
            run_here(place, left, told)
        else:
            pool = Pool(place, asked.spec, asked.scale, min(len(left), wanted))
            pool.run(left, told=told, tick=lambda: display.tick(pool.busy()))


def _about(asked: Asked, sweep: Sweep) -> dict[str, Any]:
    """What sweep.json has while the rows run; its claims and failures come when they have ended."""
    return asdict(asked) | {
        "workdir": str(asked.workdir),
        "adopt": [str(file) for file in asked.adopt],
        "title": sweep.title,
        "source": sweep.source,
        "rows": [label for label, _ in sweep.rows],
    }


def _write(
    asked: Asked, place: Place, results: Results, verdicts: Sequence[Verdict],
    failures: dict[str, Failure],
) -> None:  # fmt: skip
    text = table.render(
        place.sweep, results, verdicts, scale=asked.scale, command=asked.command, failures=failures
    )
    (place.path / "table.md").write_text(text)
    picture.draw(place.sweep, results, place.path)
    claims = [
        {"text": verdict.claim.text, "holds": verdict.holds, "why": verdict.why}
        for verdict in verdicts
    ]
    ended = {"claims": claims, "failures": {name: f.why for name, f in failures.items()}}
    write_json(place.path / ABOUT, _about(asked, place.sweep) | ended)


def _conclude(
    place: Place, results: Results, verdicts: Sequence[Verdict], failures: dict[str, Failure],
    console: Console,
) -> None:  # fmt: skip
    for verdict in verdicts:
        console.print(f"{verdict.claim.text}: {verdict}", markup=False)
    for name, failure in failures.items():
        console.print(f"{failure.kind}: {name}: {failure.why}", markup=False)
    console.print(f"{len(results.records)} runs: {place.path / 'table.md'}", markup=False)
