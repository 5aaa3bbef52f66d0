from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from data_sources import ArrayRows
from hypothesis import given
from hypothesis import strategies as st

from llamapro_jax.data.mixture import Mixture, counts_before, exact, parts, picks, whole_shares
from llamapro_jax.data.packing import pack
from llamapro_jax.data.rows import Row, stack_rows
from llamapro_jax.errors import UserError

weights_strategy = st.lists(
    st.decimals(min_value="0.001", max_value=10, places=3).map(float), min_size=1, max_size=5
)


class ListRows:
    """Rows in memory."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows
        self.keys = [self.key(row) for row in rows]
        self.sequence_length = len(rows[0]["tokens"])

    @staticmethod
    def key(row: Row) -> bytes:
        return b"".join(row[name].tobytes() for name in sorted(row))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def read(self, indices: Sequence[int]) -> Row:
        return stack_rows([self._rows[index] for index in indices], len(indices))


def two_sources(batch_size: int = 8, seed: int = 3) -> Mixture:
    sources = [("code", ArrayRows(50), 0.9), ("prose", ArrayRows(7, first=1000), 0.1)]
    return Mixture(sources, batch_size, seed)


def first_tokens(mixture: Mixture, steps: range) -> np.ndarray:
    return np.concatenate([mixture.batch(step)["tokens"][:, 0] for step in steps])


def test_weights_are_the_decimals_they_print_as() -> None:
    assert whole_shares([0.7, 0.3]) == [7, 3]
    assert whole_shares([1.0, 1.5]) == [2, 3]
    assert whole_shares([0.1, 0.2, 1e-5]) == [10000, 20000, 1]
    assert whole_shares([5]) == [1]


def test_replay_has_exactly_its_share() -> None:
    """Of any 1,000 rows that begin a cycle, whatever the weights within the two lists."""
    lengths = [50, 7, 30, 11]
    own = parts([1.0, 1.5], lengths[:2], 1 - exact(0.1))
    replayed = parts(["rows", "rows"], lengths[2:], 0.1)
    assert sum(own) == Fraction(9, 10) and sum(replayed) == Fraction(1, 10)
    sources = [
        (name, ArrayRows(length), weight)
        for name, length, weight in zip("abcd", lengths, [*own, *replayed], strict=True)
    ]
    mixture = Mixture(sources, 4100, 0)  # one cycle of 18 : 27 : 5, of which 30 : 11
    counts = np.bincount(mixture.batch(0)["source"])
    assert counts.tolist() == [36 * 41, 54 * 41, 300, 110]


def test_weights_by_rows_pass_over_everything_once_an_epoch() -> None:
    lengths = [50, 7, 13]
    sources = [
        (name, ArrayRows(length, first=1000 * i), weight)
        for i, (name, length, weight) in enumerate(
            zip("abc", lengths, parts(["rows"] * 3, lengths), strict=True)
        )
    ]
    tokens = first_tokens(Mixture(sources, 10, 0), range(21)).reshape(3, 70)
    everything = [1000 * i + row for i, length in enumerate(lengths) for row in range(length)]
    for epoch in tokens:
        assert sorted(epoch) == everything
    assert (tokens[0] != tokens[1]).any() and (tokens[1] != tokens[2]).any()


@given(
    st.lists(
        st.lists(st.lists(st.integers(3, 99), max_size=9), min_size=1, max_size=9),
        min_size=1,
        max_size=3,
    ),
    st.integers(2, 12),
    st.integers(1, 7),
    st.integers(0, 9),
)
def test_an_epoch_of_any_mixture_gives_back_every_document_once(
    texts: list[list[list[int]]], length: int, batch_size: int, seed: int
) -> None:
    """Documents that begin with 1 and end with 2, cut anywhere by the rows of their source."""
    documents = [[[1, *words, 2] for words in source] for source in texts]
    packed = [ListRows(list(pack(source, length))) for source in documents]
    weights = parts(["rows"] * len(packed), [len(rows) for rows in packed])
    mixture = Mixture(
        [(str(i), rows, weights[i]) for i, rows in enumerate(packed)], batch_size, seed
    )
    total = sum(map(len, packed))
    steps = range(math.ceil(total / batch_size))
    batches = [mixture.batch(step) for step in steps]
    whole = {name: np.concatenate([b[name] for b in batches])[:total] for name in batches[0]}
    for number, rows in enumerate(packed):
        mine = [
            {name: array[place] for name, array in whole.items() if name != "source"}
            for place in np.flatnonzero(whole["source"] == number)
        ]
        # Rows of equal content are one as good as the other.
        order = sorted(mine, key=lambda row: rows.keys.index(ListRows.key(row)))
        assert sorted(map(ListRows.key, mine)) == sorted(rows.keys)
        tokens = [t for row in order for t in row["tokens"][row["segment_ids"] > 0].tolist()]
        if len(set(rows.keys)) == len(rows.keys):
            assert tokens == [token for document in documents[number] for token in document]


@given(weights_strategy, st.integers(0, 10**15))
def test_counts_are_near_exact_everywhere_and_exact_in_each_cycle(
    weights: list[float], k: int
) -> None:
    shares = whole_shares(weights)
    total = sum(shares)
    counts = counts_before(k, shares)
    assert sum(counts) == k
    for count, share in zip(counts, shares, strict=True):
        assert abs(count - k * share / total) <= len(shares) + k * 1e-15
    assert counts_before(total * 7, shares) == [7 * share for share in shares]


@given(weights_strategy)
def test_pick_counts_each_source_through(weights: list[float]) -> None:
    shares = whole_shares(weights)
    seen = [0] * len(shares)
    for source, count in picks(0, 300, shares):
        assert count == seen[source]
        seen[source] += 1
    assert picks(100, 200, shares) == picks(0, 300, shares)[100:]


def test_weights_are_by_rows_and_exact() -> None:
    mixture = two_sources(batch_size=10)
    for step in range(20):
        assert mixture.batch(step)["source"].tolist().count(1) == 1


def test_the_batch_is_a_function_of_seed_and_step() -> None:
    mixture, again = two_sources(), two_sources()
    later = again.batch(37)
    for step in (37, 0, 5, 37):
        batch, other = mixture.batch(step), two_sources().batch(step)
        assert all((batch[name] == other[name]).all() for name in batch)
    assert all((mixture.batch(37)[name] == later[name]).all() for name in later)
    assert (first_tokens(mixture, range(5)) != first_tokens(two_sources(seed=4), range(5))).any()


def test_the_order_is_pinned() -> None:
    """Golden: a run that resumes with a later version must see the same rows."""
    tokens = first_tokens(two_sources(), range(40))
    assert hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()[:16] == "cf7bffc668e76b01"


@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 3))
def test_each_row_once_an_epoch(count: int, batch_size: int, seed: int) -> None:
    mixture = Mixture([("a", ArrayRows(count), 1.0)], batch_size, seed)
    rows = first_tokens(mixture, range(math.ceil(3 * count / batch_size)))[: 3 * count]
    for epoch in rows.reshape(3, count):
        assert sorted(epoch) == list(range(count))


def test_epochs_and_sources_have_their_own_orders() -> None:
    sources = [("a", ArrayRows(64), 1.0), ("b", ArrayRows(64), 1.0)]
    batch = Mixture(sources, 256, 0).batch(0)
    a, b = (batch["tokens"][batch["source"] == source, 0] for source in (0, 1))
    orders = [a[:64], a[64:], b[:64], b[64:], np.arange(64)]
    for i, first in enumerate(orders):
        for second in orders[i + 1 :]:
            assert (first == second).mean() < 0.2


def test_the_permutation_is_uniform() -> None:
    """Each row comes first about equally often over the seeds."""
    firsts = [
        Mixture([("a", ArrayRows(4), 1.0)], 1, seed).batch(0)["tokens"][0, 0] for seed in range(400)
    ]
    assert (np.abs(np.bincount(firsts, minlength=4) - 100) < 40).all()


@given(st.integers(0, 200), st.integers(0, 8), st.integers(0, 8))
def test_some_rows_are_those_of_the_whole_batch(step: int, start: int, stop: int) -> None:
    start, stop = sorted((start, stop))
    if start == stop:
        return
    mixture = two_sources()
    whole, part = mixture.batch(step), mixture.rows(step, start, stop)
    assert all((whole[name][start:stop] == part[name]).all() for name in whole)


def test_another_source_leaves_the_order_of_the_first() -> None:
    alone = first_tokens(Mixture([("code", ArrayRows(50), 1.0)], 8, 3), range(20))
    mixed = first_tokens(two_sources(), range(20))
    mixed = mixed[mixed < 1000]
    assert (mixed == alone[: len(mixed)]).all()


def test_shapes_and_dtypes() -> None:
    batch = two_sources().batch(0)
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "tokens": ((8, 4), "int32"),
        "segment_ids": ((8, 4), "int32"),
        "positions": ((8, 4), "int32"),
        "loss_mask": ((8, 4), "bool"),
        "source": ((8,), "int32"),
    }


@pytest.mark.parametrize("weight", [0, -1.0, math.nan, math.inf])
def test_a_weight_must_be_positive(weight: float) -> None:
    with pytest.raises(UserError, match=f"'a': weight is {weight}; it must be positive"):
        Mixture([("a", ArrayRows(3), weight)], 2, 0)


def test_bad_mixtures_are_refused() -> None:
    rows = ArrayRows(3)
    with pytest.raises(UserError, match="names no source"):
        Mixture([], 2, 0)
    with pytest.raises(UserError, match="'a': the name is used twice"):
        Mixture([("a", rows, 1.0), ("b", rows, 1.0), ("a", rows, 1.0)], 2, 0)
    with pytest.raises(UserError, match="'b': is empty"):
        Mixture([("a", rows, 1.0), ("b", ArrayRows(0), 1.0)], 2, 0)
    with pytest.raises(UserError, match=r"different sequence lengths \(a: 4, b: 5\)"):
        Mixture([("a", rows, 1.0), ("b", ArrayRows(3, 5), 1.0)], 2, 0)
    with pytest.raises(UserError, match="batch_size is 0"):
        Mixture([("a", rows, 1.0)], 0, 0)
    with pytest.raises(UserError, match="seed is -1"):
        Mixture([("a", rows, 1.0)], 1, -1)
