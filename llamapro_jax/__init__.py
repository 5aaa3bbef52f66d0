"""LLaMA Pro for JAX: grow a LLaMA by zero-initialised blocks and train only those.

`load(path)` opens any model that this package writes or reads. Nothing here imports jax before
it is asked to, so that the command line answers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["UserError", "__version__", "load"]

from llamapro_jax.errors import UserError

if TYPE_CHECKING:
    from llamapro_jax.model.api import Model


def load(path: str, **options: Any) -> Model:
    """Opens a Flax checkpoint, a run, a Hugging Face directory or a hub id.

    The options are those of `llamapro_jax.model.api.load`.
    """
    from llamapro_jax.model.api import load as load_model

    return load_model(path, **options)
