"""A Hugging Face directory, an export among them: structure, and hashes where some are known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llamapro_jax.expansion import ExpansionPlan, checked_lineage
from llamapro_jax.files import read_json
from llamapro_jax.fingerprint import FILE as FINGERPRINT_FILE
from llamapro_jax.fingerprint import Fingerprint, TensorPrint, tensor_print
from llamapro_jax.hf.config import PLAN_KEY, read_config
from llamapro_jax.hf.safetensors import (
    BIN_INDEX,
    BIN_SINGLE,
    INDEX,
    SINGLE,
    Stored,
    check_shard,
    listed_files,
    read_header,
    read_stored,
)
from llamapro_jax.hf.tokenizer import find_tokenizer, load_tokenizer
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.model.weights import OUTER_BY_NAME, Tensor, tensors
from llamapro_jax.sources import Source
from llamapro_jax.verification.files import check_files
from llamapro_jax.verification.findings import Findings, progress
from llamapro_jax.verification.identity import prove_base


def verify_hugging_face(findings: Findings, directory: Path, base: Source | None) -> None:
    """Checks config, index, headers, tokenizer and all hashes, and the base when one is named."""
    config, plan = _config(findings, directory)
    stored = read_headers(findings, directory)
    if config is not None and stored:
        _check_table(findings, directory, config, stored)
    check_tokenizer(findings, directory)
    # An export has both files, and what was copied without either is no more than others' models.
    good = check_files(findings, directory, written=(directory / FINGERPRINT_FILE).is_file())
    record = check_record(findings, directory, stored)
    whole = bool(stored) and all(tensor.file.name in good for tensor in stored.values())
    prints: dict[str, TensorPrint] = {}
    # A file that is what was written needs no second look, unless its tensors are compared.
    if base is not None or (record is not None and not whole):
        prints = hash_stored(findings, stored)
        compare_prints(findings, {n: t.file for n, t in stored.items()}, prints, record)
    if record is None and not whole:
        findings.notes.append(
            "no hashes are known of its weights: their bytes were compared with nothing"
            + ("" if base else " (--base compares them with another model)")
        )
    if base is not None and config is not None and plan is not None:

        def print_of(tensor: Tensor) -> TensorPrint | None:
            return prints.get(tensor.name)

        prove_base(findings, str(directory), config, plan, print_of, base)


def _config(
    findings: Findings, directory: Path
) -> tuple[ModelConfig, ExpansionPlan] | tuple[None, None]:
    path = directory / "config.json"
    with findings.collecting(path):
        values, config, plan = read_config(directory)
        checked_lineage(values.get(PLAN_KEY, {}).get("lineage", ()), f"{path}: {PLAN_KEY}")
        if "auto_map" in values:
            findings.notes.append(
                "config.json names code to run (auto_map), which nothing here runs; others do, "
                "where they are told to trust it"
            )
        return config, plan
    return None, None


def read_headers(findings: Findings, directory: Path) -> dict[str, Stored]:
    """All tensors that the safetensors files have, as far as the files can be read."""
    if not any((directory / name).is_file() for name in (SINGLE, INDEX)):
        pickled = any((directory / name).is_file() for name in (BIN_SINGLE, BIN_INDEX))
        found = "only pickled weights, which run what their author wrote" if pickled else "neither"
        findings.problem(directory, None, found, f"{SINGLE} or {INDEX}")
        return {}
    files: Mapping[str, list[str] | None] = {}
    with findings.collecting(directory / INDEX):
        files = listed_files(directory, SINGLE, INDEX)
    stored: dict[str, Stored] = {}
    for file, expected in files.items():
        path = directory / file
        with findings.collecting(path):
            check_shard(directory, file)
            header = read_header(path)
            findings.count("safetensors files")
            for name in sorted(set(header) & set(stored)):
                findings.problem(path, name, "a second one", f"one, in {stored[name].file.name}")
            if expected is not None:
                for name in sorted(set(expected) - set(header)):
                    findings.problem(path, name, "no such tensor", f"one, as {INDEX} says")
                for name in sorted(set(header) - set(expected)):
                    findings.problem(path, name, "a tensor", f"none, as {INDEX} says")
            stored |= header
    if files and None not in files.values():
        _check_total(findings, directory, stored)
    for name in sorted(entry.name for entry in directory.glob("*.bin")):
        findings.notes.append(f"{name} is a pickle and was not looked at")
    return stored


def _check_total(findings: Findings, directory: Path, stored: Mapping[str, Stored]) -> None:
    metadata = read_json(directory / INDEX).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total is not None:
        found = sum(tensor.nbytes for tensor in stored.values())
        findings.compare(directory / INDEX, "total_size", total, found)


def _check_table(
    findings: Findings, directory: Path, config: ModelConfig, stored: Mapping[str, Stored]
) -> None:
    """Names, shapes and dtypes against what config.json says."""
    expected = {tensor.name: tensor for tensor in tensors(config)}
    dtypes: dict[str, str] = {}
    for name, tensor in expected.items():
        if name not in stored:
            findings.problem(directory, name, "no such tensor", "one, as config.json says")
            continue
        found = stored[name]
        shape = tensor.weight.hf_shape(config)
        findings.compare(found.file, name, f"shape {found.shape}", f"shape {shape}")
        dtype = dtypes.setdefault(tensor.weight.name, found.dtype.name)
        findings.compare(found.file, name, f"dtype {found.dtype.name}", f"dtype {dtype}")
    head = OUTER_BY_NAME["head"].hf_name
    for name in sorted(set(stored) - set(expected)):
        tied = name == head and config.tie_embeddings
        if not tied and not name.endswith(".rotary_emb.inv_freq"):
            expected_none = f"none, as config.json of {config.num_blocks} layers says"
            findings.problem(stored[name].file, name, "a tensor", expected_none)
    findings.count("tensors", len(stored))


def check_tokenizer(findings: Findings, directory: Path) -> None:
    """That the tokenizer, if there is one, can be loaded."""
    if find_tokenizer(directory):
        with findings.collecting(directory):
            load_tokenizer(directory)
            findings.count("tokenizers")


def check_record(
    findings: Findings, directory: Path, stored: Mapping[str, Stored]
) -> Fingerprint | None:
    """fingerprint.json, if there is one; problems where it is of other tensors."""
    path = directory / FINGERPRINT_FILE
    if not path.is_file():
        return None
    with findings.collecting(path):
        record = Fingerprint.read(directory)
        compare_names(findings, path, record, set(stored))
        return record
    return None


def compare_names(findings: Findings, path: Path, record: Fingerprint, names: set[str]) -> None:
    """Problems for tensors that either the record or the model lacks."""
    for name in sorted(names - set(record.tensors)):
        findings.problem(path, name, "no hash", "one")
    for name in sorted(set(record.tensors) - names):
        findings.problem(path, name, "a hash", "none, as there is no such tensor")


def hash_stored(findings: Findings, stored: Mapping[str, Stored]) -> dict[str, TensorPrint]:
    """The prints of all tensors, from their bytes."""
    prints = {}
    with progress("tensors", sum(tensor.nbytes for tensor in stored.values())) as done:
        for name, tensor in stored.items():
            with findings.collecting(tensor.file):
                prints[name] = tensor_print(read_stored(tensor))
                findings.count("tensors hashed")
            done(tensor.nbytes)
    return prints


def compare_prints(
    findings: Findings,
    files: Mapping[str, Path],
    prints: Mapping[str, TensorPrint],
    record: Fingerprint | None,
) -> None:
    """Problems for the tensors that are not what was recorded. files: where each tensor lies."""
    for name, expected in record.tensors.items() if record is not None else ():
        if name in prints and prints[name] != expected:
            found = prints[name]
            for what in ("shape", "dtype", "sha256"):
                value, known = getattr(found, what), getattr(expected, what)
                findings.compare(files[name], name, f"{what} {value}", f"{what} {known}")
