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
from test_attention import KERNELS

from llamapro_jax.data.packing import pack, pack_whole
from llamapro_jax.data.rows import Row, stack_rows, targets_and_weights
from llamapro_jax.expansion import ExpansionPlan, after
from llamapro_jax.loss import summed_cross_entropy
from llamapro_jax.model import attention as attention_module
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

    def loss(embed: jax.Array, weights: jax.Array) -> jax.Array:
        params = {**model[2], "embed": embed}
        x_ND = states(model, params)[0]
        targets = jnp.roll(ROW[0], -1)
        head = jax.lax.stop_gradient(head_weight(params))
        return summed_cross_entropy(x_ND, head, targets, weights, 8)

    gradient = jax.jit(jax.grad(loss))
    for segment in (1, 2):
        own = SEGMENTS[0] == segment
        grad_VD = gradient(model[2]["embed"], own.astype(np.float32))
        reached = np.asarray((grad_VD != 0).any(axis=1))[ROW[0]]
        np.testing.assert_array_equal(reached, own)


# ------------------------------------------------------------------- every kernel, rows as read


def packed_rows() -> dict[str, Row]:
    """Two rows of 40 tokens, of text that is cut where a row ends, and of whole conversations."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, V, length).astype(np.int32) for length in (11, 19, 27, 13)]
    examples = [(d, (np.arange(len(d)) % 7 > 2) & (np.arange(len(d)) > 3)) for d in documents]
    text, chat = list(pack(documents, 40)), list(pack_whole(examples, 40))
    assert all(row["segment_ids"].max() > 1 for row in (*text, *chat))
    return {"text": stack_rows(text, 2), "chat": stack_rows(chat, 2)}


@pytest.mark.parametrize("kernel", ["reference", *KERNELS])
def test_no_kernel_lets_a_gradient_into_another_segment(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """d loss(a segment) / d the embedding of a place is exactly 0 outside of the segment, and in it
    where nothing that counts follows. (cuDNN refuses packed rows: it takes no segment ids.)"""
    if kernel != "reference":
        monkeypatch.setattr(attention_module, "_kernel", KERNELS.__getitem__)
        monkeypatch.setattr(attention_module, "obstacle", lambda name, problem: None)
    plan = ExpansionPlan(1).expand(after(1, (0,)))
    config = model_config(plan)
    params = random_params(config, plan)

    @jax.jit
    def gradient(x_BTD: jax.Array, batch: Row, counts_BT: jax.Array) -> jax.Array:
        def loss(x_BTD: jax.Array) -> jax.Array:
            # Each place has a row of the embedding for itself.
            places_BT = jnp.arange(counts_BT.size).reshape(counts_BT.shape)
            states_ND = hidden_states(
                {**params, "embed": x_BTD.reshape(-1, x_BTD.shape[-1])},
                places_BT,
                batch["positions"],
                batch["segment_ids"],
                config=config,
                segments=plan.segments,
                dtype=jnp.float32,
                attention=kernel,  # type: ignore[arg-type]
            ).reshape(counts_BT.size, -1)
            targets, weights = (x.reshape(-1) for x in targets_and_weights(batch))
            weights = weights * counts_BT.reshape(-1)
            return summed_cross_entropy(states_ND, head_weight(params), targets, weights, 16)

        return jax.grad(loss)(x_BTD)

    for batch in packed_rows().values():
        batch = {name: jnp.asarray(array) for name, array in batch.items()}
        counted_BT = np.asarray(targets_and_weights(batch)[1]) > 0
        segments_BT = np.asarray(batch["segment_ids"])
        for row, segment in {(b, s) for (b, _), s in np.ndenumerate(segments_BT) if s}:
            own_BT = (segments_BT == segment) & (np.arange(2) == row)[:, None]
            found_BTD = gradient(params["embed"][batch["tokens"]], batch, jnp.asarray(own_BT))
            follows_BT = np.cumsum((own_BT & counted_BT)[:, ::-1], axis=1)[:, ::-1] > 0
            assert follows_BT.any()
            np.testing.assert_array_equal(
                np.asarray((found_BTD != 0).any(axis=-1)), own_BT & follows_BT
            )
