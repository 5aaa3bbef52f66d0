"""Documents packed into one row: the whole model computes for each what it would for it alone.

Through embedding, all blocks and the head, forward and backward, so that a mask, a rope position
or a block that mixes documents is found wherever it does.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import PLANS, V, model_config, random_params

from llamapro_jax.expansion import ExpansionPlan
from llamapro_jax.loss import summed_cross_entropy
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.model.llama import Params, head_weight, hidden_states, logits

A, B = 13, 19  # tokens of the two documents
ROW = np.random.default_rng(2).permutation(V)[: A + B].astype(np.int32)[None]
POSITIONS = np.concatenate([np.arange(A), np.arange(B)]).astype(np.int32)[None]
SEGMENTS = np.repeat(np.int32([1, 2]), (A, B))[None]

CASES: dict[str, dict[str, Any]] = {
    "2 of 4": {},
    "two a group": {"num_kv_heads": 4},
    "unequal groups": {"num_kv_heads": 1, "attention_bias": True},
    "second generation": {"architecture": "MistralForCausalLM", "sliding_window": 5},
}


@pytest.fixture(params=CASES, scope="module")
def model(request: pytest.FixtureRequest) -> tuple[ModelConfig, ExpansionPlan, Params]:
    """Every plan once, with other heads, and with a window."""
    config = model_config(PLANS[request.param], **CASES[request.param])
    return config, PLANS[request.param], random_params(config, PLANS[request.param])


def states(
    model: tuple[ModelConfig, ExpansionPlan, Params], params: Params, part: slice = slice(None)
) -> jax.Array:
    """The final hidden states of a part of the row."""
    config, plan, _ = model

    def run(params: Params) -> jax.Array:
        return hidden_states(
            params,
            ROW[:, part],
            POSITIONS[:, part],
            SEGMENTS[:, part],
            config=config,
            segments=plan.segments,
            dtype=jnp.float32,
        )

    return jax.jit(run)(params)


def test_a_packed_row_computes_what_its_documents_do_alone(
    model: tuple[ModelConfig, ExpansionPlan, Params],
) -> None:
    params = model[2]
    packed = np.asarray(logits(params, states(model, params)))
    for part in (slice(0, A), slice(A, A + B)):
        alone = np.asarray(logits(params, states(model, params, part)))
        np.testing.assert_allclose(packed[:, part], alone, atol=1e-5)
        assert np.ptp(alone) > 0.1  # the comparison means something


def test_the_loss_of_a_document_has_no_gradient_in_another(
    model: tuple[ModelConfig, ExpansionPlan, Params],
) -> None:
    """The tokens are all different, so that a row of the embedding is a place in the row."""

    def loss(embed: jax.Array, weights: np.ndarray) -> jax.Array:
        params = {**model[2], "embed": embed}
        x_ND = states(model, params)[0]
        targets = jnp.roll(ROW[0], -1)
        head = jax.lax.stop_gradient(head_weight(params))
        return summed_cross_entropy(x_ND, head, targets, jnp.asarray(weights), 8)

    for segment in (1, 2):
        own = SEGMENTS[0] == segment
        grad_VD = jax.grad(loss)(model[2]["embed"], own.astype(np.float32))
        reached = np.asarray((grad_VD != 0).any(axis=1))[ROW[0]]
        np.testing.assert_array_equal(reached, own)
