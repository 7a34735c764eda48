"""From `configs/ablations/NAME.py[:ARGUMENT]` to a `Sweep`."""

import inspect
import runpy
from pathlib import Path

from efficient_attn.config import require
from efficient_attn.errors import UserError
from efficient_attn.tools.ablate.sweep import Scale, Sweep

HERE = Path("configs/ablations")


def load(spec: str, scale: Scale) -> Sweep:
    """What `get_sweep(scale)` of the file returns; `FILE:ARGUMENT` passes it `argument` as well.

    Raises:
        UserError: no such file, the file fails, or has no `get_sweep`.
    """
    path, colon, argument = spec.partition(":")
    if not Path(path).is_file():
        known = ", ".join(str(p) for p in sorted(HERE.glob("*.py")))
        raise UserError(
            f"there is no ablation {path!r}" + (f"; here are: {known}" if known else "")
        )
    try:
        module = runpy.run_path(path, run_name=Path(path).stem)
        require("get_sweep" in module, f"{path} has no get_sweep(scale)")
        get_sweep = module["get_sweep"]
        takes = "argument" in inspect.signature(get_sweep).parameters
        require(takes or not colon, f"{path} takes no argument; leave out ':{argument}'")
        found = get_sweep(scale, argument) if colon else get_sweep(scale)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"ablation {path} fails: {type(error).__name__}: {error}") from error
    if not isinstance(found, Sweep):
        raise UserError(f"get_sweep() of {path} must return a Sweep, not {found!r}")
    return found
