"""What a sweep will cost, before it is run."""

import time
from collections.abc import Sequence

from efficient_attn.tools.ablate.results import Place
from efficient_attn.tools.table import row

SHARE = 0.25
"""Of the speed of a large matrix product that trainings are taken to reach."""


def estimate(place: Place, chosen: Sequence[int], seeds: int) -> str:
    """Rows, parameters, floating-point operations and time, as a Markdown table.

    Times are those of finished rows of this directory by their operations, and where none is
    finished, of the operations at a quarter of this machine's speed in matrix products.
    """
    rows = [place.sweep.rows[index] for index in chosen]
    costs = {label: place.sweep.runner.cost(overrides) for label, overrides in rows}
    records = {label: place.record((label, overrides), 0) for label, overrides in rows}
    known = [(costs[label], record) for label, record in records.items() if record]
    spent = sum(record.seconds for cost, record in known if cost)
    operations = sum(2 * cost.multiply_adds for cost, record in known if cost)
    measured = operations > 0
    speed = operations / spent if measured else None
    lines = [row(["row", "parameters", "operations", "time"]), row(["---", "--:", "--:", "--:"])]
    total = 0.0
    for label, _ in rows:
        cost, record = costs[label], records[label]
        if record is not None:
            seconds, text = 0.0, "finished"
        elif cost is None:
            seconds, text = 0.0, "unknown"
        else:
            speed = speed or SHARE * _speed()
            seconds = seeds * 2 * cost.multiply_adds / speed
            text = _clock(seconds)
        total += seconds
        shape = [f"{cost.parameters:,}", f"{2 * cost.multiply_adds:.2g}"] if cost else ["", ""]
        lines.append(row([f"`{label}`", *shape, text]))
    how = "finished rows" if measured else "a guess from this machine's matrix products"
    return "\n".join([*lines, "", f"{len(rows)} rows, {seeds} seed(s), {_clock(total)}: {how}"])


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
