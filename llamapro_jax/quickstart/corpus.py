"""Real text that every CPython carries: English prose and Python code, two domains at no cost.

Prose is the language reference in `pydoc_data.topics` and the docstrings of the standard
library; code is the standard library's source without docstrings and comments, so that neither
domain holds the other's text. Files are read and parsed, never imported. The figures differ a
little between Python versions, since their libraries do; on one version they are the same on
every machine.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import json
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamapro_jax.errors import UserError
from llamapro_jax.files import atomic_write
from llamapro_jax.quickstart.questions import questions

# Not the library's prose or code: tests, generated tables, bundled and installed packages, and
# what only some Python versions have in bulk.
_SKIPPED_DIRECTORIES = {
    "__pycache__",
    "_bundled",
    "dist-packages",
    "distutils",
    "encodings",
    "idle_test",
    "lib-dynload",
    "lib2to3",
    "msilib",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
_SKIPPED_FILES = re.compile(
    r"^(_sysconfigdata.*|__phello__.*|html/entities|keyword|token|opcode|_opcode_metadata|"
    r"stringprep|this)\.py$"
)
_SHORTEST_DOCSTRING = 40  # characters; "Return the size." teaches nothing about prose
_SHORTEST_DOCUMENT = 200

TEXTS = ("prose_train", "prose_heldout", "code_train", "code_heldout", "base_train")
CONVERSATIONS = ("chat_train", "chat_heldout")
FILES = (*TEXTS, *CONVERSATIONS)


@dataclass(frozen=True)
class Document:
    """One text: `name` is its path within the library, the same on every machine.

    Of an answer the name is the question.
    """

    name: str
    text: str


@dataclass(frozen=True)
class Source:
    """One file of the library: its path within it, its text and its parsed form."""

    name: str
    text: str
    tree: ast.Module


def split(
    documents: Iterable[Document], held_out_share: float, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """(training, held-out), decided for each document by a hash of its name and the seed.

    A document is on the same side on every machine and whatever other documents there are.
    """
    if not 0 < held_out_share < 1:
        raise UserError(f"held_out_share={held_out_share}: must be above 0 and below 1.")
    train: list[Document] = []
    held_out: list[Document] = []
    for document in documents:
        (held_out if _draw(document.name, f"split {seed}") < held_out_share else train).append(
            document
        )
    return train, held_out


def write_corpus(
    directory: str | Path,
    *,
    held_out_share: float = 0.1,
    base_code_share: float = 0.1,
    seed: int = 0,
) -> dict[str, Path]:
    """Writes five texts and two sets of conversations as JSON lines; returns name -> path.

    The texts have `name` and `text`, the conversations `messages`: a question and its answer.

    `prose_train`, `prose_heldout`, `code_train`, `code_heldout`, and `base_train`: all of
    `prose_train` with as much code mixed in as makes `base_code_share` of its bytes. The files of
    that code are taken out of `code_train`: what the new blocks learn, the base has not seen.
    """
    docstrings: list[Document] = []
    code: list[Document] = []
    pairs: list[Document] = []
    for source in _library():
        docstrings.append(_docstring_document(source))
        code.append(_code_document(source))
        pairs += (Document(*pair) for pair in questions(source.name, source.tree))
    prose_train, prose_heldout = split(_finish_prose(docstrings), held_out_share, seed)
    code_train, code_heldout = split(_finish(code), held_out_share, seed)
    chat_train, chat_heldout = split(pairs, held_out_share, seed)
    wanted = _size(prose_train) * base_code_share / (1 - base_code_share)
    base_code: list[Document] = []
    for document in sorted(code_train, key=lambda d: _draw(d.name, f"base {seed}")):
        # Stop short of files that would overshoot, so that one large module cannot be half of it.
        if _size(base_code) + _size([document]) <= wanted:
            base_code.append(document)
    taken = {document.name for document in base_code}
    parts = {
        "prose_train": prose_train,
        "prose_heldout": prose_heldout,
        "code_train": [document for document in code_train if document.name not in taken],
        "code_heldout": code_heldout,
        "base_train": sorted(prose_train + base_code, key=lambda d: _draw(d.name, f"order {seed}")),
    }
    records: dict[str, list[dict[str, Any]]] = {
        name: [{"name": d.name, "text": d.text} for d in documents]
        for name, documents in parts.items()
    }
    records["chat_train"] = [_conversation(pair) for pair in chat_train]
    records["chat_heldout"] = [_conversation(pair) for pair in chat_heldout]
    paths = {name: Path(directory) / f"{name}.jsonl" for name in FILES}
    for name, path in paths.items():
        lines = [json.dumps(record, ensure_ascii=False) for record in records[name]]
        atomic_write(path, "".join(line + "\n" for line in lines))
    return paths


def _conversation(pair: Document) -> dict[str, Any]:
    turns = (("user", pair.name), ("assistant", pair.text))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _docstring_document(source: Source) -> Document:
    docstrings = [inspect.cleandoc(node.value) for node in _docstrings(source.tree)]
    text = "\n\n".join(d for d in docstrings if len(d) >= _SHORTEST_DOCSTRING)
    return Document(f"docstrings/{source.name}", text)


def _code_document(source: Source) -> Document:
    return Document(f"code/{source.name}", _strip(source.text, source.tree))


def _finish_prose(docstrings: Iterable[Document]) -> list[Document]:
    return _finish(_without_repeated_paragraphs([*_topics(), *docstrings]))


def _draw(name: str, purpose: str) -> float:
    """A number in [0, 1) that depends on the two strings alone."""
    digest = hashlib.sha256(f"{purpose}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _size(documents: Iterable[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)


def _finish(documents: Iterable[Document]) -> list[Document]:
    """In order of name, without near-empty documents and without equal texts."""
    seen: set[str] = set()
    kept = []
    for document in sorted(documents, key=lambda d: d.name):
        if len(document.text) < _SHORTEST_DOCUMENT or document.text in seen:
            continue
        seen.add(document.text)
        kept.append(document)
    return kept


def _without_repeated_paragraphs(documents: list[Document]) -> list[Document]:
    """Each paragraph once. The longest document keeps it: it reads whole, its excerpts go."""
    seen: set[str] = set()
    kept = []
    for document in sorted(documents, key=lambda d: (-len(d.text), d.name)):
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", document.text.strip("\n")):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                paragraphs.append(paragraph.rstrip())
        kept.append(Document(document.name, "\n\n".join(paragraphs) + "\n"))
    return kept


def _topics() -> list[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "This Python has no pydoc_data.topics, from which the quickstart takes its prose. "
            "Install Python's whole standard library, or use another Python."
        ) from None
    return [
        Document(f"topics/{name}", "\n".join(line.rstrip() for line in text.splitlines()))
        for name, text in topics.items()
    ]


def _library() -> Iterator[Source]:
    """Each file that is the library's own and parses, in order of name."""
    root = Path(sysconfig.get_path("stdlib"))
    found = False
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        name = relative.as_posix()
        if _SKIPPED_DIRECTORIES & set(relative.parts) or _SKIPPED_FILES.match(name):
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read().replace("\f", "")  # page breaks, invisible in the source
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old modules
                tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        found = True
        yield Source(name, text, tree)
    if not found:
        raise UserError(
            f"{root}: holds no Python sources, from which the quickstart takes its text. Use a "
            "Python whose standard library is a directory of .py files."
        )


def strip_code(source: str) -> str:
    """`source` without docstrings and comments, otherwise as its author laid it out.

    Text is cut out by position, so what stays keeps its formatting; a body left empty gets
    `pass`, and blank lines are thinned to two at most, one before an indented line.

    Raises:
      SyntaxError: `source` is not Python.
    """
    return _strip(source, ast.parse(source))


def _strip(source: str, tree: ast.Module) -> str:
    lines: list[str | None] = list(source.split("\n"))
    protected = _drop_comments(source, lines)
    for statement, needs_body in _docstring_statements(tree):
        _drop_docstring(lines, statement, needs_body)
    return _thin_blank_lines(lines, protected)


def _drop_comments(source: str, lines: list[str | None]) -> set[int]:
    """Cuts comments out of `lines`; returns the indices of lines that end within a string."""
    protected: set[int] = set()
    starts: list[int] = []  # of the f-strings open at this point (own tokens since Python 3.12)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row, column = token.start
        kind = tokenize.tok_name[token.type]
        if kind == "COMMENT":
            lines[row - 1] = (lines[row - 1] or "")[:column].rstrip() or None
        elif kind == "STRING":
            protected.update(range(row - 1, token.end[0] - 1))
        elif kind.endswith("STRING_START"):
            starts.append(row)
        elif kind.endswith("STRING_END"):
            protected.update(range(starts.pop() - 1, token.end[0] - 1))
    return protected


def _drop_docstring(lines: list[str | None], statement: ast.Expr, needs_body: bool) -> None:
    first, last = statement.lineno - 1, (statement.end_lineno or statement.lineno) - 1
    # ast counts columns in UTF-8 bytes.
    before = (lines[first] or "").encode()[: statement.col_offset].decode()
    after = (lines[last] or "").encode()[statement.end_col_offset :].decode()
    lines[first : last + 1] = [None] * (last + 1 - first)
    if needs_body or before.strip() or after.strip():
        lines[first] = f"{before}pass{after}"
        return
    following = last + 1
    while following < len(lines) and not (lines[following] or "").strip():
        lines[following] = None
        following += 1


def _thin_blank_lines(lines: list[str | None], protected: set[int]) -> str:
    kept: list[str] = []
    blanks = 0
    inside = False  # the line before ended within a string: this one is content, even if blank
    for index, line in enumerate(lines):
        if line is None:
            continue
        if inside or line.strip():
            allowed = 1 if line[:1].isspace() else 2
            kept += [""] * (min(blanks, allowed) if kept else 0)
            blanks = 0
            kept.append(line)
        else:
            blanks += 1
        inside = index in protected
    return "\n".join(kept) + "\n" if kept else ""


def _docstrings(tree: ast.Module) -> list[ast.Constant]:
    """The docstring nodes of the module, its classes and functions, in order of position."""
    return [statement.value for statement, _ in _docstring_statements(tree)]


def _docstring_statements(tree: ast.Module) -> list[tuple[ast.Expr, bool]]:
    """(docstring statement, whether its body has nothing else and may not be empty)."""
    found = []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if not isinstance(node, kinds) or not node.body:
            continue
        first = node.body[0]
        if (
            isinstance(first, ast.Expr)
            and isinstance(first.value, ast.Constant)
            and isinstance(first.value.value, str)
        ):
            found.append((first, len(node.body) == 1 and not isinstance(node, ast.Module)))
    return sorted(found, key=lambda pair: (pair[0].lineno, pair[0].col_offset))
