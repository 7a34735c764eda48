"""Gather the ablations that were run into docs/results, with an index.

    python -m efficient_attn.tools.report [DIR...] [--out=docs/results]

Each directory of `efficient_attn.tools.ablate` below a DIR becomes a page NAME.md beside its
picture NAME.svg, its records NAME.jsonl and what it is, NAME.json; NAME is the directory's name,
which is ABLATION-SCALE unless --workdir said otherwise. A page gathered before is replaced.
index.md lists all pages, and every ablation of configs/ablations that has none. Without a DIR the
index is made anew. reproduce.md, beside the directory of results, has every ablation's docstring.
"""

import argparse
import ast
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficient_attn.config import require
from efficient_attn.errors import UserError
from efficient_attn.tools.ablate.load import HERE
from efficient_attn.tools.ablate.results import Record, read_records
from efficient_attn.tools.table import row
from efficient_attn.train.flags import run
from efficient_attn.train.workdir import read_json

OUT = Path("docs/results")
HEAD = ["ablation", "paper", "scale", "rows", "runs", "claims held", "date", "commit", "device"]
INDEX = """# Results

What ablations gave here, gathered by `python -m efficient_attn.tools.report`; nothing is filled in
by hand. *rows*: those with a result, of all. *runs*: a run is a row with a seed. *claims held*: of
the paper's claims, those that hold on our numbers; a claim is judged only where its rows have
results, and never at scale `smoke`. [How to reproduce](../reproduce.md) has what each costs.
"""
REPRODUCE = """# Reproduce a table

One command runs a paper's table or figure again, and writes the table and the picture with the
paper's numbers beside ours. `--scale=smoke` shows in seconds that it runs, `small` is for two CPU
cores, `paper` has the paper's sizes and wants an accelerator. `--dry_run` tells rows, parameters,
operations and time before anything is run; `--seeds=3` gives deviations; `--only='linear*'` takes
some of the rows. The same command may be killed and repeated: what is finished is not run again.
`--adopt docs/results/NAME-small.jsonl` takes what stands in these results for finished: with more
seeds only those are run. So are rows taken together that several machines ran, each its own by
`--only`: `--adopt A/results.jsonl B/results.jsonl`.

    python -m efficient_attn.tools.ablate --config=configs/ablations/NAME.py --scale=small --seeds=3
    python -m efficient_attn.tools.report runs/ablations     # gathers all into docs/results

Below is what each config says of itself: paper and table, command, cost, what to expect.
`python -m efficient_attn.tools.report` makes this page.
"""


@dataclass(frozen=True)
class Gathered:
    """A sweep that has ended: what sweep.json and results.jsonl say."""

    name: str
    about: Mapping[str, Any]
    records: Sequence[Record]

    @property
    def ablation(self) -> str:
        """The name of its config."""
        return Path(self.about["spec"].partition(":")[0]).stem

    def cells(self) -> list[str]:
        """Its line of the index."""
        records, claims = self.records, self.about["claims"]
        ran = {record.label for record in records} & set(self.about["rows"])
        unjudged = sum(claim["holds"] is None for claim in claims)
        held = f"{sum(claim['holds'] is True for claim in claims)} of {len(claims)}"
        return [
            f"[{self.about['title']}]({self.name}.md)", self.about["source"], self.about["scale"],
            f"{len(ran)} of {len(self.about['rows'])}", str(len(records)),
            (held + f" ({unjudged} not judged)" * bool(unjudged)) if claims else "",
            _each(record.date[:10] for record in records),
            _each((record.commit or "none")[:12] for record in records),
            _each(f"{r.versions['devices']} x {r.versions['device']}" for r in records),
        ]  # fmt: skip


def _each(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def read(directory: Path) -> Gathered:
    """A sweep's directory, or a page of the results.

    Raises:
        UserError: its sweep has not ended, or a file is missing or damaged.
    """
    return _read(directory.name, directory / "sweep.json", directory / "results.jsonl")


def _read(name: str, about: Path, lines: Path) -> Gathered:
    said = read_json(about)
    try:
        if "claims" not in said:
            raise UserError(
                f"{about.parent}: the sweep has not ended; `{said['command']}` goes on with it"
            )
        gathered = Gathered(name, said, read_records(lines))
        gathered.cells()
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{about.parent} is damaged ({type(error).__name__}: {error}); run its sweep again"
        ) from None
    return gathered


def sweeps(roots: Sequence[Path]) -> list[Path]:
    """The directories below with a sweep.json, each once, by name.

    Raises:
        UserError: a root that is no directory or has none; two of one name.
    """
    found: dict[str, Path] = {}
    for root in roots:
        here = sorted(path.parent.resolve() for path in root.rglob("sweep.json"))
        require(bool(here), f"there is no sweep (a sweep.json) below {str(root)!r}")
        for path in here:
            other = found.setdefault(path.name, path)
            require(other == path, f"{other} and {path} have one name; rename a directory")
    return [found[name] for name in sorted(found)]


def gather(directory: Path, out: Path) -> None:
    """Copy a sweep as a page: table.md, its picture, its records, sweep.json.

    Raises:
        UserError: the sweep has not ended, or a file is missing or damaged.
    """
    found = read(directory)
    table, picture = directory / "table.md", directory / "figure.svg"
    require(table.is_file(), f"{directory} has no table.md; run its sweep again")
    text = table.read_text().replace("(figure.svg)", f"({found.name}.svg)")
    text = re.sub(r"/\S+/(rows/\S+/log\.txt)", r"\1", text).rstrip("\n")
    files = f"Records: [{found.name}.jsonl]({found.name}.jsonl). [All results](index.md)."
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{found.name}.md").write_text(f"{text}\n\n{files}\n")
    shutil.copyfile(directory / "results.jsonl", out / f"{found.name}.jsonl")
    shutil.copyfile(directory / "sweep.json", out / f"{found.name}.json")
    (out / f"{found.name}.svg").unlink(missing_ok=True)
    if picture.is_file():
        shutil.copyfile(picture, out / f"{found.name}.svg")


def index(out: Path) -> str:
    """index.md: a line for each page in `out`, and for each ablation that has none.

    Raises:
        UserError: a page is damaged.
    """
    pages = [
        _read(path.stem, path, path.with_suffix(".jsonl")) for path in sorted(out.glob("*.json"))
    ]
    lines = [INDEX, row(HEAD), row(["---"] * 3 + ["--:"] * 3 + ["---"] * 3)]
    lines += [row(page.cells()) for page in pages]
    have = {page.ablation for page in pages}
    for path in sorted(HERE.glob("*.py")):
        if path.stem not in have:
            about = (ast.get_docstring(ast.parse(path.read_text())) or path.stem).splitlines()[0]
            lines.append(row([about, "", "not run", *[""] * (len(HEAD) - 3)]))
    commands = [f"    {page.about['command']}" for page in pages]
    if commands:
        lines += ["", "The commands, in the table's order:", "", *commands]
    return "\n".join(lines) + "\n"


def reproduce(out: Path) -> str:
    """reproduce.md: the docstring of every ablation, with links to its pages in `out`."""
    pages: dict[str, list[str]] = {}
    for path in sorted(out.glob("*.json")):
        name = Path(read_json(path)["spec"].partition(":")[0]).stem
        pages.setdefault(name, []).append(f"[{path.stem}]({out.name}/{path.stem}.md)")
    lines = [REPRODUCE]
    for path in sorted(HERE.glob("*.py")):
        first, _, rest = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")
        lines += [f"## {path.stem}", "", first, "", "```text", rest.strip("\n"), "```", ""]
        lines += [f"Results: {', '.join(pages.get(path.stem, ['not run']))}.", ""]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Gather, and say what could not be gathered."""
    parser = argparse.ArgumentParser(
        prog="report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directories", nargs="*", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(argv[1:])
    left_out = 0
    for directory in sweeps(given.directories):
        try:
            gather(directory, given.out)
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
            left_out += 1
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "index.md").write_text(index(given.out))
    (given.out.parent / "reproduce.md").write_text(reproduce(given.out))
    print(f"{len(sweeps(given.directories)) - left_out} gathered: {given.out / 'index.md'}")
    if left_out:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
