"""What the figures of a compiled case may be, at most: budget.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernels.static.reports import Report

BUDGET = Path(__file__).parent / "budget.json"
LEEWAY = {"cycles": 1.02, "issued": 1.02, "outside": 1.02}
"""How far above its budget a figure may be, as a factor; other figures not at all."""


def read() -> dict[str, Any]:
    """Target -> version of jax -> case and pass -> Report."""
    return json.loads(BUDGET.read_text()) if BUDGET.exists() else {}


def keep(name: str, version: str, key: str, report: Report) -> None:
    """Put the figures of a case and pass into the file."""
    kept = read()
    kept.setdefault(name, {}).setdefault(version, {})[key] = report
    BUDGET.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def complaints(key: str, said: Mapping[str, Any], budget: Mapping[str, Report] | None) -> list[str]:
    """What is wrong with a case, one sentence each; `budget` None has no figures to compare with.

    A spill or serialised wgmma is wrong whatever the budget says.
    """
    if "failed" in said:
        return [f"{key}: {said['failed']}"]
    known = None if budget is None else budget.get(key)
    if "refused" in said:
        return [f"{key}: was compiled before, now refused: {said['refused']}"] if known else []
    wrong = []
    for kernel, figures in said["kernels"].items():
        where = f"{key}: {kernel or 'the program'}"
        if figures.get("spill"):
            wrong.append(f"{where}: {figures['spill']} bytes spilled")
        if "C7511" in figures.get("warnings", ()):
            wrong.append(f"{where}: wgmma is serialised (ptxas C7511)")
        if known is None:
            continue
        for what, most in known.get(kernel, {}).items():
            value = figures.get(what)
            if (
                isinstance(most, int)
                and isinstance(value, int)
                and value > most * LEEWAY.get(what, 1)
            ):
                wrong.append(f"{where}: {what} {value:,d}, the budget is {most:,d}")
    if budget is not None and known is None:
        wrong.append(f"{key}: not in the budget; add it with --write")
    elif known is not None and (new := set(said["kernels"]) ^ set(known)):
        wrong.append(f"{key}: kernels other than in the budget: {', '.join(sorted(new))}")
    return wrong
