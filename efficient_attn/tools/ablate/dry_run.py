"""What a sweep will cost, before it is run, and which rows it may not run."""

import time
from collections.abc import Sequence

from efficient_attn.config import require
from efficient_attn.errors import UserError
from efficient_attn.tools.ablate.results import Place
from efficient_attn.tools.ablate.sweep import Cost, Sweep
from efficient_attn.tools.table import row

SHARE = 0.25
"""Of the speed of a large matrix product that trainings are taken to reach."""


def weigh(sweep: Sweep, chosen: Sequence[int]) -> tuple[dict[str, Cost | None], dict[str, str]]:
    """What rows cost, and why some may not be run: they cannot be built, or are of another size.

    Raises:
        UserError: it is the first row that cannot be built, whose parameters others are to equal.
    """
    costs: dict[str, Cost | None] = {}
    refused = {}
    most, first = sweep.equal_parameters, sweep.rows[0][0]
    for index in sorted({0, *chosen} if most is not None else chosen):
        label, overrides = sweep.rows[index]
        try:
            costs[label] = sweep.runner.cost(overrides)
        except UserError as error:
            costs[label], refused[label] = None, str(error)
    if most is not None:
        require(first not in refused, f"row {first}, whose size others are to have: {refused}")
        for label, cost in costs.items():
            why = _another_size(cost, costs[first], most)
            if why:
                refused[label] = f"{why} of {first}; {100 * most:.0f} % are allowed"
    return costs, refused


def _another_size(cost: Cost | None, first: Cost | None, most: float) -> str:
    """How a row's parameters differ from the first row's, if by more than a share of `most`."""
    off = cost.parameters / first.parameters - 1 if cost and first else 0.0
    if not cost or not first or abs(off) <= most:
        return ""
    return (
        f"its {cost.parameters:,} parameters differ by {100 * off:+.0f} % from the "
        f"{first.parameters:,}"
    )


def estimate(place: Place, chosen: Sequence[int], seeds: int) -> str:
    """Rows, parameters, floating-point operations and time, as a Markdown table.

    Times are those of finished runs of this directory by their operations, and where none is
    finished, of the operations at a quarter of this machine's speed in matrix products.
    """
    rows = [place.sweep.rows[index] for index in chosen]
    costs, refused = weigh(place.sweep, chosen)
    done = {
        label: [r for seed in range(seeds) if (r := place.record((label, overrides), seed))]
        for label, overrides in rows
    }
    known = [(cost, record) for label, cost in costs.items() if cost for record in done[label]]
    spent = sum(record.seconds for _, record in known)
    speed = sum(2 * cost.multiply_adds for cost, _ in known) / spent if spent else None
    how = "by finished runs" if speed else "a guess from this machine's matrix products"
    lines = [row(["row", "parameters", "operations", "time"]), row(["---", "--:", "--:", "--:"])]
    total, unknown = 0.0, 0
    for label, _ in rows:
        cost, left = costs[label], seeds - len(done[label])
        if left == 0:
            text = "finished"
        elif label in refused:
            text = f"will not run: {refused[label]}"
        elif cost is None:
            text, unknown = "unknown", unknown + 1
        else:
            speed = speed or SHARE * _speed()
            seconds = left * 2 * cost.multiply_adds / speed
            text, total = _clock(seconds), total + seconds
        shape = [f"{cost.parameters:,}", f"{2 * cost.multiply_adds:.2g}"] if cost else ["", ""]
        lines.append(row([f"`{label}`", *shape, text]))
    if all(len(found) == seeds for found in done.values()):
        said = "all finished"
    elif unknown == len(rows):
        said = "times are not known before"
    else:
        said = f"{_clock(total)} in one process, {how}"
        said += f", and {unknown} rows of unknown time" * (unknown > 0)
    return "\n".join([*lines, "", f"{len(rows)} rows, {seeds} seed{'s' * (seeds > 1)}: {said}"])


def _speed() -> float:
    """Operations per second of a float32 matrix product of 1,024 x 1,024."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((1024, 1024))
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    turns, began = 8, time.perf_counter()
    for _ in range(turns):
        x = product(x, x) / 1024
    x.block_until_ready()
    return turns * 2 * 1024**3 / (time.perf_counter() - began)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
