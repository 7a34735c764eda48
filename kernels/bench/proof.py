"""Which ops a device's kernels are proven for, from the rows of `kernels.bench`."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from kernels import shapes
from kernels.dispatch import TABLE
from kernels.shapes import Case

SAME = {
    "linear_attention": ("causal_linear_attention",),
    "favor_attention": ("causal_favor_attention",),
}
"""Ops that run the kernels of another, from a state on."""


def judge(cases: Sequence[Case], rows: Sequence[dict[str, Any]]) -> dict[str, dict | str]:
    """By op: the least and the most times over XLA of its kernel, or what speaks against it.

    A kernel is proven that was right and faster in every case and pass. Where the op refuses a case
    it is not asked for; where XLA has no time, memory or patience ended there, it has nothing to
    beat.
    """
    verdicts: dict[str, dict | str] = {}
    for op in dict.fromkeys(case.op for case in cases):
        mine = [case for case in cases if case.op == op]
        verdicts |= dict.fromkeys((op, *SAME.get(op, ())), _verdict(mine, rows))
    return verdicts


def _verdict(cases: Sequence[Case], rows: Sequence[dict[str, Any]]) -> dict | str:
    ratios = []
    for case in cases:
        kernel, xla = (
            [row for row in rows if (row["case"], row["by"]) == (case.name, by)]
            for by in ("pallas", "xla")
        )
        if not kernel or not xla:
            return f"{case.name}: not run yet"
        for row in kernel:
            if "skipped" in row and not row.get("refused"):
                return f"{case.name}: {row['skipped']}"
        times = {row["pass"]: row["ms"] for row in xla if "ms" in row}
        for row in kernel:
            if row.get("pass") in times:
                ratios.append(times[row["pass"]] / row["ms"])
                if ratios[-1] <= 1:
                    return f"{case.name}, {row['pass']}: {ratios[-1]:.2f} times as fast as XLA"
    if not ratios:
        return "nothing to compare"
    return {"least": round(min(ratios), 2), "most": round(max(ratios), 2)}


def prove(
    ops: Collection[str], kept: dict[str, Any], *, table: Path = TABLE,
    cases: Sequence[Case] = shapes.MEASURED,
) -> None:  # fmt: skip
    """Write which of the ops are proven on the device of `kept` to the table, print why others are
    not.

    An op is judged by all of `cases` that are its own, however few of them were asked for.
    """
    cases = [case for case in cases if case.op in ops]
    known = json.loads(table.read_text()) if table.exists() else {}
    device = known.setdefault(kept["device"], {})
    found = {"commit": kept["commit"], "jax": kept["versions"]["jax"]}
    for op, verdict in judge(cases, kept["rows"]).items():
        device.pop(op, None)
        if isinstance(verdict, dict):
            device[op] = verdict | found
            print(f"proven: {op}: {verdict['least']} to {verdict['most']} times as fast as XLA")
        else:
            print(f"not proven: {op}: {verdict}")
    known = {name: ops for name, ops in known.items() if ops}
    table.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
