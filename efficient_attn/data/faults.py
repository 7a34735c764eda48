"""Files that cannot be read: stop at the first, or leave them out, count them and say so."""

import warnings
from typing import Literal

from efficient_attn.errors import UserError

NAMED = 5


class Faults:
    """What happened to the files of one data set."""

    def __init__(self, on_error: Literal["raise", "skip"]):
        self.on_error = on_error
        self.names: list[str] = []
        self.reported = False

    def add(self, name: object, reason: str) -> None:
        """Stop with the file's name, or note it; one that turns up after `report` is told at once.

        Raises:
            UserError: the policy is "raise".
        """
        sentence = f"{name}: {reason}"
        if self.on_error == "raise":
            raise UserError(
                f"{sentence}; mend it, or leave such out by --config.data.on_error=skip"
            )
        if sentence not in self.names:
            self.names.append(sentence)
            if self.reported:
                warnings.warn(f"left out {sentence}", stacklevel=2)

    def report(self, *, total: int, what: str = "files") -> None:
        """One warning with the number and the first names, if there were any.

        what: of which there were `total`, those left out among them.
        """
        self.reported = True
        if self.names:
            more = len(self.names) - NAMED
            rest = f", and {more} more" if more > 0 else ""
            named = "; ".join(sorted(self.names)[:NAMED])
            warnings.warn(
                f"left out {len(self.names)} of {total} {what} that cannot be read: {named}{rest}",
                stacklevel=2,
            )
