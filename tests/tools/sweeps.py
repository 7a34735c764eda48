"""Sweeps for tests of `ablate`: their files, and the way to run them in this process."""

import io
import json
from pathlib import Path

from rich.console import Console

from efficient_attn.tools.ablate.run import Asked, ablate

MEASURED = '''
"""A sweep that measures nothing: y = slope * x + seed."""

import os
import signal
import time
from pathlib import Path

from efficient_attn.errors import UserError
from efficient_attn.tools.ablate import Claim, Column, Measuring, Panel, Sweep

HERE = Path(__file__).parent


def line(*, seed, x, slope=2, wait=0.0, fault=""):
    """y and its curve; writes down that it was called."""
    with (HERE / "calls.txt").open("a") as calls:
        calls.write(f"{x} {slope} {seed}\\n")
    print("said by the row")
    time.sleep(wait)
    if (HERE / "mended").exists():
        fault = ""
    match fault:
        case "user":
            raise UserError("x=3 is too much; lower it")
        case "bug":
            raise ZeroDivisionError("divided by nothing")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(7)
    return {"y": slope * x + seed, "twice": 2.0 * x, "curve": [x, x + 1]}


def rows():
    return [(f"x={x}, slope={s}", {"x": x, "slope": s}) for s in (1, 2) for x in (1, 2)]


def get_sweep(scale, argument=""):
    return Sweep(
        title="Lines",
        source="Nobody, arXiv 0000.00000, table 1",
        rows=ROWS or rows(),
        runner=Measuring(line, {"slope": 2}),
        columns=[Column("y", "height %", 100), Column("twice", "twice")],
        published={"x=1, slope=2": {"y": 1.5}} if not ROWS else {},
        claims=CLAIMS,
        grid=("slope", "x") if not ROWS else None,
        note="A note.",
    )


ROWS = []
CLAIMS = [
    Claim("more is higher", lambda r: r.mean("x=2, slope=2", "y") > r.mean("x=1, slope=2", "y")),
    Claim("one is highest", lambda r: r.mean("x=1, slope=1", "y") > r.mean("x=2, slope=2", "y")),
    Claim("the third", lambda r: r.mean("x=1, slope=1", "z") > 0),
]
'''

TRAINED = '''
"""A sweep of trainings of seconds."""

from configs.digits import get_config
from efficient_attn.tools.ablate import Column, Sweep, Training

SIZES = {"patch": 4, "width": 16, "depth": 1, "heads": 2}


def get_sweep(scale):
    config = get_config()
    config.model.update(SIZES)
    config.train.update({"steps": STEPS, "log_every": 1, "eval_every": 4, "checkpoint_every": 2})
    config.optimizer.warmup = 2
    return Sweep(
        title="Digits",
        source="Nobody, arXiv 0000.00000, table 2",
        rows=ROWS,
        runner=Training(config),
        columns=[Column("accuracy", "accuracy %", 100), Column("parameters", "parameters")],
        equal_parameters=EQUAL,
    )


STEPS, EQUAL = 12, None
ROWS = [
    ("softmax", {"attention": "softmax"}),
    ("performer", {"attention": "performer(features=8, redraw=3)"}),
]
'''


def write(path: Path, text: str = MEASURED, more: str = "") -> Path:
    """A sweep's file, with lines at its end that change what stands above."""
    path.mkdir(parents=True, exist_ok=True)
    file = path / "lines.py"
    file.write_text(f"{text}\n{more}\n")
    return file


def run(file: Path, **asked) -> tuple[bool, str]:
    """Whether every row has a result, and what was said; in this process unless told otherwise."""
    options = {"scale": "small", "seeds": 1, "only": "*", "processes": 0, "dry_run": False}
    options |= {"spec": str(file), "workdir": file.parent / "out", "command": "ablate --all"}
    terminal = io.StringIO()
    console = Console(file=terminal, width=200, soft_wrap=True)
    return ablate(Asked(**options | asked), console), terminal.getvalue()


def records(place: Path) -> list[dict]:
    return [json.loads(line) for line in (place / "results.jsonl").read_text().splitlines()]


def calls(file: Path) -> list[str]:
    """The measurements that were begun, as "x slope seed"."""
    path = file.parent / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []
