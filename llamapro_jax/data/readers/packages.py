"""Packages that only some kinds of data need."""

from __future__ import annotations

import importlib
from types import ModuleType

from llamapro_jax.errors import UserError


def data_package(name: str, reads: str) -> ModuleType:
    """The module `name` of the extra `data`. Raises UserError with the mend when it is absent."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise UserError(
            f"{reads}: needs the package {name.partition('.')[0]}; install it with "
            "`pip install 'llamapro_jax[data]'`."
        ) from None
