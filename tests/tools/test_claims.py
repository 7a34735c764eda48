"""The predicates of claims, on numbers that are written down here."""

import pytest

from efficient_attn.tools.ablate.claims import above, below, not_below, rises, under
from efficient_attn.tools.ablate.results import Missing, Record, Results

HEIGHTS = {("low", 1): 1, ("low", 2): 2, ("high", 1): 3, ("high", 2): 2, ("high", 4): 5}
ROWS = [(f"{kind} {x}", {"kind": kind, "x": x}) for kind, x in HEIGHTS]
LOW, HIGH = {"kind": "low"}, {"kind": "high"}


def found(**changes):
    """Results whose y is the height, or what `changes` says of a row."""
    heights = {f"{kind} {x}": y for (kind, x), y in HEIGHTS.items()} | changes
    rows = dict(ROWS)
    return Results(
        ROWS,
        [
            Record(label, 0, rows[label], {"y": y}, 1.0, "2026-11-22", None, {})
            for label, y in heights.items()
            if y is not None
        ],
    )


@pytest.mark.parametrize(
    ("claim", "holds"),
    [
        (below("y", "low 1", "low 2", "high 1"), True),
        (below("y", "low 1", "low 2", "high 2"), False),
        (above("y", "high 4", "high 1", "low 2"), True),
        (above("y", "high 4", "low 2", "high 2"), False),
        (not_below("y", "high 4", "low 2", "high 2"), True),
        (not_below("y", "low 1", "low 2"), False),
        (rises("x", "y", LOW), True),
        (rises("x", "y", LOW, HIGH), False),
        (under("x", "y", LOW, HIGH), False),
        (under("x", "y", HIGH, LOW), False),
    ],
)
def test_a_claim_is_strict_but_for_not_below(claim, holds):
    assert claim(found()) is holds


def test_a_curve_is_under_another_where_both_have_rows():
    assert under("x", "y", LOW, HIGH)(found(**{"high 2": 2.5, "high 4": -9}))
    with pytest.raises(Missing, match="no x in common"):
        under("x", "y", LOW, {"kind": "none"})(found())


def test_a_row_without_a_result_is_missing():
    lacking = found(**{"low 2": None})
    for claim in (below("y", "low 1", "low 2"), rises("x", "y", LOW), under("x", "y", LOW, HIGH)):
        with pytest.raises(Missing, match="low 2 has no y"):
            claim(lacking)
