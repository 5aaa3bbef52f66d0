"""Whether what lies in a directory is still what was written there: `llamapro verify`."""

from __future__ import annotations

from pathlib import Path

from llamapro_jax import delta, flax_checkpoint, manifest
from llamapro_jax.errors import UserError
from llamapro_jax.fingerprint import FILE as FINGERPRINT_FILE
from llamapro_jax.hf.hub import resolve
from llamapro_jax.local_copies import fetched
from llamapro_jax.sources import open_source
from llamapro_jax.verification.findings import Findings

_DATA_FILE = "dataset_info.json"
_RUN_FILE = "run.json"


def verify(path: str, base: str | None = None) -> Findings:
    """Looks at all of an artefact, and goes on where something is wrong: every problem is listed.

    path: a Flax checkpoint, a run, an export or another Hugging Face directory (or a hub id), a
    delta, or a prepared data set. base: a model that `path` grew from, to prove that without its
    new blocks it is that base bit for bit. Memory is that of one tensor.

    Raises UserError when `path` is none of these, when `base` is no model, and when a base is
    named for a data set.
    """
    directory = fetched(path, fresh=True)
    if not directory.is_dir():
        directory = resolve(path)
    kind = kind_of(directory)
    if kind == "data set" and base is not None:
        raise UserError(f"{path}: is a data set; --base is for models.")
    original = None if base is None else open_source(base)
    findings = Findings(path, kind)
    if kind == "data set":
        from llamapro_jax.verification.data_sets import verify_data_set

        with findings.collecting(directory):
            verify_data_set(findings, directory)
    elif kind == "run":
        from llamapro_jax.verification.runs import verify_run

        verify_run(findings, directory, original)
    elif kind == "delta":
        from llamapro_jax.verification.delta import verify_delta

        verify_delta(findings, directory, original)
    elif kind == "Flax checkpoint":
        from llamapro_jax.verification.flax import verify_flax

        verify_flax(findings, directory, original)
    else:
        from llamapro_jax.verification.hugging_face import verify_hugging_face

        verify_hugging_face(findings, directory, original)
    return findings


def kind_of(directory: Path) -> str:
    """What a directory is, by the files in it. Raises UserError when it is nothing of ours."""

    def has(name: str) -> bool:
        return (directory / name).is_file()

    if has(_RUN_FILE):
        return "run"
    # The array files too, lest a checkpoint that lost its description pass for something else.
    if has(flax_checkpoint.DESCRIPTION) or (directory / flax_checkpoint.PARAMS).is_dir():
        return "Flax checkpoint"
    if has(delta.DESCRIPTION):
        return "delta"
    if has(_DATA_FILE) or any(directory.glob(f"*/{_DATA_FILE}")):
        return "data set"
    if has("config.json") or any(directory.glob("*.safetensors")):
        recorded = has(manifest.FILE) or has(FINGERPRINT_FILE)
        return "export" if recorded else "Hugging Face directory"
    raise UserError(
        f"{directory}: is neither a model, a run, a delta nor a prepared data set: it has none of "
        f"{', '.join(('config.json', _RUN_FILE, delta.DESCRIPTION, _DATA_FILE))}."
    )
