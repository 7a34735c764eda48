"""Sweeps whose rows run in processes of their own, which fail, are stopped and are killed."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from efficient_attn.tools.ablate import pool
from efficient_attn.tools.ablate.worker import Outcome
from efficient_attn.train.workdir import read_lines
from tests.conftest import ROOT
from tests.tools.sweeps import TRAINED, calls, records, run, write
from tests.train.test_loop import assert_same_run

FAULTS = """
ROWS = [("a", {"x": 1}), ("killed", {"x": 2, "fault": "kill"}), ("b", {"x": 3}),
        ("gone", {"x": 4, "fault": "exit"}), ("user", {"x": 5, "fault": "user"}), ("c", {"x": 6})]
CLAIMS = []
"""


def test_processes_that_die_are_replaced_and_their_rows_named(tmp_path):
    file = write(tmp_path, more=FAULTS)
    complete, said = run(file, processes=2)
    assert not complete
    assert [record["label"] for record in records(tmp_path / "out")] == ["a", "b", "c"]
    assert "failed: killed: the process ended with SIGKILL (out of memory?) (/" in said
    assert "failed: gone: the process ended with exit code 7 (/" in said
    assert "failed: user: x=3 is too much; lower it (/" in said
    (log,) = tmp_path.glob("out/rows/a-*/seed-0/log.txt")
    assert log.read_text() == "said by the row\n"
    assert len(calls(file)) == 6


class Sweep:
    """The command, begun in a session of its own as by a shell; programs compiled are kept."""

    def __init__(self, file, workdir, *flags):
        environment = os.environ | {
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "XDG_CACHE_HOME": str(file.parent / "cache"),
            "JAX_ENABLE_COMPILATION_CACHE": "true",
        }
        command = [sys.executable, "-m", "efficient_attn.tools.ablate", f"--config={file}"]
        self.process = subprocess.Popen(
            [*command, f"--workdir={workdir}", *flags], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def wait_until(self, met, seconds=120):
        """Wait for what comes before the sweep's end."""
        until = time.monotonic() + seconds
        while not met():
            assert self.process.poll() is None and time.monotonic() < until
            time.sleep(0.01)

    def workers(self):
        """The processes that run rows."""
        children = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        with open(children) as file:
            found = [int(pid) for pid in file.read().split()]
        return [pid for pid in found if "spawn_main" in _command(pid)]

    def end(self):
        """What it said; for a sweep that is to end by itself."""
        said, _ = self.process.communicate(timeout=300)
        assert "Traceback" not in said, said
        return said


def steps(workdir):
    """The lines that the rows have logged so far: 15 of each in the end."""
    logs = sorted(workdir.glob("rows/*/seed-0/metrics.jsonl"))
    return [line["step"] for log in logs for line in read_lines(log)]


def _command(pid):
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read()
    except OSError:
        return ""


def test_a_stop_is_told_though_another_command_failed(tmp_path, monkeypatch):
    file = write(tmp_path, more=FAULTS)
    _, said = run(file, only="user")
    assert "failed: user" in said and "stopped" not in said
    monkeypatch.setattr(pool, "perform", lambda *_: Outcome("stopped"))
    complete, said = run(file, only="[abc]")
    assert not complete and "stopped: 3 of 3 runs are left; run it again" in said


@pytest.mark.slow
def test_control_c_stops_measurements_without_calling_them_failed(tmp_path):
    rows = '[("a", {"x": 1}), ("slow", {"x": 2, "wait": 60.0}), ("b", {"x": 3})]'
    file = write(tmp_path, more=f"ROWS, CLAIMS = {rows}, []")
    sweep = Sweep(file, tmp_path / "out")
    sweep.wait_until(lambda: len(calls(file)) == 2)
    os.killpg(sweep.process.pid, signal.SIGINT)
    said = sweep.end()
    assert sweep.process.returncode == 1 and "failed" not in said, said
    assert "1/3 slow, seed 0: stopped" in said and "stopped: 2 of 3 runs are left" in said
    (log,) = tmp_path.glob("out/rows/slow-*/seed-0/log.txt")
    assert "Traceback" not in log.read_text()


KINDS = ("kill sweep", "kill worker", "kill both", "term sweep", "term worker", "control-c")


def strike(sweep, kind):
    """Send a signal to a sweep, to its worker or to both; the workers that there were."""
    workers = sweep.workers()
    number = signal.SIGKILL if kind.startswith("kill") else signal.SIGTERM
    if kind == "control-c":
        os.killpg(sweep.process.pid, signal.SIGINT)
    if kind.endswith(("sweep", "both")):
        sweep.process.send_signal(number)
    if kind.endswith(("worker", "both")):
        for pid in workers:
            os.kill(pid, number)
    return workers


def saved(workdir):
    """The newest checkpoint of each row."""
    found = {}
    for path in workdir.glob("rows/*/seed-0/checkpoints/*"):
        if path.name.isdigit():
            row = path.parents[1]
            found[row] = max(found.get(row, 0), int(path.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_moments_nothing_is_repeated_and_nothing_lost(tmp_path, seed):
    rows = (
        "[*ROWS, ('linear', {'attention': 'linear'}), ('local', {'attention': 'local(window=4)'})]"
    )
    file = write(tmp_path, TRAINED, f"ROWS = {rows}")
    alone = Sweep(file, tmp_path / "alone")
    assert "4 runs" in alone.end() and alone.process.returncode == 0

    chance, place = random.Random(seed), tmp_path / "out"
    kinds, workers, finished, told = list(KINDS), [], {}, []
    chance.shuffle(kinds)
    for kind in kinds:
        sweep, done = Sweep(file, place), len(steps(place))
        more = chance.randint(0, 6)
        sweep.wait_until(lambda: len(steps(place)) >= done + more and sweep.workers())  # noqa: B023
        time.sleep(chance.random() * (4 if more == 0 else 0.2))
        before = saved(place)
        told.append(f"{kind} after {more} lines more than {done}")
        workers += strike(sweep, kind)
        if kind.endswith("worker"):  # the sweep takes the next row
            sweep.wait_until(lambda: len(steps(place)) > done + more)  # noqa: B023
            workers += strike(sweep, "kill both")
        if kind != "kill sweep":  # after which the next begins while its worker still saves
            said, _ = sweep.process.communicate(timeout=120)
            assert "Traceback" not in said, said
        for record in place.glob("rows/*/seed-0/row.json"):
            finished.setdefault(record, record.stat().st_mtime_ns)
        for row, step in before.items():
            assert saved(place)[row] >= step, told
    print(*told, sep="\n")
    last = Sweep(file, place)
    assert "4 runs" in last.end() and last.process.returncode == 0, told
    for record, stamp in finished.items():
        assert record.stat().st_mtime_ns == stamp, "a finished row was run again"
    for row in place.glob("rows/*"):
        assert_same_run(row / "seed-0", tmp_path / "alone" / "rows" / row.name / "seed-0")
    mine, its = (
        [
            (r["label"], r["seed"], r["metrics"]["accuracy"], r["metrics"]["loss"])
            for r in records(p)
        ]
        for p in (place, tmp_path / "alone")
    )
    assert mine == its and len(mine) == 4
    assert not [pid for pid in workers if "spawn_main" in _command(pid)], "a worker is left"
