from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamapro_jax.data.packing import pack, pack_whole
from llamapro_jax.data.rows import positions_of
from llamapro_jax.errors import UserError

documents_strategy = st.lists(st.integers(0, 23), max_size=25)


def number_documents(lengths: list[int]) -> list[list[int]]:
    """Documents of these lengths in which every token id is used once: a loss or a swap shows."""
    starts = np.cumsum([0, *lengths])
    return [
        list(range(start, start + length)) for start, length in zip(starts, lengths, strict=False)
    ]


def segments(rows: list[dict[str, np.ndarray]]) -> list[list[int]]:
    return [
        row["tokens"][row["segment_ids"] == segment].tolist()
        for row in rows
        for segment in range(1, row["segment_ids"].max() + 1)
    ]


@given(documents_strategy, st.integers(2, 11))
def test_every_token_exactly_once_in_order(lengths: list[int], sequence_length: int) -> None:
    documents = number_documents(lengths)
    rows = list(pack(documents, sequence_length))
    tokens = [t for row in rows for t in row["tokens"][row["segment_ids"] > 0].tolist()]
    assert tokens == [t for document in documents for t in document]
    assert len(rows) == -(-len(tokens) // sequence_length)


@given(documents_strategy, st.integers(2, 11))
def test_segments_never_mix_documents(lengths: list[int], sequence_length: int) -> None:
    documents = number_documents(lengths)
    owner = {t: d for d, document in enumerate(documents) for t in document}
    rows = list(pack(documents, sequence_length))
    found = segments(rows)
    assert all(len({owner[t] for t in segment}) == 1 for segment in found)
    # No more cuts than the ends of rows force: every other segment is a whole document.
    wholes = sum(segment in documents for segment in found)
    assert len(found) - wholes <= 2 * len(rows)


@given(documents_strategy, st.integers(2, 11))
def test_positions_restart_and_padding_is_only_at_the_end(
    lengths: list[int], sequence_length: int
) -> None:
    rows = list(pack(number_documents(lengths), sequence_length))
    for index, row in enumerate(rows):
        real = row["segment_ids"] > 0
        padding = sequence_length - int(real.sum())
        assert padding == 0 or index == len(rows) - 1
        assert real[: sequence_length - padding].all()
        assert (row["loss_mask"] == real).all()
        for segment in range(1, row["segment_ids"].max() + 1):
            positions = row["positions"][row["segment_ids"] == segment]
            assert positions.tolist() == list(range(len(positions)))
        assert not row["tokens"][~real].any() and not row["positions"][~real].any()


def test_a_long_document_continues_as_a_new_segment() -> None:
    first, second = pack([[1, 2], [3, 4, 5, 6]], 4)
    assert first["tokens"].tolist() == [1, 2, 3, 4]
    assert first["segment_ids"].tolist() == [1, 1, 2, 2]
    assert first["positions"].tolist() == [0, 1, 0, 1]
    assert second["tokens"].tolist() == [5, 6, 0, 0]
    assert second["segment_ids"].tolist() == [1, 1, 0, 0]
    assert second["loss_mask"].tolist() == [True, True, False, False]
    assert {name: array.dtype for name, array in first.items()} == {
        "tokens": np.int32,
        "segment_ids": np.int32,
        "positions": np.int32,
        "loss_mask": np.bool_,
    }


def test_rows_of_one_token_are_refused() -> None:
    with pytest.raises(UserError, match="sequence_length is 1; it must be at least 2"):
        list(pack([[1, 2]], 1))


# -------------------------------------------------------------------- examples that stay whole

examples_strategy = st.integers(2, 12).flatmap(
    lambda length: st.tuples(
        st.just(length), st.lists(st.integers(1, length), max_size=30), st.integers(1, 5)
    )
)


def numbered(lengths: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Examples in which every token id is used once; every third token counts."""
    ends = np.cumsum(lengths, dtype=int)
    tokens = [np.arange(end - size, end) for end, size in zip(ends, lengths, strict=True)]
    return [(example, example % 3 == 0) for example in tokens]


@given(examples_strategy)
def test_every_example_once_and_whole(case: tuple[int, list[int], int]) -> None:
    length, lengths, open_rows = case
    examples = numbered(lengths)
    rows = list(pack_whole(examples, length, open_rows))
    assert sorted(segments(rows)) == [tokens.tolist() for tokens, _ in examples]
    assert all(array.shape == (length,) for row in rows for array in row.values())
    for row in rows:
        real = row["segment_ids"] > 0
        assert real[: real.sum()].all()  # padding is at the end
        assert (row["loss_mask"] == (real & (row["tokens"] % 3 == 0))).all()
        assert (row["positions"] == positions_of(row["segment_ids"])).all()
        assert not row["tokens"][~real].any()
        numbers = row["segment_ids"][real]
        assert numbers[0] == 1 and (np.diff(numbers) >= 0).all() and (np.diff(numbers) <= 1).all()
    again = list(pack_whole(iter(examples), length, open_rows))
    assert all(
        (row[name] == other[name]).all()
        for row, other in zip(rows, again, strict=True)
        for name in row
    )


def test_an_example_goes_where_it_fits_best() -> None:
    def firsts(lengths: list[int], open_rows: int) -> list[list[int]]:
        rows = pack_whole(numbered(lengths), 10, open_rows)
        starts = {
            int(start): size for start, size in zip(np.cumsum([0, *lengths]), lengths, strict=False)
        }
        return [[starts[segment[0]] for segment in segments([row])] for row in rows]

    # 3 goes to 6 (room 4) and not to 5 (room 5); 5 fills 5, which is given out at once.
    assert firsts([5, 6, 3, 5], 4) == [[5, 5], [6, 3]]
    # Of rows with the same room the older one is taken.
    assert firsts([6, 6, 2, 1], 4) == [[6, 2, 1], [6]]
    # With two open rows the fuller one is given up for the third.
    assert firsts([6, 7, 8, 4, 2], 2) == [[7], [6, 4], [8, 2]]
    assert firsts([6, 7, 8, 4, 3, 2], 3) == [[6, 4], [7, 3], [8, 2]]
    assert firsts([], 2) == []


def test_what_does_not_fit_whole_is_an_error() -> None:
    for size in (0, 5):
        with pytest.raises(ValueError, match=f"an example of {size} tokens in rows of 4"):
            list(pack_whole([(np.arange(size), np.ones(size, bool))], 4))
    with pytest.raises(UserError, match="sequence_length is 1; it must be at least 2"):
        list(pack_whole([], 1))
