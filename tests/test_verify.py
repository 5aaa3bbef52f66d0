"""`llamapro verify`: every kind of artefact is good as it was written, and no damage passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_tiny
from models import write_with_tokenizer
from prepared import TEXTS, write_lines
from test_run_directory import write_run

from llamapro_jax import cli, manifest
from llamapro_jax.convert import convert
from llamapro_jax.data.preparation.prepare import prepare
from llamapro_jax.data.readers.documents import Content
from llamapro_jax.delta import write_delta
from llamapro_jax.errors import UserError
from llamapro_jax.expand import expand
from llamapro_jax.export import export
from llamapro_jax.files import read_json, write_json
from llamapro_jax.fingerprint import Fingerprint
from llamapro_jax.hf.safetensors import read_header
from llamapro_jax.hf.tokenizer import load_tokenizer, write_tokenizer
from llamapro_jax.verification.findings import Findings
from llamapro_jax.verify import verify

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each kind, in a directory by its name; tests damage copies."""
    root = tmp_path_factory.mktemp("artefacts")
    base = write_with_tokenizer(root / "base", shard_bytes=40_000)
    convert(str(base), root / "flax")
    expand(str(root / "flax"), root / "grown", blocks=2, prove=False)
    write_run(root / "run", root / "grown", steps=(5, 6))
    shutil.copy(root / "grown" / "fingerprint.json", root / "run")
    write_tokenizer(root / "grown", root / "run")
    (root / "run" / "config.yaml").write_text(_CONFIG.format(root=root))
    export(str(root / "run"), root / "export", shard_bytes=60_000)
    write_delta(str(root / "run"), root / "delta")
    write_lines(root / "texts.jsonl", TEXTS)
    tokenizer = load_tokenizer(base)
    prepare(Content(str(root / "texts.jsonl")), tokenizer, 16, target=root / "data", held_out=0.2)
    return root


_CONFIG = """\
model: {root}/grown
output: {root}/run
data:
  sequence_length: 16
  batch_size: 2
  sources:
    - name: words
      path: {root}/texts.jsonl
training:
  steps: 6
"""


@pytest.fixture
def copy_of(artefacts: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(artefacts / name, tmp_path / name))


def flip(file: Path, at: int = -1) -> None:
    """Flips one bit, counted in bytes from the start or the end."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def only_problem(findings: Findings) -> str:
    assert len(findings.problems) == 1, findings.as_text()
    return str(findings.problems[0])


# ------------------------------------------------------------------- all is good


@pytest.mark.parametrize(
    ("name", "kind", "checked"),
    [
        ("base", "Hugging Face directory", "tensors"),
        ("flax", "Flax checkpoint", "tensors hashed"),
        ("grown", "Flax checkpoint", "tensors hashed"),
        ("run", "run", "steps"),
        ("export", "export", "files"),
        ("delta", "delta", "tensors hashed"),
        ("data", "data set", "rows"),
    ],
)
def test_what_was_written_is_good(artefacts: Path, name: str, kind: str, checked: str) -> None:
    findings = verify(str(artefacts / name))
    assert findings.good, findings.as_text()
    assert findings.kind == kind
    assert findings.checked[checked] > 0


@pytest.mark.parametrize("name", ["flax", "grown", "run", "export"])
@pytest.mark.parametrize("base", ["base", "flax"])
def test_with_the_new_blocks_off_it_is_its_base(artefacts: Path, name: str, base: str) -> None:
    findings = verify(str(artefacts / name), str(artefacts / base))
    assert findings.good, findings.as_text()
    assert any("identity proven" in note for note in findings.notes)


def test_a_delta_knows_its_base(artefacts: Path, tmp_path: Path) -> None:
    findings = verify(str(artefacts / "delta"), str(artefacts / "base"))
    assert findings.good and any("`apply`" in note for note in findings.notes)
    other = write_with_tokenizer(tmp_path / "other", seed=1)
    findings = verify(str(artefacts / "delta"), str(other))
    assert "base_digest" in only_problem(findings)


def test_sha256sum_reads_what_an_export_records(artefacts: Path) -> None:
    import subprocess

    done = subprocess.run(
        ["sha256sum", "--check", "--strict", manifest.FILE],
        cwd=artefacts / "export",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    listed = {line.partition(":")[0] for line in done.stdout.splitlines()}
    files = {f.name for f in (artefacts / "export").iterdir()}
    assert listed == files - {manifest.FILE, "README.md"}


# ------------------------------------------------------------------- identity


def test_a_changed_frozen_tensor_is_named(copy_of: Callable[[str], Path]) -> None:
    base = copy_of("base")
    export = copy_of("export")
    # Recorded hashes that were made anew do not help: the bytes are compared.
    (shard,) = (f for f in export.glob("*.safetensors") if Q in read_header(f))
    flip(shard, read_header(shard)[Q].offset)
    (export / "fingerprint.json").unlink()
    manifest.write_manifest(export)
    assert verify(str(export)).good
    message = only_problem(verify(str(export), str(base)))
    assert Q in message and "sha256" in message and "the base's" in message


def test_a_base_of_other_sizes_is_no_base(artefacts: Path, tmp_path: Path) -> None:
    fewer = write_tiny(tmp_path / "fewer", num_hidden_layers=3)
    assert "expansion plan" in only_problem(verify(str(artefacts / "grown"), str(fewer)))


def test_a_base_that_computes_otherwise_is_no_base(copy_of: Callable[[str], Path]) -> None:
    base = copy_of("base")
    values = read_json(base / "config.json")
    write_json(base / "config.json", {**values, "rms_norm_eps": 1e-6})
    message = only_problem(verify(str(copy_of("grown")), str(base)))
    assert "rms_norm_eps: found 1e-05, expected 1e-06" in message


def test_what_trained_all_is_not_its_base(artefacts: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "all", artefacts / "grown", ("all",))
    (tmp_path / "all" / "config.yaml").write_text(_CONFIG.format(root=artefacts))
    assert verify(str(tmp_path / "all")).good
    findings = verify(str(tmp_path / "all"), str(artefacts / "base"))
    subjects = {problem.subject for problem in findings.problems}
    assert Q in subjects and "model.embed_tokens.weight" in subjects


# ------------------------------------------------------------------- damage is named, all of it


def test_flipped_bits_of_a_flax_checkpoint_are_all_named(copy_of: Callable[[str], Path]) -> None:
    grown = copy_of("grown")
    flip(grown / "params" / "base.q" / "2.0.0.0", 40)
    flip(grown / "params" / "new.o" / "1.0.0.0", 40)
    findings = verify(str(grown))
    assert len(findings.problems) == 2, findings.as_text()
    found = {(Path(p.file).name, p.subject) for p in findings.problems}
    assert ("base.q", "model.layers.3.self_attn.q_proj.weight") in found
    assert all("sha256" in p.found and "sha256" in str(p.expected) for p in findings.problems)


def test_what_a_flax_checkpoint_lost_is_named(copy_of: Callable[[str], Path]) -> None:
    flax = copy_of("flax")
    (flax / "params" / "base.q" / "2.0.0.0").unlink()
    shutil.rmtree(flax / "params" / "final_norm")
    shutil.copytree(flax / "params" / "embed", flax / "params" / "more")
    text = verify(str(flax)).as_text()
    assert "layers.2.self_attn.q_proj.weight" in text
    assert "final_norm" in text
    assert "more: found an array, expected none" in text


@pytest.mark.parametrize("file", ["llamapro.json", "fingerprint.json", "config.json"])
def test_a_flax_checkpoint_without_a_file_is_not_good(
    copy_of: Callable[[str], Path], file: str
) -> None:
    flax = copy_of("flax")
    (flax / file).unlink()
    findings = verify(str(flax))
    assert findings.kind == "Flax checkpoint" and not findings.good
    assert f"{file}: no such file" in findings.as_text()


def test_a_base_that_is_not_the_one_that_grew_is_noticed(copy_of: Callable[[str], Path]) -> None:
    grown = copy_of("grown")
    record = Fingerprint.read(grown)
    one = record.tensors[Q]
    changed = {**record.tensors, Q: replace(one, sha256="0" * 64)}
    Fingerprint(changed).write(grown)
    text = verify(str(grown)).as_text()
    assert "digest without generation 1" in text and Q in text


def test_every_bit_of_an_export_counts(copy_of: Callable[[str], Path]) -> None:
    export = copy_of("export")
    shards = sorted(export.glob("*.safetensors"))
    flip(shards[0])
    flip(shards[1])
    flip(export / "tokenizer_config.json", 1)
    findings = verify(str(export))
    files = {Path(p.file).name for p in findings.problems if p.subject == "SHA-256"}
    assert files == {shards[0].name, shards[1].name, "tokenizer_config.json"}
    tensors = [p for p in findings.problems if p.subject and "weight" in p.subject]
    assert len(tensors) == 2 and all("sha256" in p.found for p in tensors)


@pytest.mark.parametrize("name", ["flax", "export", "delta", "data"])
@pytest.mark.parametrize("how", ["lost", "empty"])
def test_what_lost_its_sums_is_not_good(
    copy_of: Callable[[str], Path], name: str, how: str
) -> None:
    directory = copy_of(name)
    [file] = directory.rglob(manifest.FILE)
    file.unlink()
    if how == "empty":
        file.touch()
    assert "SHA256SUMS: found no hashes, expected" in only_problem(verify(str(directory)))


def test_a_file_that_was_put_beside_an_export_is_named(copy_of: Callable[[str], Path]) -> None:
    export = copy_of("export")
    (export / "README.md").write_text("my own card")
    assert not verify(str(export)).notes
    (export / "added_tokens.json").write_text("{}")
    findings = verify(str(export))
    assert findings.good
    assert findings.notes == ["not in SHA256SUMS, so not verified: added_tokens.json"]


def test_a_missing_shard_and_a_wrong_index_are_both_named(copy_of: Callable[[str], Path]) -> None:
    base = copy_of("base")
    index = read_json(base / "model.safetensors.index.json")
    first, second, *_ = sorted(set(index["weight_map"].values()))
    moved = next(n for n, file in index["weight_map"].items() if file == second)
    index["weight_map"][moved] = first
    write_json(base / "model.safetensors.index.json", index)
    last = sorted(base.glob("*.safetensors"))[-1]
    last.unlink()
    text = verify(str(base)).as_text()
    assert f"{first}: {moved}: found no such tensor" in text
    assert f"{second}: {moved}: found a tensor, expected none" in text
    assert f"{last.name}: no such file" in text


def test_tensors_that_do_not_fit_config_json_are_all_named(copy_of: Callable[[str], Path]) -> None:
    base = copy_of("base")
    values = read_json(base / "config.json")
    write_json(base / "config.json", {**values, "num_hidden_layers": 3, "intermediate_size": 64})
    subjects = [p.subject for p in verify(str(base)).problems]
    assert "model.layers.3.mlp.up_proj.weight" in subjects
    for block in range(3):
        assert f"model.layers.{block}.mlp.up_proj.weight" in subjects


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    assert "only pickled weights" in only_problem(verify(str(base)))


def test_a_damaged_blob_of_a_hub_cache_is_noticed(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = write_tiny(repository / "snapshots" / ("0" * 40))
    (repository / "blobs").mkdir()
    for file in list(snapshot.iterdir()):
        blob = repository / "blobs" / manifest.sha256_of(file)
        file.rename(blob)
        file.symlink_to(Path("../../blobs") / blob.name)
    findings = verify(str(snapshot))
    assert findings.good and findings.checked["files"] == 2, findings.as_text()
    assert not findings.notes
    flip(snapshot / "model.safetensors")
    assert "model.safetensors: SHA-256: found" in only_problem(verify(str(snapshot)))


def test_a_damaged_delta_is_noticed(copy_of: Callable[[str], Path]) -> None:
    delta = copy_of("delta")
    flip(delta / "model.safetensors")
    flip(delta / "tokenizer.model")
    text = verify(str(delta)).as_text()
    assert "digest of the tensors" in text
    assert "model.safetensors: SHA-256" in text and "tokenizer.model: SHA-256" in text


def test_damage_in_each_step_of_a_run_is_named(copy_of: Callable[[str], Path]) -> None:
    run = copy_of("run")
    for step, leaf in ((5, "new.1.q"), (6, "new.1.down")):
        (chunk,) = sorted((run / "checkpoints" / str(step) / "trainable" / leaf).glob("0.0.*"))[:1]
        flip(chunk)
    text = verify(str(run)).as_text()
    assert "checkpoints/5" in text and "new.1.q" in text
    assert "checkpoints/6" in text and "new.1.down" in text


def test_the_files_of_a_run_that_do_not_change_count(copy_of: Callable[[str], Path]) -> None:
    run = copy_of("run")
    shutil.copytree(copy_of("data"), run / "data" / "words")
    manifest.write_manifest(run, but="data")
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": 3}\n')
    (run / "summary.json").write_text("{")
    shard = next((run / "data" / "words").glob("rows-train.*"))
    flip(run / "tokenizer.json", 1)
    flip(shard)
    findings = verify(str(run))
    text = findings.as_text()
    for problem in (
        "tokenizer.json: SHA-256",
        f"{shard.name}: SHA-256",
        "metrics.jsonl:2",
        "summary",
    ):
        assert problem in text
    assert findings.checked["rows"] > 0


def test_a_run_without_its_model_says_so(copy_of: Callable[[str], Path]) -> None:
    run = copy_of("run")
    record = read_json(run / "run.json")
    write_json(run / "run.json", {**record, "model": "/nowhere/model"})
    assert "/nowhere/model is missing" in only_problem(verify(str(run)))


def test_a_run_on_another_model_says_so(copy_of: Callable[[str], Path]) -> None:
    run = copy_of("run")
    record = read_json(run / "run.json")
    write_json(run / "run.json", {**record, "model_digest": "0" * 64})
    text = verify(str(run)).as_text()
    assert "is another one than the run began from" in text
    assert "fingerprint.json: digest: found" in text


def shards_of(data: Path, split: str) -> list[Path]:
    return sorted(data.glob(f"rows-{split}.*"))


def test_a_damaged_record_and_a_lost_shard_are_named(copy_of: Callable[[str], Path]) -> None:
    data = copy_of("data")
    (shard,) = shards_of(data, "train")
    content = bytearray(shard.read_bytes())
    for at in range(2000, 2100):
        content[at] ^= 0xFF
    shard.write_bytes(content)
    shards_of(data, "validation")[0].unlink()
    text = verify(str(data)).as_text()
    assert "train: row" in text
    assert "rows-validation" in text and "found no file" in text


def test_other_rows_than_were_prepared_are_noticed(copy_of: Callable[[str], Path]) -> None:
    data = copy_of("data")
    record = read_json(data / "fingerprint.json")
    record["splits"]["train"]["targets"] += 1
    record["field"] = "content"
    write_json(data / "fingerprint.json", record)
    text = verify(str(data)).as_text()
    assert "train: targets: found" in text
    assert "fingerprint.json: fingerprint: found" in text


def test_every_file_of_a_data_set_counts(copy_of: Callable[[str], Path]) -> None:
    data = copy_of("data")
    listed = manifest.read_manifest(data)
    files = {f.relative_to(data).as_posix() for f in data.rglob("*") if f.is_file()}
    assert set(listed) == files - {manifest.FILE}
    # What the records and the counts do not show.
    file = data / "tokenizer" / "tokenizer_config.json"
    file.write_text(file.read_text() + "\n")
    assert "tokenizer_config.json: SHA-256: found" in only_problem(verify(str(data)))


def test_a_shard_too_many_is_noticed(copy_of: Callable[[str], Path]) -> None:
    data = copy_of("data")
    (shard,) = shards_of(data, "train")
    shutil.copy(shard, data / "rows-train.array_record-00007")
    assert "found a shard, expected none" in only_problem(verify(str(data)))


# ------------------------------------------------------------------- the verb


def test_status_and_json(
    copy_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flax = copy_of("flax")
    assert cli.main(["verify", str(flax)]) == 0
    assert "good" in capsys.readouterr().out
    flip(flax / "params" / "final_norm" / "0")
    assert cli.main(["verify", str(flax), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["good"]
    (problem,) = found["problems"]
    assert problem["subject"] == "model.norm.weight"
    assert problem["file"].endswith("params/final_norm")
    assert problem["found"] != problem["expected"]


def test_what_is_no_artefact_is_refused(
    artefacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", str(tmp_path)]) == 2
    assert "is neither a model, a run" in capsys.readouterr().err
    with pytest.raises(UserError, match="no such directory"):
        verify(str(tmp_path / "none"))
    with pytest.raises(UserError, match="--base is for models"):
        verify(str(artefacts / "data"), str(artefacts / "base"))
    with pytest.raises(UserError, match="no such directory"):
        verify(str(artefacts / "flax"), str(tmp_path / "none"))


def test_memory_is_that_of_a_tensor(tmp_path: Path) -> None:
    import tracemalloc

    source = write_tiny(tmp_path / "base", dtype=np.float16, vocab_size=20_000, num_hidden_layers=8)
    convert(str(source), tmp_path / "flax")
    largest = 20_000 * 32 * 2
    tracemalloc.start()
    try:
        assert verify(str(tmp_path / "flax"), str(source)).good
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * largest
