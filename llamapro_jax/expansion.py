"""Where inserted blocks stand, from which they were copied, and how the step runs them.

A model is its original blocks (generation 0) and one or more generations of inserted ones. The
last generation is the stack `new`; all before it are the stack `base`. The plan is written into
every checkpoint and every exported config.json. Nobody infers it from a stride.

Source: LLaMA Pro, arXiv 2401.02415, section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from llamapro_jax.errors import UserError

# Of a plan that is read: each block becomes an object, and no model comes near.
_MOST_BLOCKS = 2**16


@dataclass(frozen=True)
class Insertion:
    """One inserted block. Both numbers count, from 0, the blocks of the model before it grew."""

    after: int
    copied_from: int


@dataclass(frozen=True)
class Block:
    """One block of the grown model. `depth` and `copied_from` count its blocks from 0.

    stack_index: its row in the stack `base` or `new`.
    """

    depth: int
    generation: int
    stack: Literal["base", "new"]
    stack_index: int
    copied_from: int | None


@dataclass(frozen=True)
class Segment:
    """`repeats` times: `new` inserted blocks, then `base` blocks. One scan of the forward pass.

    Its arrays are `new [repeats, new, ...]` and `base [repeats, base, ...]`; `depths` has the
    depth of each block in the order in which they run.
    """

    repeats: int
    new: int
    base: int
    depths: tuple[int, ...]

    def rows(self, stack: Literal["base", "new"]) -> list[list[int]]:
        """Depths of the blocks of one stack, [repeats][blocks]."""
        width = self.new + self.base
        groups = [self.depths[i * width : (i + 1) * width] for i in range(self.repeats)]
        return [list(g[: self.new] if stack == "new" else g[self.new :]) for g in groups]


@dataclass(frozen=True)
class ExpansionPlan:
    """How a model of `base_blocks` blocks grew, one tuple of insertions a generation.

    The insertions of a generation are in the order of depth; several may share one `after`.
    """

    base_blocks: int
    generations: tuple[tuple[Insertion, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.base_blocks < 1:
            raise UserError(f"plan: base_blocks is {self.base_blocks}; it must be at least 1.")
        blocks = self.base_blocks
        for number, insertions in enumerate(self.generations, start=1):
            where = f"plan: generation {number}"
            if not insertions:
                raise UserError(f"{where} inserts no block.")
            if list(insertions) != sorted(insertions, key=lambda i: i.after):
                raise UserError(f"{where}: insertions must be in the order of depth.")
            for insertion in insertions:
                for field in ("after", "copied_from"):
                    value = getattr(insertion, field)
                    if not 0 <= value < blocks:
                        raise UserError(
                            f"{where}: {field} is {value}; the model had blocks 0 to {blocks - 1}."
                        )
            blocks += len(insertions)

    @property
    def generation(self) -> int:
        """Number of the last generation; 0 for a model that was never expanded."""
        return len(self.generations)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks in the order of depth."""
        # Each entry is (generation, entry it was copied from), identified by the object itself,
        # since depths shift with every generation.
        entries: list[list[Any]] = [[0, None] for _ in range(self.base_blocks)]
        for generation, insertions in enumerate(self.generations, start=1):
            grown: list[list[Any]] = []
            for index, entry in enumerate(entries):
                grown.append(entry)
                grown += [
                    [generation, entries[i.copied_from]] for i in insertions if i.after == index
                ]
            entries = grown
        depth_of = {id(entry): depth for depth, entry in enumerate(entries)}
        counts = {"base": 0, "new": 0}
        blocks = []
        for depth, (generation, parent) in enumerate(entries):
            stack = "new" if generation and generation == self.generation else "base"
            copied_from = None if parent is None else depth_of[id(parent)]
            blocks.append(Block(depth, generation, stack, counts[stack], copied_from))
            counts[stack] += 1
        return tuple(blocks)

    @property
    def num_blocks(self) -> int:
        return self.base_blocks + sum(len(insertions) for insertions in self.generations)

    @property
    def num_new(self) -> int:
        """Blocks of the last generation: those that train."""
        return len(self.generations[-1]) if self.generations else 0

    @cached_property
    def new_depths(self) -> tuple[int, ...]:
        return tuple(block.depth for block in self.blocks if block.stack == "new")

    def until(self, generation: int) -> ExpansionPlan:
        """The plan of the model as it was after `generation`; 0 is the original."""
        if not 0 <= generation <= self.generation:
            raise UserError(
                f"generation {generation} does not exist; this model has 0 to {self.generation}."
            )
        return ExpansionPlan(self.base_blocks, self.generations[:generation])

    def depths_until(self, generation: int) -> tuple[int, ...]:
        """Depths, in this model, of the blocks that `until(generation)` has."""
        self.until(generation)
        return tuple(block.depth for block in self.blocks if block.generation <= generation)

    def expand(self, insertions: Sequence[Insertion]) -> ExpansionPlan:
        """This plan with one more generation."""
        ordered = tuple(sorted(insertions, key=lambda insertion: insertion.after))
        return ExpansionPlan(self.base_blocks, (*self.generations, ordered))

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The blocks as scans: the prefix below the first new block, then runs of equal groups.

        The paper's plan for 32 blocks gives the prefix of 4, 7 times (1 new, 4 base), and the
        last new block alone.
        """
        stacks = [block.stack for block in self.blocks]
        groups: list[tuple[int, int, list[int]]] = []
        for depth, stack in enumerate(stacks):
            starts_group = not groups or (stack == "new" and stacks[depth - 1] == "base")
            if starts_group:
                groups.append((0, 0, []))
            new, base, depths = groups[-1]
            is_new = stack == "new"
            groups[-1] = (new + is_new, base + (not is_new), [*depths, depth])
        segments: list[Segment] = []
        for new, base, depths in groups:
            last = segments[-1] if segments else None
            if last is not None and (last.new, last.base) == (new, base):
                segments[-1] = Segment(last.repeats + 1, new, base, last.depths + tuple(depths))
            else:
                segments.append(Segment(1, new, base, tuple(depths)))
        return tuple(segments)

    def to_json(self) -> dict[str, Any]:
        return {
            "base_blocks": self.base_blocks,
            "generations": [
                [{"after": i.after, "copied_from": i.copied_from} for i in insertions]
                for insertions in self.generations
            ],
        }

    @staticmethod
    def from_json(value: Any, where: str = "plan") -> ExpansionPlan:
        """The plan that `to_json` wrote. `where` is the file that errors name."""
        try:
            generations = tuple(
                tuple(Insertion(int(i["after"]), int(i["copied_from"])) for i in insertions)
                for insertions in value["generations"]
            )
            base_blocks = int(value["base_blocks"])
            if base_blocks > _MOST_BLOCKS:
                raise ValueError(f"base_blocks is {base_blocks}, more than {_MOST_BLOCKS}")
            return ExpansionPlan(base_blocks, generations)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{where}: the expansion plan is malformed ({type(error).__name__}: {error}); "
                "it needs base_blocks and generations with after and copied_from."
            ) from None


def checked_lineage(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """What was done to a model, entry by entry, as it is read from a file of unknown origin."""
    needed = {"expand": {"generation"}, "train": {"trainable", "steps"}}
    kinds = {"verb": str, "source": str, "generation": int, "trainable": list | tuple, "steps": int}
    for entry in value if isinstance(value, list | tuple) else [None]:
        if not isinstance(entry, dict) or not {"verb", "source"} <= set(entry):
            raise UserError(f"{where}: lineage has {entry!r}; an entry needs verb and source.")
        missing = sorted(needed.get(str(entry["verb"]), set()) - set(entry))
        if missing:
            raise UserError(f"{where}: lineage has {entry!r}; it needs {', '.join(missing)}.")
        for key, kind in kinds.items():
            if key in entry and not isinstance(entry[key], kind):
                name = "list" if key == "trainable" else kind.__name__
                raise UserError(f"{where}: lineage has {entry!r}; {key} must be a {name}.")
    return tuple(value)


def spread(blocks: int, count: int, per_group: int = 1) -> tuple[Insertion, ...]:
    """The paper's plan: `count` copies, `per_group` on top of each of count/per_group groups.

    The copies of a group are of its top blocks, in their order. Groups that cannot be equal
    differ by at most one block, the larger ones spread evenly.
    """
    if count < 1:
        raise UserError(f"--blocks is {count}; it must be at least 1.")
    if per_group < 1:
        raise UserError(f"--per-group is {per_group}; it must be at least 1.")
    if count % per_group:
        raise UserError(
            f"--blocks {count} is no multiple of --per-group {per_group}; "
            f"take --blocks {count - count % per_group or per_group}."
        )
    groups = count // per_group
    if count > blocks:
        raise UserError(
            f"--blocks {count} is larger than the model, which has {blocks} blocks; "
            f"take at most {blocks}."
        )
    ends = [(group + 1) * blocks // groups for group in range(groups)]
    starts = [0, *ends[:-1]]
    insertions = []
    for start, end in zip(starts, ends, strict=True):
        if end - start < per_group:
            raise UserError(
                f"--per-group {per_group} is larger than a group of {end - start} blocks; "
                "take fewer per group."
            )
        insertions += [Insertion(end - 1, i) for i in range(end - per_group, end)]
    return tuple(insertions)


def after(blocks: int, positions: Sequence[int]) -> tuple[Insertion, ...]:
    """A copy of each named block right after it. Blocks are counted from 0."""
    for position in positions:
        if not 0 <= position < blocks:
            raise UserError(
                f"--after {position}: the model has blocks 0 to {blocks - 1}, counted from 0."
            )
    if len(set(positions)) != len(positions):
        raise UserError(f"--after {','.join(map(str, positions))}: names a block twice.")
    if not positions:
        raise UserError("--after: names no block.")
    return tuple(Insertion(position, position) for position in sorted(positions))
