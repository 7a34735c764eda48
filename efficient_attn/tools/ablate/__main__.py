"""Run a paper's ablation, and write its table and picture with the paper's numbers beside ours.

    python -m efficient_attn.tools.ablate --config=configs/ablations/NAME.py[:ARGUMENT]
        [--scale=smoke|small|paper] [--seeds=N] [--only=PATTERN] [--workdir=DIR]
        [--processes=N] [--dry_run] [--adopt FILE ...]

Finished rows are not run again, and a training that was stopped goes on: the same command may be
killed and repeated at will. A row that fails is told, and the others go on. With
--adopt docs/results/NAME-SCALE.jsonl rows published there, of the same label and overrides, count
as finished; whether all else in their config was as it is now, their commit tells. So do those of
other work directories, --adopt A/results.jsonl B/results.jsonl, where several machines each took
some rows by --only.
"""

import argparse
import ast
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from efficient_attn.config import require
from efficient_attn.errors import UserError, unknown
from efficient_attn.tools.ablate.load import HERE
from efficient_attn.tools.ablate.run import Asked, ablate
from efficient_attn.tools.ablate.sweep import SCALES
from efficient_attn.train.flags import run


def listing() -> str:
    """The ablations there are, by the first lines of their docstrings."""
    lines = ["ablations:"]
    for path in sorted(HERE.glob("*.py")):
        about = ast.get_docstring(ast.parse(path.read_text())) or ""
        lines.append(f"  {path}: {about.partition(chr(10))[0]}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="ablate", description=__doc__, epilog=listing(),
        formatter_class=argparse.RawDescriptionHelpFormatter, exit_on_error=False,
    )  # fmt: skip
    parser.add_argument("--config", help="configs/ablations/NAME.py, or NAME.py:ARGUMENT")
    parser.add_argument("--scale", default="small", help="smoke, small (the default) or paper")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each row")
    parser.add_argument("--only", default="*", help="rows whose label matches, such as 'linear*'")
    parser.add_argument("--workdir", help="runs/ablations/NAME-SCALE unless given")
    parser.add_argument("--processes", type=int, help="rows at once: one for each GPU, or 1")
    parser.add_argument("--dry_run", action="store_true", help="rows and costs; nothing is run")
    parser.add_argument(
        "--adopt", type=Path, nargs="+", default=(), metavar="FILE",
        help="records of the same sweep, not to be run again",
    )  # fmt: skip
    given, strange = _parse(parser, argv[1:])
    require(not strange, f"unknown flag {' '.join(strange)}; see --help")
    require(bool(given.config), f"name an ablation with --config=FILE\n{listing()}")
    if given.scale not in SCALES:
        raise unknown("scale", given.scale, SCALES)
    require(given.seeds > 0, f"--seeds must be at least 1, not {given.seeds}")
    processes = given.processes
    require(processes is None or processes >= 0, f"--processes={processes} must be 0 or more")
    name = Path(given.config.partition(":")[0]).stem
    asked = Asked(
        spec=given.config, scale=given.scale, seeds=given.seeds, only=given.only,
        workdir=Path(given.workdir or f"runs/ablations/{name}-{given.scale}"),
        processes=processes, dry_run=given.dry_run, adopt=tuple(given.adopt),
        command="python -m efficient_attn.tools.ablate " + shlex.join(argv[1:]),
    )  # fmt: skip
    if processes == 0:
        from efficient_attn.train.compilation import prepare

        prepare()
    if not ablate(asked):
        sys.exit(1)


def _parse(parser: argparse.ArgumentParser, words: Sequence[str]):
    try:
        return parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None


if __name__ == "__main__":
    run(main)
