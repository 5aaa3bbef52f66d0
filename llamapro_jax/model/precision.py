"""What float32 means on an accelerator."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp


def full_precision(dtype: Any) -> AbstractContextManager[Any]:
    """Inside, as a program is traced, products of float32 arrays are computed in float32.

    By default a TPU rounds the factors to bfloat16 and a recent GPU to TF32. Other dtypes are left
    alone: for them the default is exact already.
    """
    return jax.default_matmul_precision("highest") if dtype == jnp.float32 else nullcontext()
