"""The one exception that means: the user can mend this."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from llamapro_jax import exit_codes


class UserError(Exception):
    """A problem with the input. The message names the thing, its value and the mend.

    The command line prints it without a traceback and exits with `status`.
    """

    status = exit_codes.REFUSED


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x' or 'y'?`, or an empty string when nothing is near."""
    matches = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    if not matches:
        return ""
    return " Did you mean " + " or ".join(repr(m) for m in matches) + "?"
