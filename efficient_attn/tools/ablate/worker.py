"""One row of a sweep, in a process of its own or in this one."""

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

from efficient_attn.errors import UserError
from efficient_attn.tools.ablate.results import WAIT, Place, Record, locked
from efficient_attn.tools.ablate.sweep import Number, Row, Scale


class Outcome(NamedTuple):
    """How a row ended; `why` of a failure is one sentence."""

    kind: Literal["done", "stopped", "failed"]
    why: str = ""


def perform(place: Place, row: Row, seed: int) -> Outcome:
    """Run a row unless it is finished, and keep its record.

    A process that was left alone at the same row, its sweep having been killed, is waited for.
    """
    label, overrides = row
    path = place.of(row, seed)
    with locked(path / "row.lock", seconds=WAIT) as got:
        if not got:
            return Outcome("failed", f"another process is at work in {path}")
        if place.record(row, seed) is not None:
            return Outcome("done")
        began = time.perf_counter()
        try:
            metrics = place.sweep.runner(overrides, seed=seed, path=path)
            if metrics is None:
                return Outcome("stopped")
            seconds = metrics.get("seconds", time.perf_counter() - began)
            place.finish(row, _record(label, seed, overrides, metrics, seconds))
        except UserError as error:
            return Outcome("failed", str(error))
        except Exception as error:  # the sweep goes on; the log has the rest
            traceback.print_exc()
            return Outcome("failed", f"{type(error).__name__}: {error}".splitlines()[0])
        return Outcome("done")


def _record(label: str, seed: int, overrides, metrics, seconds: Number) -> Record:
    from efficient_attn.train.result import commit, versions

    return Record(
        label=label,
        seed=seed,
        overrides=dict(overrides),
        metrics={name: _plain(value) for name, value in metrics.items()},
        seconds=round(seconds, 3),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(),
        versions=versions(),
    )


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def work(connection: Connection, spec: str, scale: Scale, path: str, device: str | None) -> None:
    """The life of a worker process: rows come in as (index, seed), outcomes go out.

    The config is loaded here again, since functions in it cannot be sent. What a row prints goes to
    its log.txt. The worker ends when its parent does: a training saves first.
    """
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    from efficient_attn.tools.ablate.load import load
    from efficient_attn.train.compilation import prepare

    prepare()
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()
    sweep = load(spec, scale)
    place = Place(path, sweep)
    try:
        while True:
            index, seed = connection.recv()
            row = sweep.rows[index]
            _print_to(place.of(row, seed))
            connection.send(perform(place, row, seed))
    except (EOFError, BrokenPipeError):  # nobody is left to ask for more
        return
    except KeyboardInterrupt:
        sys.exit(130)


def _leave_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _print_to(path: Path) -> None:
    """Standard output and error go to the end of log.txt, those of libraries too."""
    path.mkdir(parents=True, exist_ok=True)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # written as it is said
    with (path / "log.txt").open("a") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
