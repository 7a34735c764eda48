"""table.md of a sweep: ours beside the paper's, its claims, and what was not run."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from efficient_attn.tools.ablate.results import Missing, Results
from efficient_attn.tools.ablate.sweep import Claim, Column, Number, Scale, Sweep
from efficient_attn.tools.table import row

ABSENT = "not run"


class Failure(NamedTuple):
    """Why a row has no result: its run failed, or it was refused before any run."""

    label: str
    kind: Literal["failed", "refused"]
    why: str


class Verdict(NamedTuple):
    """Whether a claim holds; None with the reason why it was not judged."""

    claim: Claim
    holds: bool | None
    why: str = ""

    def __str__(self) -> str:
        said = {True: "holds", False: "does not hold", None: f"not judged: {self.why}"}
        return said[self.holds]


def judge(sweep: Sweep, results: Results, scale: Scale) -> list[Verdict]:
    """Every claim of the paper on our numbers."""
    return [_judge(claim, results, scale) for claim in sweep.claims]


def _judge(claim: Claim, results: Results, scale: Scale) -> Verdict:
    if scale == "smoke":
        return Verdict(claim, None, "smoke only shows that it runs")
    try:
        return Verdict(claim, bool(claim.holds(results)))
    except Missing as missing:
        return Verdict(claim, None, str(missing.args[0]))


def render(
    sweep: Sweep,
    results: Results,
    verdicts: Sequence[Verdict],
    *,
    scale: Scale,
    command: str,
    failures: Mapping[str, Failure],
) -> str:
    """The whole of table.md; the verdicts are those of `judge`, the failures by the runs' names."""
    kinds = {failure.label: failure.kind for failure in failures.values()}
    lines = [f"# {sweep.title}", "", f"{sweep.source}. Scale: {scale}.", "", f"    {command}", ""]
    if sweep.note:
        lines += [sweep.note, ""]
    if sweep.panels:
        lines += [f"![{sweep.title}](figure.svg)", ""]
    lines += [_rows(sweep, results, kinds), ""]
    if sweep.grid:
        lines += [_grid(sweep, results, kinds), ""]
    if verdicts:
        lines += [row(["the paper's claim", "ours"]), row(["---", "---"])]
        lines += [row([verdict.claim.text, str(verdict)]) for verdict in verdicts]
        lines.append("")
    for kind in dict.fromkeys(kinds.values()):
        found = {name: failure.why for name, failure in failures.items() if failure.kind == kind}
        lines += [f"{kind.capitalize()}:", ""]
        lines += [*(f"- `{name}`: {why}" for name, why in found.items()), ""]
    lines.append(_origin(results))
    return "\n".join(lines) + "\n"


def _rows(sweep: Sweep, results: Results, kinds: Mapping[str, str]) -> str:
    """One line for each row; a column with published numbers takes three."""
    head, rule = ["row"], ["---"]
    told = {c.metric for c in sweep.columns if any(c.metric in p for p in sweep.published.values())}
    for column in sweep.columns:
        wide = column.metric in told
        head += [column.heading, *(["paper", "difference"] if wide else [])]
        rule += ["--:"] * (3 if wide else 1)
    lines = [row(head), row(rule)]
    for label, _ in sweep.rows:
        cells = [f"`{label}`"]
        for column in sweep.columns:
            published = sweep.published.get(label, {}).get(column.metric)
            found = _cells(results, label, column, published, kinds)
            cells += found[: 3 if column.metric in told else 1]
        lines.append(row(cells))
    return "\n".join(lines)


def _cells(
    results: Results,
    label: str,
    column: Column,
    published: Number | None,
    kinds: Mapping[str, str],
) -> tuple[str, str, str]:
    """Ours with its deviation, or what became of the row; the paper's; the difference."""
    theirs = "" if published is None else column.show(published)
    if not results.values(label, column.metric):
        ran = any(record.label == label for record in results.records)
        return ("" if ran else kinds.get(label, ABSENT)), theirs, ""
    mean, deviation = results.mean(label, column.metric), results.deviation(label, column.metric)
    ours = column.show(mean)
    if deviation:  # 0 of what is counted, not measured
        ours += f" ± {Column('', '', column.factor, 2).show(deviation)}"
    if published is None:
        return ours, "", ""
    difference = column.show(mean - published)
    return ours, theirs, difference if difference.startswith("-") else f"+{difference}"


def _grid(sweep: Sweep, results: Results, kinds: Mapping[str, str]) -> str:
    """The first column's metric over the two options of `sweep.grid`; the paper's in brackets."""
    assert sweep.grid is not None
    (down, across), column, options = sweep.grid, sweep.columns[0], dict(sweep.rows)
    lefts = _in_order([o[down] for o in options.values() if down in o and across in o])
    tops = _in_order([o[across] for o in options.values() if down in o and across in o])
    lines = [row([f"{column.heading} by {down} and {across}", *map(str, tops)])]
    lines.append(row(["---", *["--:"] * len(tops)]))
    for left in lefts:
        cells = []
        for top in tops:
            labels = results.labels({down: left, across: top})
            published = sweep.published.get(labels[0], {}).get(column.metric) if labels else None
            ours = theirs = ""
            if labels:
                ours, theirs, _ = _cells(results, labels[0], column, published, kinds)
            cells.append(f"{ours} ({theirs})" if theirs else ours)
        lines.append(row([str(left), *cells]))
    return "\n".join(lines)


def _in_order(values: Sequence) -> list:
    return list(dict.fromkeys(values))


def short(commit: str | None) -> str:
    """Twelve digits of a commit, and whether files differed from it."""
    digits, plus, changes = (commit or "no commit").partition("+")
    return digits[:12] + plus + changes


def _origin(results: Results) -> str:
    """Where the numbers come from: dates, commits, devices, seeds."""
    records = results.records
    if not records:
        return "No row has been run."
    dates = sorted(record.date[:10] for record in records)
    days = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    commits = _in_order([short(record.commit) for record in records])
    devices = _in_order(
        [
            f"{r.versions['devices']} x {r.versions['device']}, jax {r.versions['jax']}"
            for r in records
        ]
    )
    counts = Counter(record.label for record in records).values()
    few, many = min(counts), max(counts)
    seeds = f"{few} to {many} seeds a row" if few < many else f"{many} seed{'s' * (many > 1)}"
    seconds = sum(record.seconds for record in records)
    return (
        f"{days}; commit {', '.join(commits)}; {'; '.join(devices)}; "
        f"{seeds}; {len(records)} runs, {seconds:,.0f} s in all."
    )
