"""What a network costs, by stage, and the published figures beside it."""

import json

import jax
import jax.numpy as jnp
import pytest

from efficient_attn import backbones
from efficient_attn.errors import UserError
from efficient_attn.tools import profile as tool
from efficient_attn.tools.count import by_scope, peak_bytes
from efficient_attn.tools.pareto import draw, front
from efficient_attn.tools.published import agrees, published, survey

A = jnp.ones((4, 4))


def staged(x):
    with jax.named_scope("first"):
        x = jax.jit(lambda y: y @ y)(x)
    with jax.named_scope("second"), jax.named_scope("inner"):
        return jax.lax.scan(lambda c, _: (c @ c, None), x, length=3)[0]


def test_work_is_told_by_the_outermost_scope():
    jaxpr = jax.make_jaxpr(lambda x: staged(x) @ x)(A)
    assert by_scope(jaxpr) == {"first": 64, "second": 3 * 64, "": 64}


def test_arrays_live_from_the_equation_that_makes_them_to_their_last_reader():
    def function(x):
        a = jnp.exp(x)  # 64 bytes
        b = jnp.sum(a, axis=0)  # 16 more
        c = jnp.sin(b)  # a is gone: 16 + 16
        return c + b

    assert peak_bytes(jax.make_jaxpr(function)(A)) == {"": 80}
    looped = jax.make_jaxpr(lambda x: jax.lax.map(lambda r: jnp.exp(r) + r, x))(A)
    assert peak_bytes(looped)[""] == 64 + 2 * 16  # all rows, and two of one row


def test_a_vit_by_hand():
    """Of width E, depth L and T tokens: L T (12 E^2 + 2 T E), patches, and the classifier."""
    found = tool.profile("deit_tiny_patch16_224")
    parts = {part.stage: part for part in found.parts}
    e, t = 192, 197
    assert parts["stem"].multiply_adds == 196 * 768 * e
    assert parts["stage0"].multiply_adds == 12 * t * (12 * e**2 + 2 * t * e)
    assert parts["head"].multiply_adds == e * 1000
    assert parts["head"].parameters == e * 1000 + 1000
    assert found.total.parameters == 5_717_416
    assert found.total.multiply_adds == sum(part.multiply_adds for part in found.parts)
    linear = tool.profile("deit_tiny_patch16_224", attention="linear", num_classes=10)
    assert linear.total.multiply_adds < found.total.multiply_adds - 990 * e


def test_what_is_printed(capsys):
    tool.main(["", "deit_tiny_patch16_224"])
    shown = capsys.readouterr().out
    assert "| all | 5,717,416 | 1,253.7 M |" in shown
    assert "published: 5.72 M parameters, 1.26 G multiply-adds, top-1 72.190 %" in shown
    tool.main(["", "deit_tiny_patch16_224", "--json", "--image_size=32"])
    assert json.loads(capsys.readouterr().out)["parts"][-1]["stage"] == "all"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["deit_tiny_patch16_22"], "did you mean 'deit_tiny_patch16_224'"),
        (["deit_tiny_patch16_224", "--image_size=100"], "patches of 16 do not tile images of 100"),
        (["--all", "no*"], "no published network matches 'no\\*'"),
        ([], "name a published network"),
    ],
)
def test_what_cannot_be_told_says_why(argv, message):
    with pytest.raises(UserError, match=message):
        tool.main(["", *argv])


def test_the_pareto_front_is_what_nothing_cheaper_beats(tmp_path):
    assert front([(2.0, 70.0), (1.0, 60.0), (3.0, 69.0), (2.0, 65.0), (4.0, 80.0)]) == [1, 0, 4]
    made = [tool.profile("deit_tiny_patch16_224"), tool.profile("vit_tiny_patch16_224")]
    draw(made, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().count("<path") > 10


def test_printed_digits():
    assert agrees(5.7174, "5.72") and agrees(1.296, "1.3") and not agrees(1.36, "1.3")


def test_every_published_network_is_ours():
    known = {name for name, _ in published()}
    assert known <= set(backbones.VARIANTS), sorted(known - set(backbones.VARIANTS))


def test_the_rows_of_the_survey_are_all_there():
    rows = survey()
    assert len(rows) == 27
    assert {row.name for row in rows if row.name} <= set(backbones.VARIANTS)
