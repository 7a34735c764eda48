"""The README's table of mechanisms, from the mechanisms themselves.

python -m efficient_attn.tools.table            # print it
python -m efficient_attn.tools.table README.md  # put it between that file's markers
"""

import re
import sys
from pathlib import Path

from efficient_attn import attention
from efficient_attn.errors import UserError

BEGIN, END = "<!-- mechanisms -->", "<!-- /mechanisms -->"


def render() -> str:
    """The table in Markdown: a row for each mechanism, a column for each capability."""
    head = ["mechanism", *attention.CAPABILITIES, "options and defaults", "paper"]
    lines = [_row(head), _row(["---", *[":-:"] * len(attention.CAPABILITIES), "---", "---"])]
    for row in attention.describe():
        able = ["yes" if name in row.supports else "" for name in attention.CAPABILITIES]
        options = ", ".join(f"`{o.name}={o.default}`" for o in row.options)
        lines.append(_row([f"`{row.name}`", *able, options, _linked(row.paper)]))
    return "\n".join(lines)


def put(text: str) -> str:
    """`text` with the table between its markers.

    Raises:
        UserError: it has no markers.
    """
    if BEGIN not in text or END not in text:
        raise UserError(f"no {BEGIN} ... {END} to put the table between")
    before, rest = text.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{render()}\n{END}{rest.split(END, 1)[1]}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _linked(paper: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", paper)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
        path.write_text(put(path.read_text()))
    else:
        print(render())
