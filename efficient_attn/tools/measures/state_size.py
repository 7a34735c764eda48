"""How much a model of sequences remembers: the bytes that decoding carries."""

from pathlib import Path

from efficient_attn import attention
from efficient_attn.attention import Site
from efficient_attn.config import require
from efficient_attn.train.workdir import read_json


def state_bytes(expression: str, site: Site, *, depth: int, length: int) -> float:
    """Bytes in float32, by each mechanism's own `cost`, that a layer carries after `length` tokens.

    The mean over `depth` layers, since an expression may name several mechanisms.

    Raises:
        UserError: one of them does not decode.
    """
    sizes = []
    for choice in attention.pattern(expression, depth):
        size = attention.cost(choice, site, length).state_bytes
        require(size is not None, f"{choice} does not decode and has no state; leave it out")
        sizes.append(size)
    return sum(sizes) / depth


def state_of_run(path: Path) -> dict[str, float]:
    """{"state_bytes": ...} of a causal model, of a run on `probes` or text, after a whole context.

    Raises:
        UserError: a mechanism that does not decode.
    """
    run = read_json(path / "config.json")
    model, data = run["model"], run["data"]
    length = data["probes"]["length"] if data["name"] == "probes" else data["text"]["max_len"]
    site = Site(width=model["width"], heads=model["heads"], seq=length)
    return {"state_bytes": state_bytes(run["attention"], site, depth=model["depth"], length=length)}
