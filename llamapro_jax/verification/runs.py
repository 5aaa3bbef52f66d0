"""A run directory: its record, each step that was saved, and the model that it began from."""

from __future__ import annotations

from pathlib import Path

from llamapro_jax import manifest
from llamapro_jax.checkpoint_files import (
    COMMIT_FILE,
    committed_steps,
    steps_without_commit,
    verify_step,
)
from llamapro_jax.config import RunConfig
from llamapro_jax.files import read_json
from llamapro_jax.fingerprint import FILE as FINGERPRINT_FILE
from llamapro_jax.fingerprint import Fingerprint, TensorPrint, tensor_print
from llamapro_jax.hf.config import read_config
from llamapro_jax.metrics import METRICS_FILE, read_metrics
from llamapro_jax.model.weights import Tensor
from llamapro_jax.sources import Source
from llamapro_jax.training.run_directory import (
    CHECKPOINTS,
    CONFIG_FILE,
    RUN_FILE,
    SUMMARY_FILE,
    RunRecord,
    RunSource,
    open_run,
)
from llamapro_jax.training.texts import DATA
from llamapro_jax.typed_yaml import load
from llamapro_jax.verification.data_sets import verify_data_set
from llamapro_jax.verification.files import check_files
from llamapro_jax.verification.findings import Findings, Problem, progress
from llamapro_jax.verification.hugging_face import check_tokenizer
from llamapro_jax.verification.identity import prove_base


def verify_run(findings: Findings, directory: Path, base: Source | None) -> None:
    """Reads every array of every step, without making a model of them."""
    record = None
    with findings.collecting(directory / RUN_FILE):
        record = RunRecord.read(directory)
    with findings.collecting(directory / CONFIG_FILE):
        load(RunConfig, directory / CONFIG_FILE)
    with findings.collecting(directory / "config.json"):
        read_config(directory)
    check_tokenizer(findings, directory)
    # Not the log, the settings and what else a run changes while it goes on.
    check_files(findings, directory, complete=False, written=False)
    if not (directory / manifest.FILE).is_file():
        findings.notes.append(
            f"no {manifest.FILE}: config.json and the tokenizer were compared with nothing"
        )
    _check_log(findings, directory)
    _check_texts(findings, directory / DATA)
    _check_steps(findings, directory / CHECKPOINTS)
    if record is not None:
        _check_model(findings, directory, record, base)


def _check_log(findings: Findings, directory: Path) -> None:
    if (directory / METRICS_FILE).is_file():
        with findings.collecting(directory / METRICS_FILE):
            findings.count("lines of the log", len(read_metrics(directory)))
    if (directory / SUMMARY_FILE).is_file():
        with findings.collecting(directory / SUMMARY_FILE):
            read_json(directory / SUMMARY_FILE)


def _check_texts(findings: Findings, prepared: Path) -> None:
    """What the run prepared for itself."""
    for file in sorted(prepared.glob("*/dataset_info.json")):
        with findings.collecting(file.parent):
            verify_data_set(findings, file.parent)


def _check_steps(findings: Findings, checkpoints: Path) -> None:
    steps = committed_steps(checkpoints)
    with progress("steps", len(steps)) as done:
        for step in steps:
            where = checkpoints / str(step)
            with findings.collecting(where):
                for problem in verify_step(where):
                    findings.problems.append(Problem(str(where), None, problem))
                findings.count("steps")
            done(1)
    uncommitted = steps_without_commit(checkpoints)
    for step in uncommitted:
        findings.problem(checkpoints / str(step), None, f"no {COMMIT_FILE}", "one, in a whole step")
    if not steps and not uncommitted:
        findings.notes.append("no step was saved yet")
    if checkpoints.is_dir():
        known = {str(step) for step in steps}
        for entry in sorted(checkpoints.iterdir()):
            if entry.is_dir() and entry.name not in known:
                findings.notes.append(f"{entry.name} in {checkpoints.name} is no finished step")


def _check_model(
    findings: Findings, directory: Path, record: RunRecord, base: Source | None
) -> None:
    """That the model of run.json is the one the run began from, and what it was grown from."""
    if (directory / FINGERPRINT_FILE).is_file():
        with findings.collecting(directory / FINGERPRINT_FILE):
            digest = Fingerprint.read(directory).digest
            findings.compare(directory / FINGERPRINT_FILE, "digest", digest, record.model_digest)
    if not committed_steps(directory / CHECKPOINTS):
        return
    with findings.collecting(directory / RUN_FILE):
        source = open_run(directory)
        findings.notes.append(
            f"its model is {record.model}, digest {record.model_digest[:12]}; that one's own bytes "
            "are verified by its own `llamapro verify`"
        )
        if base is not None:
            _prove(findings, directory, source, base)


def _prove(findings: Findings, directory: Path, source: RunSource, base: Source) -> None:
    def print_of(tensor: Tensor) -> TensorPrint | None:
        with findings.collecting(directory):
            return tensor_print(source.read(tensor))
        return None

    prove_base(findings, str(directory), source.config, source.plan, print_of, base)
