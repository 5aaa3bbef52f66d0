"""Grow a model by zero-initialised copies of some of its blocks, and prove that it is the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llamapro_jax.errors import UserError
from llamapro_jax.expansion import Insertion, after, spread
from llamapro_jax.files import require_new_directory
from llamapro_jax.fingerprint import Fingerprint
from llamapro_jax.proof import Proof, prove_identity
from llamapro_jax.sinks import Format, copy, lineage_entry
from llamapro_jax.sources import HFSource, Source, open_flax, open_hf, open_source
from llamapro_jax.views import Expanded


def insertions_for(
    num_blocks: int,
    blocks: int | None,
    per_group: int | None,
    positions: Sequence[int] | None,
) -> tuple[Insertion, ...]:
    """The insertions that --blocks and --per-group, or --after, ask for."""
    if positions is not None:
        if blocks is not None or per_group is not None:
            raise UserError("--after says where each block goes; leave out --blocks, --per-group.")
        return after(num_blocks, positions)
    if blocks is None:
        raise UserError("say how many blocks to insert (--blocks 8), or where (--after 3,7,11).")
    return spread(num_blocks, blocks, 1 if per_group is None else per_group)


def expand(
    source: str,
    destination: str | Path,
    *,
    blocks: int | None = None,
    per_group: int | None = None,
    positions: Sequence[int] | None = None,
    to: Format | None = None,
    prove: bool = True,
    allow_bin: bool = False,
) -> Proof | None:
    """Writes the grown model. Returns the identity proof (None when it was turned off).

    An expanded model or a run can be expanded again: its new blocks are folded into the base as
    a generation of their own, and the blocks inserted now are the next one.

    source: a Flax checkpoint, a run, a Hugging Face directory or a hub id. destination: a new
    directory. blocks and per_group: how many, spread as `expansion.spread` does; positions:
    instead, the blocks that are each followed by a copy, counted from 0. to: "flax" or "hf"; by
    default the format of the source. Memory is that of a few blocks.

    Raises UserError for a destination that is there, positions or numbers that the model does not
    have, and a proof that fails; nothing is left behind then.
    """
    require_new_directory(Path(destination))
    model = open_source(source, allow_bin=allow_bin)
    insertions = insertions_for(model.config.num_blocks, blocks, per_group, positions)
    grown = Expanded(model, insertions)
    to = to or ("hf" if isinstance(model, HFSource) else "flax")
    base_digest = model.fingerprint().digest
    lineage = (
        *model.lineage,
        lineage_entry(
            "expand", model, generation=grown.plan.generation, base_digest=base_digest
        ),
    )
    proofs: list[Proof] = []

    def check(directory: Path, fingerprint: Fingerprint) -> None:
        before = fingerprint.until(grown.plan, grown.plan.generation - 1)
        if before.digest != base_digest:
            changed = before.difference(model.fingerprint())
            raise UserError(f"{source}: changed while it was read: {', '.join(changed[:5])}.")
        if prove:
            proofs.append(prove_identity(model, written(directory, str(destination), to)))

    copy(grown, destination, to, lineage=lineage, check=check)
    return proofs[0] if proofs else None


def written(directory: Path, name: str, to: Format) -> Source:
    """What was just written, read again, with its final name for messages."""
    opened = open_flax(str(directory)) if to == "flax" else open_hf(str(directory))
    return replace(opened, path=name)
