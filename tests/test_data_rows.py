from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_sources import ArrayRows
from hypothesis import given
from hypothesis import strategies as st

from llamapro_jax.data.packing import pack
from llamapro_jax.data.rows import (
    complete_row,
    positions_of,
    stack_rows,
    targets_and_weights,
)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(2, 9))
def test_positions_of_agrees_with_packing(lengths: list[int], sequence_length: int) -> None:
    for row in pack([[7] * length for length in lengths], sequence_length):
        assert positions_of(row["segment_ids"]).tolist() == row["positions"].tolist()


def test_tokens_alone_are_one_segment_that_counts() -> None:
    row = complete_row({"tokens": np.array([5, 6, 7], np.int64)})
    assert row["segment_ids"].tolist() == [1, 1, 1]
    assert row["positions"].tolist() == [0, 1, 2]
    assert row["loss_mask"].tolist() == [True, True, True]
    assert row["tokens"].dtype == np.int32


def test_given_segments_decide_positions_and_mask() -> None:
    row = complete_row({"tokens": np.arange(5), "segment_ids": np.array([1, 1, 2, 2, 0])})
    assert row["positions"].tolist() == [0, 1, 0, 1, 0]
    assert row["loss_mask"].tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("on_device", [False, True])
def test_targets_stay_in_the_segment_and_obey_the_mask(on_device: bool) -> None:
    batch = {
        "tokens": np.array([[1, 2, 3, 4, 5, 6], [7, 8, 9, 0, 0, 0]], np.int32),
        "segment_ids": np.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 0, 0, 0]], np.int32),
        "loss_mask": np.array([[1, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]], bool),
    }
    function = targets_and_weights
    if on_device:
        batch = {name: jnp.asarray(array) for name, array in batch.items()}
        function = jax.jit(targets_and_weights)
    targets_BT, weights_BT = function(batch)
    assert isinstance(targets_BT, jax.Array if on_device else np.ndarray)
    assert targets_BT.dtype == np.int32 and weights_BT.dtype == np.float32
    assert np.asarray(targets_BT).tolist() == [[2, 3, 4, 5, 6, 0], [8, 9, 0, 0, 0, 0]]
    assert np.asarray(weights_BT).tolist() == [[1, 1, 0, 0, 1, 0], [1, 1, 0, 0, 0, 0]]


def test_stack_rows_leaves_the_rows_as_they_are() -> None:
    row = ArrayRows(1)[0]
    batch = stack_rows([row], 2)
    batch["tokens"][:] = 9
    assert row["tokens"].tolist() == [0, 0, 0, 0]
