"""What is kept of a block's forward pass for its backward pass, and what is computed again.

| policy | kept of a block besides its input | computed again |
| --- | --- | --- |
| `none` | all that the backward pass reads but copies of weights | gathers and casts of weights |
| `minimal` | q, k, v, attention's output and log-sum-exp, o, gate, up | what is no matrix product |
| `attention` | attention's output and log-sum-exp | the matrix products, not attention |
| `full` | nothing | everything |

Weights that were gathered, cast or dequantised are never kept: over all blocks that would be a
second model, whole on each device. Blocks below the first that trains are not differentiated, and
keep nothing whatever the policy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from llamapro_jax.model.attention import save_residuals
from llamapro_jax.model.config import Remat

# Results of matrix products, named in `model.llama`. With them no product runs again; `o` is among
# them because the sum of it and the block's input is read by the second norm.
MATMUL_RESULTS = ("q", "k", "v", "o", "gate", "up")

# What makes the copy of a weight that is multiplied: the gather over the mesh, the cast from its
# master, and the name that `model.llama` gives the result. Activations that go through a cast are
# cast again, which costs nothing beside a matrix product.
_WEIGHT_COPIES = frozenset({"reshard", "convert_element_type"})


WEIGHT = "weight"


def _all_but_weight_copies(primitive: Any, *_: Any, **parameters: Any) -> bool:
    return primitive.name not in _WEIGHT_COPIES and parameters.get("name") != WEIGHT


_POLICIES: dict[Remat, Callable[..., Any]] = {
    "none": _all_but_weight_copies,
    "minimal": save_residuals(*MATMUL_RESULTS),
    "attention": save_residuals(),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def rematerialised(body: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """`body`, one block inside a scan, which keeps what the policy says."""
    # Inside a scan nothing can merge what is computed again with what was computed first.
    return jax.checkpoint(body, policy=_POLICIES[remat], prevent_cse=False)
