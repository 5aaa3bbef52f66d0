"""Everything that can be wrong with a run, found before anything expensive begins.

The order is from cheap to dear: the configuration, a run that is there already, the model's
architecture and plan, whether the texts exist. A new run then prepares its texts and takes the hash
of the model; one that goes on compares the hash of the model and those of the texts before it opens
them. A new run directory appears whole, with its texts prepared, or not at all.

Of several processes the first does all that. The others wait, and then open what it says, in the
same run directory: that, the model and the prepared texts lie on a file system that all share.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llamapro_jax.architecture import check_described, check_length
from llamapro_jax.checkpoint_files import Directory, committed_steps
from llamapro_jax.checkpoint_restore import check_not_lost
from llamapro_jax.config import (
    MAY_CHANGE_ON_RESUME,
    RunConfig,
    changed,
    load_config,
    save_config,
)
from llamapro_jax.errors import UserError
from llamapro_jax.files import (
    atomic_directory,
    atomic_write,
    read_json,
    require_new_directory,
    write_json,
)
from llamapro_jax.hf.config import read_config, render
from llamapro_jax.hf.tokenizer import Tokenizer, find_tokenizer, load_tokenizer, with_template
from llamapro_jax.launch.processes import SEEN_WITHIN, count, from_first
from llamapro_jax.manifest import write_manifest
from llamapro_jax.model.attention import choose, platform_of
from llamapro_jax.model.kernels import Problem
from llamapro_jax.model.weights import OUTER_BY_NAME, Tensor
from llamapro_jax.remote import is_remote
from llamapro_jax.sharding import build_mesh, check_model
from llamapro_jax.sinks import copy_tokenizer, lineage_entry
from llamapro_jax.sources import FlaxSource, Source, open_source
from llamapro_jax.training.events import LENGTHENED, TAKEN_OVER, record_event
from llamapro_jax.training.fit import check_rows
from llamapro_jax.training.lease import Lease, taken
from llamapro_jax.training.run_directory import (
    CHECKPOINTS,
    CONFIG_FILE,
    SUMMARY_FILE,
    RunRecord,
    RunSource,
    is_run,
)
from llamapro_jax.training.run_files import RunFiles
from llamapro_jax.training.state import check_spec
from llamapro_jax.training.texts import (
    DATA,
    Data,
    check_texts,
    fingerprints,
    open_data,
    open_prepared,
)

# What the processes of a run recognise its directory by, written anew at each start.
START_FILE = ".start"


@dataclass(frozen=True)
class Setup:
    """A run that may begin, or go on from `resume_step`, on the devices of `mesh`."""

    config: RunConfig
    place: RunFiles
    source: Source
    record: RunRecord
    data: Data
    resume_step: int | None
    mesh: Mesh

    @property
    def directory(self) -> Directory:
        """Of the run, as it was named; its checkpoints are there."""
        return self.place.run

    @property
    def files(self) -> Path:
        """Where the files of the run are that are none of a checkpoint."""
        return self.place.files


def finished(config: RunConfig, place: RunFiles) -> dict[str, Any] | None:
    """The summary of the run in `place`, which is `config.output`, when it is this one and done.

    Raises UserError when the directory holds anything but a run, or a run of other settings, and
    a finished one of another model or other texts. Of a model that is where it was, the hash is
    not taken again.
    """
    place.look()
    directory = place.files
    if not is_run(directory):
        require_new_directory(directory)
        return None
    _check_config(config, place)
    steps = committed_steps(place.run / CHECKPOINTS)
    summary = directory / SUMMARY_FILE
    if not (steps and steps[-1] == config.training.steps and summary.is_file()):
        return None
    record, tokenizer_directory = RunRecord.read(directory), directory
    model = _place(config.model)
    if model != record.model or (Path(model).is_absolute() and not Path(model).is_dir()):
        source = open_source(config.model)
        record, tokenizer_directory = _check_model(place, source), source.directory
        _update(config, directory, record)
    _check_texts_are_same(config, place, record, _tokenizer(tokenizer_directory))
    return read_json(summary)


def prepare(config: RunConfig, lease: Lease, place: RunFiles) -> Setup:
    """Opens the model, the texts and the run directory, and takes the lease of the latter.

    `config` is valid and `finished(config, place)` raised nothing. All processes of the run call
    this. Raises UserError for all bad input, when another run trains in the directory, and when
    this process does not see what the first one wrote.
    """
    prepared: list[Setup] = []

    def first() -> dict[str, Any]:
        setup = _prepare(config, lease, place)
        prepared.append(setup)
        token = uuid.uuid4().hex
        if count() > 1:
            atomic_write(setup.directory / START_FILE, token)
        return {
            "token": token,
            "resume_step": setup.resume_step,
            "rows": {where: (rows.path, rows.split) for where, rows in setup.data.rows.items()},
        }

    told = from_first(first)
    return prepared[0] if prepared else _follow(config, place, told)


def _prepare(config: RunConfig, lease: Lease, place: RunFiles) -> Setup:
    directory = place.files
    mesh = build_mesh(config.mesh)
    source = open_source(config.model, masters=True)
    check_described(config, source.config, source.plan)
    check_spec(config.trainable, source.config, source.plan)
    check_length(config, source.config)
    _check_mesh(config, source, mesh)
    _check_attention(config, source, mesh)
    tokenizer = _tokenizer(source.directory)
    template = check_texts(config, tokenizer)
    if not is_run(directory):
        _create(config, place, source, tokenizer, template, lease)
        record = RunRecord.read(directory)
        data = open_data(config, place.run, source.config.vocab_size, tokenizer)
    else:
        # Who asks another run to end has shown before that it can go on in its place.
        if not lease.takeover:
            _take(lease, place)
        record = _check_model(place, source)
        _check_tokenizer(place, source, tokenizer)
        _check_texts_are_same(config, place, record, tokenizer)
        if lease.takeover:
            _take(lease, place)
            record = RunRecord.read(directory)  # the other run may have added to it
        data = open_data(config, place.run, source.config.vocab_size, tokenizer)
        _check_same(place, record, data.fingerprints)
        check_not_lost(place.run / CHECKPOINTS)
        _note_length(config, place)
        record = _update(config, directory, record)
        place.copy()
    steps = committed_steps(place.run / CHECKPOINTS)
    return Setup(config, place, source, record, data, steps[-1] if steps else None, mesh)


def _follow(config: RunConfig, place: RunFiles, told: Mapping[str, Any]) -> Setup:
    """What process 0 prepared, as another process opens it."""
    _wait_for_start(place.run, told["token"])
    place.bring()
    source = open_source(config.model, masters=True)
    record = RunRecord.read(place.files)
    # Of other formats the digest takes the reading of all tensors, which process 0 has done.
    if isinstance(source, FlaxSource):
        _check_model(place, source)
    data = open_prepared(config, told["rows"], source.config.vocab_size)
    mesh = build_mesh(config.mesh)
    return Setup(config, place, source, record, data, told["resume_step"], mesh)


def _wait_for_start(directory: Directory, token: str) -> None:
    """Network file systems show a new file after some seconds."""
    file, deadline = directory / START_FILE, time.monotonic() + SEEN_WITHIN
    while not (file.is_file() and file.read_text() == token):
        if time.monotonic() > deadline:
            raise UserError(
                f"{directory}: process 0 wrote into it, and this process does not see that; set "
                "output to a directory on a file system that all hosts share."
            )
        time.sleep(0.2)


def _take(lease: Lease, place: RunFiles) -> None:
    former = lease.take(place.run)
    place.bring()  # the run before this one may have written until now
    if former is not None:
        step = max(committed_steps(place.run / CHECKPOINTS), default=0)
        print(f"{place.run}: takes over from {former}, at step {step}", flush=True)
        record_event(place.files, TAKEN_OVER, step, former=former)


# ------------------------------------------------------------------- checks


def _check_mesh(config: RunConfig, source: Source, mesh: Mesh) -> None:
    """Raises UserError when the model or a batch does not divide over the devices."""
    check_model(source.config, mesh.shape)
    check_rows(config, mesh.shape)


def _check_attention(config: RunConfig, source: Source, mesh: Mesh) -> None:
    """Raises UserError when training.attention names what cannot run here, before any reading."""
    model = source.config
    problem = Problem(
        platform=platform_of(jax.default_backend()),
        dtype=config.compute_dtype,
        length=config.data.sequence_length,
        query_heads=model.num_heads,
        kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        packed=True,
        sliding_window=model.sliding_window,
        context=mesh.shape["context"],
    )
    choose(config.training.attention, problem)


def _check_config(config: RunConfig, place: RunFiles) -> None:
    before = load_config(place.files / CONFIG_FILE)
    # Whether the model is the same is a matter of its fingerprint, not of its path.
    may_change = [*MAY_CHANGE_ON_RESUME, "model"]
    if config.training.steps > before.training.steps:
        may_change.append("training.steps")
    lines = changed(before, config, may_change)
    if lines:
        raise UserError(
            f"{place.run}: holds a run that began with other settings:\n  "
            + "\n  ".join(lines)
            + "\nGo on with the settings that it began with, or name another output."
        )


def _check_model(place: RunFiles, source: Source) -> RunRecord:
    """The record of the run, when it began from this model with this plan."""
    record = RunRecord.read(place.files)
    _, architecture, plan = read_config(place.files)
    if source.plan != plan or source.config != architecture:
        raise UserError(
            f"{place.run}: holds a run on a model with another plan or architecture: "
            f"{plan.num_blocks} blocks, the new ones at {list(plan.new_depths)}; {source.path} "
            f"has {source.plan.num_blocks}, the new ones at {list(source.plan.new_depths)}. "
            f"Give it {record.model} again, or name another output."
        )
    digest = source.fingerprint().digest
    if digest != record.model_digest:
        raise UserError(
            f"{place.run}: holds a run on another base: {source.path} has digest {digest[:12]}, "
            f"the run began from {record.model} with {record.model_digest[:12]}. Give it that "
            "model again, or name another output."
        )
    return record


def _check_tokenizer(place: RunFiles, source: Source, tokenizer: Tokenizer | None) -> None:
    own = _tokenizer(place.files)
    before, now = (one.fingerprint if one else None for one in (own, tokenizer))
    if now != before:
        has, had = (one[:12] if one else "none" for one in (now, before))
        raise UserError(
            f"{place.run}: holds a run with another tokenizer: that of {source.path} has "
            f"fingerprint {has}, the run began with {had}. Put it back, or name another output."
        )


def _check_texts_are_same(
    config: RunConfig, place: RunFiles, record: RunRecord, tokenizer: Tokenizer | None
) -> None:
    """Compares the texts, and the tokenizer, with those that the run began with."""
    _check_same(place, record, fingerprints(config, tokenizer))


def _check_same(place: RunFiles, record: RunRecord, fingerprints: Mapping[str, str]) -> None:
    for name, fingerprint in fingerprints.items():
        # None: of a data set made by others nothing was recorded once.
        before = record.data.get(name)
        if before not in (None, fingerprint):
            raise UserError(
                f"data.{name}: its text or tokenizer changed since the run in {place.run} began, "
                "which then would not read the same rows: its fingerprint was "
                f"{str(before)[:12]}, and is {fingerprint[:12]}. Put it back, or name another "
                "output."
            )


# ------------------------------------------------------------------- what a run begins with


def _place(model: str) -> str:
    path = Path(model).expanduser()
    return str(path.absolute()) if path.is_dir() else model


def _tokenizer(directory: Path) -> Tokenizer | None:
    return load_tokenizer(directory) if find_tokenizer(directory) else None


def _note_length(config: RunConfig, place: RunFiles) -> None:
    """Of a run that is to become longer than it was begun as: says so, and that it is not done."""
    before, now = load_config(place.files / CONFIG_FILE).training.steps, config.training.steps
    if now == before:
        return
    step = max(committed_steps(place.run / CHECKPOINTS), default=0)
    print(
        f"{place.run}: goes on to step {now} instead of {before}; from step {step} on the learning "
        f"rates are those of a run of {now} steps",
        flush=True,
    )
    record_event(place.files, LENGTHENED, step, before=before, now=now)
    place.remove(SUMMARY_FILE)


def _update(config: RunConfig, directory: Path, record: RunRecord) -> RunRecord:
    """Records the new values of what may change, and the new place of a model that moved."""
    record = replace(record, model=_place(config.model))
    record.write(directory)
    save_config(config, directory / CONFIG_FILE)
    return record


def _create(
    config: RunConfig,
    place: RunFiles,
    source: Source,
    tokenizer: Tokenizer | None,
    template: str | None,
    lease: Lease,
) -> None:
    if is_remote(place.run):
        lease.take(place.run)
        if is_run(place.run):  # It came, and its run ended, since this one looked.
            raise taken(place.run)
    try:
        _write_new(config, place, source, tokenizer, template, lease)
    except (OSError, UserError):
        if is_run(place.run):  # The same command, at the same time, was first.
            raise taken(place.run) from None
        raise
    place.create()
    if not is_remote(place.run):
        lease.take(place.run)


def _write_new(
    config: RunConfig,
    place: RunFiles,
    source: Source,
    tokenizer: Tokenizer | None,
    template: str | None,
    lease: Lease,
) -> None:
    with atomic_directory(place.files) as temporary:
        if not is_remote(place.run):
            lease.lock.take(temporary)
        beside = place.run if is_remote(place.run) else temporary
        data = open_data(config, beside, source.config.vocab_size, tokenizer)
        fingerprint = source.fingerprint()
        trained = lineage_entry(
            "train",
            source,
            trainable=list(config.trainable),
            steps=config.training.steps,
            base_digest=fingerprint.digest,
        )
        lineage = (*source.lineage, trained)
        stored = source.stored() if isinstance(source, RunSource) else source
        dtype = stored.dtype(Tensor(OUTER_BY_NAME["embed"], None)).name
        write_json(
            temporary / "config.json",
            render(source.hf_config, source.config, source.plan, dtype, lineage),
        )
        fingerprint.write(temporary)
        copy_tokenizer(source.directory, temporary)
        if template is not None:
            with_template(temporary, template)
        # Of what no later go changes; the texts have their own.
        write_manifest(temporary, but=DATA)
        save_config(config, temporary / CONFIG_FILE)
        RunRecord(
            model=_place(config.model),
            model_digest=fingerprint.digest,
            trainable=config.trainable,
            lineage=lineage,
            data=data.fingerprints,
        ).write(temporary)
