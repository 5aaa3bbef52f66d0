"""The Dockerfiles, without Docker: what they copy, what they install, as whom they run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from manifests import documents, pod, rendered
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from llamapro_jax.launch import ENTRY, xpk

ROOT = Path(__file__).resolve().parent.parent
FILES = {"tpu": ROOT / "launch/Dockerfile.tpu", "cuda12": ROOT / "launch/Dockerfile.gpu"}
CONSTRAINTS = ROOT / "launch/constraints.txt"


def instructions(file: Path) -> list[tuple[str, str]]:
    """Name and the rest of each instruction, joined at backslashes."""
    text = file.read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def pins() -> dict[str, str]:
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    found = dict(line.split("==") for line in lines)
    assert len(found) == len(lines) and lines == sorted(lines)
    return {canonicalize_name(name): version for name, version in found.items()}


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps it from the build."""
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"]
    return not any(path == keep or path.startswith(f"{keep}/") for keep in kept)


@pytest.mark.parametrize("extra", FILES)
def test_what_is_copied_exists_and_is_sent_to_the_build(extra: str) -> None:
    copied = []
    for name, rest in instructions(FILES[extra]):
        if name == "COPY" and not rest.startswith("--from="):
            copied += rest.split()[:-1]
    assert {"launch/constraints.txt", "llamapro_jax", "configs", "pyproject.toml"} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists(), source
        assert not ignored(source), source
    # What the metadata of the package refers to.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"]} <= set(copied)


def test_the_build_is_sent_nothing_else() -> None:
    first, *_ = (
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] != "#"
    )
    assert first == "*"
    for path in ("runs", "models/a/model.safetensors", ".git", "tests", "data", ".venv"):
        assert ignored(path)


@pytest.mark.parametrize("extra", FILES)
def test_what_the_package_declares_is_pinned_within_its_bounds(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = [
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"][extra],
        *project["project"]["optional-dependencies"]["gcs"],
        *project["build-system"]["requires"],
    ]
    found = pins()
    for line in declared:
        requirement = Requirement(line)
        version = found.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in {CONSTRAINTS.name}"
        assert version in requirement.specifier, f"{requirement.name}=={version}: {line}"
    # The compiler and the plugin belong to one version of jax.
    assert found["jax"] == found["jaxlib"] == found["jax-cuda12-plugin"]


@pytest.mark.parametrize("extra", FILES)
def test_every_install_is_constrained_and_the_base_is_one_version(extra: str) -> None:
    found = instructions(FILES[extra])
    bases = {rest.split()[0] for name, rest in found if name == "FROM"}
    [base] = bases
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+", base)
    installs = [rest for name, rest in found if name == "RUN" and "pip install" in rest]
    assert len(installs) == 2
    for line in installs:
        assert "--constraint constraints.txt" in line
    # gcs: `output` may be gs://...
    assert f'".[{extra},gcs]"' in installs[-1]
    for word in shlex.split(installs[0])[4:]:
        assert canonicalize_name(word) in pins()


@pytest.mark.parametrize("extra", FILES)
def test_the_image_is_no_root_and_starts_the_one_entry(extra: str) -> None:
    found = instructions(FILES[extra])
    last = {name: rest for name, rest in found}
    assert last["USER"].isdecimal() and last["USER"] != "0"
    assert f"--uid {last['USER']} " in " ".join(rest for name, rest in found if name == "RUN")
    # As the manifests start it: numbers, places and programs are theirs too.
    _, job_set = documents(rendered(ROOT / "configs/llama2_7b_pro.yaml", "h100-8"))
    spec = pod(job_set)
    [trainer] = spec["containers"]
    entry = json.loads(last["ENTRYPOINT"])
    assert entry == [*trainer["command"], *trainer["args"][:3]] and entry[-1] == ENTRY
    assert last["WORKDIR"] == trainer["workingDir"]
    user = int(last["USER"])
    assert trainer["securityContext"]["runAsUser"] == spec["securityContext"]["fsGroup"] == user
    assert f"COPY configs {xpk.IMAGE_HOME}/configs" in FILES[extra].read_text()
    platforms = {"tpu": "tpu,cpu", "cuda12": "cuda,cpu"}[extra]
    assert f"JAX_PLATFORMS={platforms}" in last["ENV"]


@pytest.mark.parametrize("extra", FILES)
def test_hadolint_finds_nothing(extra: str) -> None:
    beside = Path(sys.executable).parent / "hadolint"
    program = str(beside) if beside.exists() else shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([program, FILES[extra]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
