"""The README's tables of mechanisms, and of mechanisms in backbones, from the code itself.

python -m efficient_attn.tools.table            # print them
python -m efficient_attn.tools.table README.md  # put them between that file's markers
"""

import re
from collections.abc import Sequence
from pathlib import Path

from flax import nnx

from efficient_attn import attention, backbones
from efficient_attn.backbones import Input
from efficient_attn.config import require
from efficient_attn.errors import UserError
from efficient_attn.layers.rngs import make_rngs
from efficient_attn.train.flags import run

TOKENS = {"classes": 2, "vocab": 16}
SMALL = {
    "encoder": ({}, Input(kind="tokens", shape=(64,), **TOKENS)),
    "causal_lm": ({}, Input(kind="text", shape=(64,), **TOKENS)),
    "encoder_decoder": ({}, Input(kind="translation", shape=(64, 64), **TOKENS)),
    "vit": ({"patch": 2}, Input(kind="image", shape=(16, 16, 1), classes=2)),
    "dual_encoder": ({}, Input(kind="pair", shape=(64,), **TOKENS)),
}
"""The least of each backbone, and what it reads."""


def render() -> str:
    """The table in Markdown: a row for each mechanism, a column for each capability."""
    head = ["mechanism", *attention.CAPABILITIES, "options and defaults", "paper"]
    lines = [row(head), row(["---", *[":-:"] * len(attention.CAPABILITIES), "---", "---"])]
    for found in attention.describe():
        able = ["yes" if name in found.supports else "" for name in attention.CAPABILITIES]
        options = ", ".join(f"`{o.name}={o.default}`" for o in found.options)
        lines.append(row([f"`{found.name}`", *able, options, _linked(found.paper)]))
    return "\n".join(lines)


def render_backbones() -> str:
    """Which mechanism runs in which backbone, found by building a small one in the abstract.

    A cell says yes, or what the mechanism lacks by its default options; "not on sequences" stands
    where it mixes pictures alone.
    """
    lines = [row(["mechanism", *SMALL]), row(["---", *[":-:"] * len(SMALL)])]
    for name in attention.MIXERS:
        lines.append(row([f"`{name}`", *(_runs(name, backbone) for backbone in SMALL)]))
    return "\n".join(lines)


def _runs(expression: str, backbone: str) -> str:
    options, source = SMALL[backbone]

    def make():
        options_of = {"depth": 1, "width": 32, "heads": 4, **options}
        return backbones.create(
            backbone, options_of, attention=expression, source=source, rngs=make_rngs(0)
        )

    try:
        nnx.eval_shape(make)
    except UserError as refusal:
        if "mixes the rows and columns of a picture" in str(refusal):
            return "not on sequences"
        missing = re.search(r"does not support (.*), which this model needs", str(refusal))
        if missing is None:
            raise
        return f"not {missing[1]}"
    return "yes"


def put(text: str) -> str:
    """`text` with the tables between their markers; see `between`."""
    return between(between(text, "mechanisms", render()), "backbones", render_backbones())


def between(text: str, name: str, content: str) -> str:
    """`text` with `content` between <!-- name --> and <!-- /name -->.

    Raises:
        UserError: it has no such markers.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin not in text or end not in text:
        raise UserError(f"no {begin} ... {end} to put the table between")
    before, rest = text.split(begin, 1)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end, 1)[1]}"


def row(cells: list[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def _linked(paper: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", paper)


def read(path: Path) -> str:
    """The text of the file that is to have a table.

    Raises:
        UserError: there is no such file.
    """
    require(path.is_file(), f"there is no file {str(path)!r} to put a table in")
    return path.read_text()


def main(argv: Sequence[str]) -> None:
    """Print the tables, or put them into the file that is given."""
    if len(argv) > 1:
        path = Path(argv[1])
        path.write_text(put(read(path)))
    else:
        print(render(), render_backbones(), sep="\n\n")


if __name__ == "__main__":
    run(main)
