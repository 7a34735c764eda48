"""What a user can mend: one sentence that names the value and the remedy."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a config, a flag, a file or a run directory.

    `train.py` and `eval.py` print its message, without a traceback, and exit with code 2.
    Everything else that is raised is a fault of ours and keeps its traceback.
    """


def unknown(kind: str, value: object, known: Iterable[str]) -> UserError:
    """The error for a name that is not in a table: the nearest name, then all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return UserError(f"unknown {kind} {value!r}{hint} known: {', '.join(known) or 'none'}")
