"""The package as it is declared agrees with the package as it is written."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import llamapro_jax

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llamapro_jax"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Import names whose distribution is called otherwise.
DISTRIBUTIONS = {"orbax": "orbax-checkpoint", "yaml": "pyyaml", "google": "protobuf"}
# What only an extra brings: imported inside functions, and its absence is handled there.
OPTIONAL = {"wandb", "datasets", "pyarrow", "lm-eval"}
# A class of lm_eval's model, in a file that is imported when lm_eval is asked for.
IMPORTED_LATE = {"harness_model.py"}
IMPORT_MODULE = "importlib.import_module"
# The one reader of PyTorch's own files, behind an explicit flag.
TORCH_READERS = {"llamapro_jax/hf/safetensors.py"}


def distribution(module: str) -> str:
    top = module.partition(".")[0]
    return canonicalize_name(DISTRIBUTIONS.get(top, top))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every absolute import in a file: the module, and whether it stands outside functions.

    `from a import b` counts as `a.b`, which may be a module; `import_module("a")` counts as `a`.
    A block under TYPE_CHECKING is left out: it is never executed.
    """

    def walk(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.level == 0:
                yield from ((f"{child.module}.{alias.name}", top) for alias in child.names)
            elif isinstance(child, ast.Call) and ast.unparse(child.func) == IMPORT_MODULE:
                if isinstance(child.args[0], ast.Constant):
                    yield child.args[0].value, top
            elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                continue
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, top and not inside)

    yield from walk(ast.parse(path.read_text()), True)


def third_party_imports() -> dict[str, set[str]]:
    """Distribution -> the files of the package that import it."""
    found: dict[str, set[str]] = {}
    for path in SOURCES:
        for module, _ in imports(path):
            top = module.partition(".")[0]
            if top not in sys.stdlib_module_names and top != "llamapro_jax":
                found.setdefault(distribution(module), set()).add(path.name)
    return found


def declared() -> dict[str, str]:
    """Distribution -> the line of pyproject.toml that declares it as a dependency."""
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line.strip() for line in block.group(1).splitlines()]
    return {canonicalize_name(Requirement(line.split('"')[1]).name): line for line in lines}


def test_the_scan_tells_top_level_from_late(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        "import a.b\nif TYPE_CHECKING:\n    import never\ntry:\n    from c import d\n"
        "except ImportError:\n    pass\ndef f():\n    import e\nclass G:\n    import h\n"
        "    def i(self):\n        from j import k\n"
        "        x = importlib.import_module('l').m\nfrom . import sibling\n"
    )
    assert list(imports(source)) == [
        ("a.b", True), ("c.d", True), ("e", False), ("h", True), ("j.k", False),
        ("l", False),
    ]  # fmt: skip


def test_version_is_the_same_everywhere() -> None:
    version = llamapro_jax.__version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert newest.group(1) == version
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == version


def test_citation_names_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    [paper] = citation["references"]
    assert paper["url"].endswith("2401.02415")
    assert len(paper["authors"]) == 8


def test_license_is_the_whole_text() -> None:
    text = (ROOT / "LICENSE").read_text()
    for part in ("Version 2.0, January 2004", "END OF TERMS AND CONDITIONS", "APPENDIX"):
        assert part in text


def test_extras_parse_and_bring_what_they_are_called() -> None:
    extras = {
        name: [Requirement(line) for line in lines]
        for name, lines in PROJECT["optional-dependencies"].items()
    }
    for accelerator in ("tpu", "cuda12", "cuda13"):
        [jax] = extras[accelerator]
        assert (jax.name, jax.extras) == ("jax", {accelerator})
    assert {"wandb", "test"} <= set(extras)
    [torch] = [r for r in extras["test"] if r.name == "torch"]
    assert torch.marker.evaluate({"python_version": "3.11"})
    assert not torch.marker.evaluate({"python_version": "3.13"})


def test_readme_that_the_package_shows_exists() -> None:
    assert (ROOT / PROJECT["readme"]).is_file()


def test_every_import_is_declared() -> None:
    undeclared = {
        name: sorted(files)
        for name, files in third_party_imports().items()
        if name not in declared() and name not in OPTIONAL | {"torch"}
    }
    assert undeclared == {}


def test_every_dependency_is_imported_or_says_why() -> None:
    imported = third_party_imports()
    unexplained = {name for name, line in declared().items() if "#" not in line} - set(imported)
    assert unexplained == set()


def test_a_dependency_that_is_imported_needs_no_excuse() -> None:
    excused = {name for name, line in declared().items() if "#" in line}
    assert excused & set(third_party_imports()) == set()


def test_torch_and_tensorflow_are_not_imported() -> None:
    importers = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        for module, _ in imports(path)
        if module.partition(".")[0] in ("torch", "tensorflow", "gradio")
    }
    assert importers == TORCH_READERS


def test_optional_packages_and_torch_are_imported_late() -> None:
    early = [
        (path.name, module)
        for path in SOURCES
        for module, top in imports(path)
        if top and distribution(module) in OPTIONAL | {"torch"} and path.name not in IMPORTED_LATE
    ]
    assert early == []


def test_nnx_is_not_used() -> None:
    # Its import path differs between the versions of jax that Python 3.11 and 3.12 resolve to.
    users = [p.name for p in SOURCES for module, _ in imports(p) if module.startswith("flax.nnx")]
    assert users == []


def test_the_package_imports_no_heavy_module() -> None:
    code = (
        "import sys, llamapro_jax; print(*sorted({m.partition('.')[0] for m in sys.modules} & "
        "{'jax', 'flax', 'numpy', 'torch', 'transformers', 'tensorflow_datasets'}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == ""


def repository_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name]


def test_no_path_of_somebodys_machine() -> None:
    # GKE has the drivers of its nodes in a directory of that kind.
    pattern = re.compile(rb"(?<![\w.~])/(?:home|Users|root|work)/(?!kubernetes/)\w+")
    found = {}
    for path in repository_files():
        match = path.is_file() and pattern.search(path.read_bytes())
        if match:
            found[str(path.relative_to(ROOT))] = match.group().decode()
    assert found == {}


def test_no_large_or_generated_file_is_tracked() -> None:
    generated = (".pyc", ".safetensors", ".array_record", ".msgpack", ".bin", ".pt", ".npz")
    found = [
        str(path.relative_to(ROOT))
        for path in repository_files()
        if path.is_file() and (path.suffix in generated or path.stat().st_size > 1_000_000)
    ]
    assert found == []
