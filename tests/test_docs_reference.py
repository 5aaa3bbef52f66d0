"""docs/reference.md is what its script makes of the docstrings; it has what the pages import."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "docs" / "generate_reference.py"
    spec = importlib.util.spec_from_file_location("generate_reference", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python_blocks() -> list[tuple[str, str]]:
    """(page, code) of each block that is marked as Python, but for the generated signatures."""
    found = []
    for page in PAGES:
        if page.name != "reference.md":
            blocks = re.findall(
                r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE
            )
            found += [(page.name, block) for block in blocks]
    return found


def test_the_reference_is_up_to_date(script: ModuleType) -> None:
    page = script.reference_markdown()
    assert script.TARGET.read_text() == page, "run: python docs/generate_reference.py"


def test_everything_public_says_what_it_is(script: ModuleType) -> None:
    for module, name in script.public_names():
        docstring = ast.get_docstring(script.definition(module, name))
        assert docstring and len(docstring.split()) >= 5, f"{module}.{name}"


def test_signatures_are_as_they_are_written(script: ModuleType) -> None:
    code = (
        "def f(self, a: int, b: str = 'x', *rest: int, c: float, d: bool = True, **k: int)"
        " -> int: pass\n"
        "def g(a, *, b=None): pass\n"
    )
    f, g = ast.parse(code).body
    assert script.signature("f", f, method=True) == (
        "f(a: int, b: str = 'x', *rest: int, c: float, d: bool = True, **k: int) -> int"
    )
    assert script.signature("g", g) == "g(a, *, b = None)"
    f.name = "f" * 60
    assert script.signature(f.name, f, method=True).splitlines()[1] == "    a: int,"


def test_prose_keeps_what_markdown_would_eat(script: ModuleType) -> None:
    text = "Ends at <s>, `x < y`.\n\nRaises:\n  UserError: a value\n    out of range."
    assert script.prose(text) == (
        "Ends at &lt;s>, `x < y`.\n\n*Raises* `UserError`: a value out of range."
    )


def test_every_name_that_a_page_imports_is_public(script: ModuleType) -> None:
    public = {f"{module}.{name}" for module, name in script.public_names()}
    public |= set(script.SHOWN.values())
    blocks = python_blocks()
    assert len(blocks) >= 5
    for page, block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("llamapro_jax"):
                for alias in node.names:
                    assert f"{node.module}.{alias.name}" in public, page
