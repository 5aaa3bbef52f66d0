"""A small set for instruction tuning: what a function or class of the standard library does."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

# The first sentence of a docstring, when it says something and is no paragraph.
_SENTENCE = re.compile(r"(.{20,100}?\.)(?:\s|$)")


def questions(name: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(question, answer) for each public function and class of the module in the file `name`."""
    module = name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    if any(part.startswith("_") for part in module.split(".")):
        return
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None or node.name.startswith("_"):
            continue
        first_paragraph = " ".join(re.split(r"\n\s*\n", docstring)[0].split())
        sentence = _SENTENCE.match(first_paragraph)
        if sentence:
            yield f"What does {module}.{node.name} do?", sentence.group(1)
