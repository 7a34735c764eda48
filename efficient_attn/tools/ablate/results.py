"""The directory of a sweep, and what stands in it: one record for each finished row and seed."""

import contextlib
import fcntl
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from efficient_attn.config import require
from efficient_attn.errors import UserError
from efficient_attn.tools.ablate.sweep import Number, Row, Sweep
from efficient_attn.train.config import fingerprint
from efficient_attn.train.workdir import read_json, read_lines, write_json

FAILURE = "failure.json"
WAIT = 120  # seconds that a row waits for the process that was at work on it before


@dataclass(frozen=True)
class Record:
    """A finished row: its numbers, and what is needed to find them again."""

    label: str
    seed: int
    overrides: Mapping[str, Any]
    metrics: Mapping[str, Any]
    seconds: Number
    date: str
    commit: str | None
    versions: Mapping[str, Any]


def read_records(path: Path) -> list[Record]:
    """What `Place.gather` wrote.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    require(path.is_file(), f"{path.parent} has no {path.name}; run its sweep again")
    found = read_lines(path)
    whole = len(path.read_text().splitlines())
    require(whole == len(found), f"{path}: line {len(found) + 1} is cut; run its sweep again")
    try:
        return [Record(**line) for line in found]
    except TypeError as error:
        raise UserError(f"{path} is damaged ({error}); run its sweep again") from None


class Place:
    """The files of a sweep below `path`:

    rows/LABEL-HASH/seed-N/   row.json, log.txt, and of a training all that a run has; failure.json
                              where it failed, of no account once there is a row.json
    results.jsonl             the records of all finished rows, one a line
    table.md, figure.png, figure.svg
    """

    def __init__(self, path: str | Path, sweep: Sweep):
        self.path, self.sweep = Path(path).expanduser().absolute(), sweep
        self.results = self.path / "results.jsonl"
        self._rows: dict[str, Path] = {}

    def of(self, row: Row, seed: int) -> Path:
        """The directory of a row; another config's is another one.

        Raises:
            UserError: the row overrides what there is not.
        """
        if row[0] not in self._rows:  # a config takes milliseconds to resolve
            self._rows[row[0]] = self._of(row)
        return self._rows[row[0]] / f"seed-{seed}"

    def _of(self, row: Row) -> Path:
        label, overrides = row
        slug = re.sub(r"[^A-Za-z0-9.=]+", "-", label).strip("-")[:48]
        try:
            mark = fingerprint(self.sweep.runner.identity(overrides))
        except UserError as error:
            raise UserError(f"row {label}: {error}") from None
        return self.path / "rows" / f"{slug}-{mark}"

    def record(self, row: Row, seed: int) -> Record | None:
        """What is known of a row, None when it has not been finished."""
        file = self.of(row, seed) / "row.json"
        return Record(**(read_json(file) | {"label": row[0]})) if file.exists() else None

    def finish(self, row: Row, record: Record) -> None:
        """Keep a record, whole or not at all."""
        write_json(self.of(row, record.seed) / "row.json", asdict(record))

    def adopt(self, records: Sequence[Record]) -> int:
        """Keep records that another place has of rows of this sweep; how many.

        A row is known by its label and its overrides. What the place has itself stays.
        """
        rows = {row[0]: row for row in self.sweep.rows}
        kept = [
            record for record in records
            if record.label in rows
            and json.loads(json.dumps(rows[record.label][1])) == record.overrides
            and self.record(rows[record.label], record.seed) is None
        ]  # fmt: skip
        for record in kept:
            self.finish(rows[record.label], record)
        return len(kept)

    def fail(self, row: Row, seed: int, why: str) -> None:
        """Keep why a row has no record, for later commands to tell."""
        write_json(self.of(row, seed) / FAILURE, {"why": why})

    def failures(self) -> dict[tuple[str, int], str]:
        """Why rows without a record failed the last time, by label and seed."""
        return {
            (row[0], seed): read_json(file)["why"]
            for row in self.sweep.rows
            for seed in self._seeds(FAILURE)
            if (file := self.of(row, seed) / FAILURE).exists() and self.record(row, seed) is None
        }

    def _seeds(self, name: str) -> list[int]:
        """Those of which any row has a file of that name."""
        found = self.path.glob(f"rows/*/seed-*/{name}")
        return sorted({int(file.parent.name.removeprefix("seed-")) for file in found})

    def gather(self) -> list[Record]:
        """All records of the sweep's rows, which are written to results.jsonl as well."""
        seeds = self._seeds("row.json")
        found = [self.record(row, seed) for row in self.sweep.rows for seed in seeds]
        records = [record for record in found if record is not None]
        partial = self.results.with_suffix(".partial")
        partial.write_text("".join(json.dumps(asdict(record)) + "\n" for record in records))
        partial.replace(self.results)
        return records

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Keep other sweeps out of the directory.

        Raises:
            UserError: another process runs a sweep there, or it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--workdir={self.path} cannot be made: {error.strerror}") from None
        with locked(self.path / ".lock", seconds=0) as got:
            if not got:
                raise UserError(f"another process runs the sweep in {self.path}; wait for it")
            yield


@contextlib.contextmanager
def locked(path: Path, *, seconds: Number) -> Iterator[bool]:
    """Whether the lock was to be had within this time; it is held in the context."""
    path.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + seconds
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < until:
                    time.sleep(0.1)
                    continue
                yield False
                return
            yield True
            return


class Missing(KeyError):
    """A claim asks for a row or a metric that has no result."""


class Results:
    """The numbers of a sweep: means over the seeds that there are."""

    def __init__(self, rows: Sequence[Row], records: Sequence[Record]):
        self.rows, self.records = list(rows), list(records)

    def values(self, label: str, metric: str) -> list[Any]:
        """One value for each seed; empty where there is none."""
        found = [r.metrics.get(metric) for r in self.records if r.label == label]
        return [value for value in found if value is not None]

    def mean(self, label: str, metric: str) -> Any:
        """The mean over the seeds: a number, or an array where the metric is a curve.

        Raises:
            Missing: the row has no such number.
        """
        values = self.values(label, metric)
        if not values:
            raise Missing(f"{label} has no {metric}")
        mean = np.mean(np.asarray(values, np.float64), axis=0)
        return float(mean) if mean.ndim == 0 else mean

    def deviation(self, label: str, metric: str) -> float | None:
        """The standard deviation over the seeds, None with fewer than two."""
        values = self.values(label, metric)
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

    def labels(self, where: Mapping[str, Any] | None = None) -> list[str]:
        """The rows that have these options, in the sweep's order."""
        wanted = (where or {}).items()
        return [
            label for label, options in self.rows if all(options.get(k) == v for k, v in wanted)
        ]

    def each(self, metric: str, where: Mapping[str, Any] | None = None) -> dict[str, float]:
        """The mean of every row that has these options.

        Raises:
            Missing: one of them has no such number.
        """
        return {label: self.mean(label, metric) for label in self.labels(where)}

    def curve(
        self, x: str, y: str, where: Mapping[str, Any] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The metric y over the option (or metric) x of the rows that have these options, by x.

        Raises:
            Missing: one of them has no such number.
        """
        options = dict(self.rows)
        points = sorted(
            (options[label].get(x, None) if x in options[label] else self.mean(label, x),
             self.mean(label, y))
            for label in self.labels(where)
        )  # fmt: skip
        return np.array([a for a, _ in points]), np.array([b for _, b in points])
