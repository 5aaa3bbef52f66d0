"""Plans: positions, generations, segments, and the numbers of the paper."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamapro_jax.errors import UserError
from llamapro_jax.expansion import ExpansionPlan, Insertion, after, spread

PAPER = ExpansionPlan(32).expand(spread(32, 8))


def test_the_papers_plan() -> None:
    assert PAPER.num_blocks == 40
    assert PAPER.new_depths == (4, 9, 14, 19, 24, 29, 34, 39)
    assert [b.copied_from for b in PAPER.blocks if b.stack == "new"] == [
        3, 8, 13, 18, 23, 28, 33, 38,
    ]  # fmt: skip


def test_the_papers_segments() -> None:
    shapes = [(s.repeats, s.new, s.base) for s in PAPER.segments]
    assert shapes == [(1, 0, 4), (7, 1, 4), (1, 1, 0)]


def test_two_copies_on_each_group_keep_their_order() -> None:
    plan = ExpansionPlan(32).expand(spread(32, 8, per_group=2))
    assert plan.new_depths == (8, 9, 18, 19, 28, 29, 38, 39)
    assert [plan.blocks[d].copied_from for d in (8, 9)] == [6, 7]


def test_groups_that_cannot_be_equal_differ_by_one() -> None:
    ends = [insertion.after for insertion in spread(32, 5)]
    sizes = [b - a for a, b in zip([-1, *ends], ends, strict=False)]
    assert sum(sizes) == 32 and ends[-1] == 31
    assert max(sizes) - min(sizes) == 1


def test_after_counts_base_blocks_from_zero() -> None:
    plan = ExpansionPlan(4).expand(after(4, [2, 0]))
    assert [b.stack for b in plan.blocks] == ["base", "new", "base", "base", "new", "base"]
    assert plan.blocks[1].copied_from == 0 and plan.blocks[4].copied_from == 3


def test_a_second_generation_folds_the_first() -> None:
    first = ExpansionPlan(4).expand(after(4, [1, 3]))
    second = first.expand(after(6, [2, 5]))
    assert [b.generation for b in second.blocks] == [0, 0, 1, 2, 0, 0, 1, 2]
    assert [b.stack for b in second.blocks].count("new") == 2
    assert second.until(1) == first and second.until(0) == ExpansionPlan(4)
    assert second.depths_until(0) == (0, 1, 4, 5)
    # The copy of an inserted block names where that block now stands.
    assert second.blocks[3].copied_from == 2 and second.blocks[7].copied_from == 6


def test_layer_4_is_not_layer_40() -> None:
    """Blocks are found by the plan, not by a prefix of their name."""
    plan = ExpansionPlan(41).expand(after(41, [3]))
    assert plan.new_depths == (4,)
    assert plan.blocks[40].stack == "base" and plan.blocks[41].stack == "base"


@st.composite
def plans(draw: st.DrawFn) -> ExpansionPlan:
    plan = ExpansionPlan(draw(st.integers(1, 9)))
    for _ in range(draw(st.integers(0, 3))):
        blocks = plan.num_blocks
        index = st.integers(0, blocks - 1)
        pairs = draw(st.lists(st.tuples(index, index), min_size=1, max_size=5))
        plan = plan.expand([Insertion(*pair) for pair in pairs])
    return plan


@settings(deadline=None)
@given(plans())
def test_every_block_is_in_one_segment_in_order(plan: ExpansionPlan) -> None:
    depths = [depth for segment in plan.segments for depth in segment.depths]
    assert depths == list(range(plan.num_blocks))
    for stack in ("base", "new"):
        rows = [d for s in plan.segments for group in s.rows(stack) for d in group]
        assert rows == [block.depth for block in plan.blocks if block.stack == stack]
        assert [plan.blocks[d].stack_index for d in rows] == list(range(len(rows)))
    if plan.generation:
        assert len(plan.new_depths) == plan.num_new > 0


@settings(deadline=None)
@given(plans())
def test_the_plan_survives_json(plan: ExpansionPlan) -> None:
    assert ExpansionPlan.from_json(plan.to_json()) == plan


@settings(deadline=None)
@given(plans())
def test_an_earlier_generation_is_the_same_blocks_in_order(plan: ExpansionPlan) -> None:
    for generation in range(plan.generation + 1):
        kept = [plan.blocks[d].generation for d in plan.depths_until(generation)]
        assert kept == [b.generation for b in plan.until(generation).blocks]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spread(4, 5), "--blocks 5 is larger than the model, which has 4 blocks"),
        (lambda: spread(4, 0), "--blocks is 0"),
        (lambda: spread(4, 3, per_group=2), "no multiple of --per-group 2; take --blocks 2"),
        (lambda: spread(4, 4, per_group=0), "--per-group is 0"),
        (lambda: after(4, [4]), "--after 4: the model has blocks 0 to 3"),
        (lambda: after(4, [-1]), "--after -1"),
        (lambda: after(4, [1, 1]), "names a block twice"),
        (lambda: after(4, []), "names no block"),
        (lambda: ExpansionPlan(0), "base_blocks is 0"),
        (lambda: ExpansionPlan(2, ((),)), "generation 1 inserts no block"),
        (lambda: ExpansionPlan(2, ((Insertion(2, 0),),)), "after is 2; the model had blocks 0"),
        (lambda: ExpansionPlan(2).until(1), "generation 1 does not exist"),
        (lambda: ExpansionPlan.from_json({"base_blocks": 2}, "x.json"), "x.json: .*malformed"),
    ],
)
def test_bad_plans_are_refused(call: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()  # type: ignore[operator]
