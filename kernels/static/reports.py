"""What ptxas, nvdisasm and libtpu leave in a folder about the kernels they compile, as numbers."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
Report = dict[str, Figures]
"""Figures of each kernel by its name; "" is the whole program."""


def read_ptxas(text: str) -> Figures:
    """Registers, spilled bytes and warnings out of what ptxas says about one kernel."""
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    registers = re.search(r"Used (\d+) registers", text)
    if spilled is None or registers is None:
        raise ValueError(f"this is not ptxas's report: {text[:200]!r}")
    return {
        "registers": int(registers[1]),
        "spill": int(spilled[1]) + int(spilled[2]),
        "warnings": sorted(set(re.findall(r"\((C\d+)\)", text))),
    }


def read_sass(text: str) -> Figures:
    """Tensor core instructions, and loads and stores of local memory, out of a disassembly."""
    count = lambda pattern: len(re.findall(pattern, text))  # noqa: E731
    return {"hgmma": count(r"\bHGMMA\b"), "local": count(r"\b(?:LDL|STL)\b")}


def read_launch(passes: Iterable[str]) -> int:
    """Bytes of shared memory that a kernel is launched with, out of the lines of Mosaic's passes.

    (Its *.resources.txt are numbered in another order than what is compiled.)
    """
    size = r"dynamic_shared_memory_size %c(\d+)_i32"
    sizes = (int(found[1]) for line in passes if (found := re.search(size, line)))
    return next(sizes, 0)


def read_profile(text: str) -> dict[str, int]:
    """Estimated cycles by the name of the HLO instruction, with those of its equals together."""
    pattern = r'hlo_op_name: "([^"]+)"\s+estimated_cycles: (\d+)(?:\s+num_equivalent_hlos: (\d+))?'
    return {name: int(cycles) * int(n or 1) for name, cycles, n in re.findall(pattern, text)}


def read_bundles(text: str) -> Figures:
    """Cycles in which a kernel issues VLIW bundles, every loop by its number of turns.

    endless: loops whose number of turns the listing does not say, counted once.
    """
    turns: list[int | None] = []
    inside: list[int] = []
    within: list[tuple[int, ...]] = []  # the loops around each bundle
    bundle = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?:?\s*:?\s*(>*)(.*)$", re.M)
    for label, deep, rest in bundle.findall(text):
        if rest.lstrip().startswith("{}") and not deep:  # an empty one is shown outside of its loop
            within.append(tuple(inside))
            continue
        del inside[len(deep) - (label == "LB") :]
        while len(inside) < len(deep):
            inside.append(len(turns))
            turns.append(None if label == "LB" else 1)  # a region that is no loop
        within.append(tuple(inside))
        test = re.search(r"scmp\.\S+ %\S+, (\d+) /\* loop exit test", rest)
        if test and inside:
            turns[inside[-1]] = int(test[1])
    issued = sum(math.prod(turns[loop] or 1 for loop in around) for around in within)
    return {"issued": issued, "endless": sum(t is None for t in turns)}


def read_calls(hlo: str) -> dict[str, int]:
    """Bytes of VMEM of each Pallas call by its name in the compiled HLO."""
    found = {}
    for line in hlo.splitlines():
        call = re.match(r"\s*(?:ROOT )?%?(\S+) = .*custom_call_target=\"tpu_custom_call\"", line)
        if call:
            used = re.search(r'"used_scoped_memory_configs":\[(.*?)\]', line)
            sizes = re.findall(r'"memory_space":"1"[^}]*"size":"(\d+)"', used[1]) if used else []
            found[call[1]] = sum(map(int, sizes))
    return found


def gpu_figures(folder: Path) -> Report:
    """Of each kernel that ptxas has reported on into the folder, with the disassembly beside."""
    report = {}
    for file in sorted(folder.glob("*.ptxas")):
        figures = read_ptxas(file.read_text())
        for sass in folder.glob(f"{file.stem}.sass*"):
            figures |= read_sass(sass.read_text())
        with (folder / f"{file.stem}.mlir-passes.log").open() as passes:
            figures["shared"] = read_launch(passes)
        report[file.stem] = figures
    return report


def tpu_figures(folder: Path, hlo: str) -> Report:
    """Estimated cycles or, where bundles were dumped instead, issued ones; "" sums up."""
    found: Report = {}
    for file in folder.glob("*static_llo_profile.textproto"):
        found |= {name: {"cycles": n} for name, n in read_profile(file.read_text()).items()}
    for file in folder.glob("*[0-9]-final_bundles.txt"):
        name = re.sub(r"^\d+-|-\d+-final_bundles$", "", file.stem)
        found[name] = read_bundles(file.read_text(errors="ignore"))
    calls = read_calls(hlo)
    report: Report = {name: {"vmem": vmem} | found.get(name, {}) for name, vmem in calls.items()}
    unit = "cycles" if any("cycles" in figures for figures in found.values()) else "issued"
    total = lambda names: sum(found[n].get(unit, 0) for n in names)  # noqa: E731
    report[""] = {unit: total(found), "outside": total(found.keys() - calls.keys())}
    return report
