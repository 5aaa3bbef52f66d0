"""YAML plus `key.path=value` overrides -> nested frozen dataclasses, and back.

The type of the field decides how a text is read, not YAML's guess: `2e-4` is a number where a
number is wanted, and `on` stays a text where a text is wanted. All problems of a file are
reported at once, each with the file and line or the override that it came from.

A dataclass may have a method `problems()` that yields `(field path, message)` for values that are
of the right type and wrong all the same; they are reported with the same file and line.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from llamapro_jax.errors import UserError, nearest

T = TypeVar("T")

_NULL = ("", "~", "null", "Null", "NULL")
_BOOL = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_SCALAR_NAMES = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}
_YAML_BREAKS = re.compile("[\x85\u2028\u2029]")
_BAD = object()  # what a conversion returns after it has reported a problem


def option(doc: str, default: Any = dataclasses.MISSING) -> Any:
    """A documented dataclass field; required when it has no default."""
    return dataclasses.field(default=default, metadata={"doc": doc})


@dataclasses.dataclass
class _Node:
    """A YAML value as text, with the place it came from (`run.yaml:3`, or the override)."""

    where: str
    content: str | list[_Node] | dict[str, _Node]
    quoted: bool = False

    @property
    def is_null(self) -> bool:
        return not self.quoted and isinstance(self.content, str) and self.content in _NULL

    def __str__(self) -> str:
        if isinstance(self.content, dict):
            return "a mapping"
        if isinstance(self.content, list):
            return "a list"
        if self.is_null:
            return "null"
        return repr(self.content) + (" in quotes" if self.quoted else "")


# ------------------------------------------------------------------- text -> nodes


def _from_yaml(
    node: yaml.Node | None, source: str, lines: bool, problems: list[str], inside: tuple = ()
) -> _Node:
    """The node tree of a composed document. `lines` adds the line number to `source`."""

    def place(n: yaml.Node) -> str:
        return f"{source}:{n.start_mark.line + 1}" if lines else source

    if node is None:
        return _Node(source, "")
    where = place(node)
    if node in inside:
        problems.append(f"{where}: an alias refers to the value that contains it.")
        return _Node(where, "")
    if not node.tag.startswith("tag:yaml.org,2002:"):
        problems.append(f"{where}: the tag {node.tag!r} means nothing here; remove it.")
    inside = (*inside, node)
    if isinstance(node, yaml.ScalarNode):
        return _Node(where, node.value, quoted=node.style is not None)
    if isinstance(node, yaml.SequenceNode):
        items = [_from_yaml(n, source, lines, problems, inside) for n in node.value]
        return _Node(where, items)
    content: dict[str, _Node] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            problems.append(f"{place(key)}: a key must be a text.")
            continue
        if key.value in content:
            first = content[key.value].where
            problems.append(f"{place(key)}: {key.value!r} is given twice (first at {first}).")
            continue
        content[key.value] = _from_yaml(value, source, lines, problems, inside)
        content[key.value].where = place(key)
    return _Node(where, content)


def _read_file(path: Path, problems: list[str]) -> _Node:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory; name a YAML file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}).") from None
    try:
        composed = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: is not YAML ({error.problem or error.context}).") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not YAML ({' '.join(str(error).split())}).") from None
    return _from_yaml(composed, str(path), True, problems)


def _apply_override(root: _Node, override: str, problems: list[str]) -> None:
    """Puts the value of `key.path=value` into the tree."""
    where = f"override {override!r}"
    path, equals, text = override.partition("=")
    path = path.strip()
    if not equals or not path or not all(path.split(".")):
        problems.append(f"{where}: is not of the form key.path=value.")
        return
    try:
        composed = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or "unreadable"
        problems.append(f"{where}: the value is not YAML ({reason}); put it in quotes.")
        return
    value = _from_yaml(composed, where, False, problems)
    *parents, last = path.split(".")
    node, done = root, ""
    for part in (*parents, last):
        name = done or "the configuration"
        if isinstance(node.content, list):
            if not part.isdecimal() or int(part) >= len(node.content):
                count = f"{len(node.content)} item" + "s" * (len(node.content) != 1)
                problems.append(f"{where}: {name} has {count}, counted from 0; no {part!r}.")
                return
            key: Any = int(part)
        else:
            if node.is_null:  # a section that is empty or absent so far
                node.content = {}
            if isinstance(node.content, str):
                problems.append(f"{where}: {name} is {node}, not a section with keys.")
                return
            if part.isdecimal() and part not in node.content:
                problems.append(f"{where}: {name} has no item {part}.")
                return
            key = part
            node.content.setdefault(key, _Node(where, ""))
        done = f"{done}.{part}" if done else part
        if done == path:
            node.content[key] = value
        else:
            node = node.content[key]


# ------------------------------------------------------------------- types


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (Union, types.UnionType)


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def describe_type(kind: Any) -> str:
    """A type in words, as error messages and the documentation name it."""
    if kind in _SCALAR_NAMES:
        return _SCALAR_NAMES[kind]
    if kind is type(None):
        return "null"
    if dataclasses.is_dataclass(kind):
        return f"a mapping with the keys {', '.join(_hints(kind))}"
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if _is_union(kind):
        return " or ".join(describe_type(a) for a in arguments)
    if typing.get_origin(kind) is tuple:
        item = arguments[0]
        if dataclasses.is_dataclass(item):
            return "a list of mappings"
        return f"a list, each {describe_type(item)}"
    if typing.get_origin(kind) is dict:
        return f"a mapping (each value {describe_type(arguments[1])})"
    raise TypeError(f"{kind!r}: a field of this type cannot be read from YAML")


def _section(kind: Any) -> type | None:
    """The dataclass that a field's type holds: itself, or the item of a tuple or dict of them."""
    if dataclasses.is_dataclass(kind):
        return kind
    sections = (_section(a) for a in typing.get_args(kind))
    return next((s for s in sections if s is not None), None)


@dataclasses.dataclass(frozen=True)
class OptionRow:
    """One setting, for the documentation and for suggestions."""

    path: str
    kind: str
    default: str
    doc: str


def option_rows(cls: type, prefix: str = "") -> Iterator[OptionRow]:
    """All settings below a dataclass; the items of a list of sections are `N`."""
    hints = _hints(cls)
    for field in dataclasses.fields(cls):
        kind, path = hints[field.name], prefix + field.name
        section = _section(kind)
        if not dataclasses.is_dataclass(kind):
            required = field.default is dataclasses.MISSING
            default = "required" if required else _plain_text(field.default)
            yield OptionRow(path, describe_type(kind), default, field.metadata.get("doc", ""))
            path += "" if _is_union(kind) else ".N"
        if section is not None:
            yield from option_rows(section, f"{path}.")


def _plain_text(value: Any) -> str:
    text = yaml.safe_dump(_plain(value), default_flow_style=True, width=1000, allow_unicode=True)
    return text.removesuffix("...\n").strip()


# ------------------------------------------------------------------- nodes -> dataclasses


class _Converter:
    """Converts nodes by type and gathers the problems."""

    def __init__(self, root: type, problems: list[str]):
        self.root = root
        self.problems = problems

    def report(self, node: _Node, path: str, message: str) -> Any:
        self.problems.append(": ".join(part for part in (node.where, path, message) if part))
        return _BAD

    def convert(self, kind: Any, node: _Node, path: str, expected: str = "") -> Any:
        """The value of `node` as `kind`, or _BAD after its problems were reported."""
        expected = expected or describe_type(kind)
        if dataclasses.is_dataclass(kind):
            return self.dataclass(kind, node, path)
        if _is_union(kind):
            return self.union(kind, node, path, expected)
        if typing.get_origin(kind) is tuple:
            return self.sequence(kind, node, path, expected)
        if typing.get_origin(kind) is dict:
            return self.mapping(kind, node, path, expected)
        if typing.get_origin(kind) is Literal:
            choices = typing.get_args(kind)
            if isinstance(node.content, str) and node.content in choices:
                return node.content
            near = nearest(node.content, choices) if isinstance(node.content, str) else ""
            return self.report(node, path, f"expected {expected}, got {node}.{near}")
        value = _scalar(kind, node)
        return (
            self.report(node, path, f"expected {expected}, got {node}.") if value is _BAD else value
        )

    def union(self, kind: Any, node: _Node, path: str, expected: str) -> Any:
        members = typing.get_args(kind)
        if node.is_null and type(None) in members:
            return None
        members = [m for m in members if m is not type(None)]
        if len(members) == 1:
            simple = _section(members[0]) is None
            return self.convert(members[0], node, path, expected if simple else "")
        for member in members:
            attempt = _Converter(self.root, [])
            value = attempt.convert(member, node, path)
            if not attempt.problems:
                return value
        return self.report(node, path, f"expected {expected}, got {node}.")

    def sequence(self, kind: Any, node: _Node, path: str, expected: str) -> Any:
        item = typing.get_args(kind)[0]
        items = node.content
        if isinstance(items, str) and not node.is_null and _section(item) is None:
            items = [node]  # a lone scalar is a list of one
        if not isinstance(items, list):
            return self.report(node, path, f"expected {expected}, got {node}.")
        values = [self.convert(item, n, f"{path}.{i}") for i, n in enumerate(items)]
        return _BAD if any(v is _BAD for v in values) else tuple(values)

    def mapping(self, kind: Any, node: _Node, path: str, expected: str) -> Any:
        if not isinstance(node.content, dict):
            return self.report(node, path, f"expected {expected}, got {node}.")
        item = typing.get_args(kind)[1]
        values = {k: self.convert(item, n, f"{path}.{k}") for k, n in node.content.items()}
        return _BAD if any(v is _BAD for v in values.values()) else values

    def dataclass(self, cls: type, node: _Node, path: str) -> Any:
        content = {} if node.is_null else node.content
        if not isinstance(content, dict):
            return self.report(node, path, f"expected {describe_type(cls)}, got {node}.")
        hints, prefix = _hints(cls), f"{path}." if path else ""
        for key in (k for k in content if k not in hints):
            self.report(content[key], prefix + key, f"unknown key.{self.suggest(key, hints)}")
        values = {}
        for field in dataclasses.fields(cls):
            kind, name = hints[field.name], prefix + field.name
            if field.name in content:
                values[field.name] = self.convert(kind, content[field.name], name)
            elif field.default is not dataclasses.MISSING:
                values[field.name] = field.default
            elif dataclasses.is_dataclass(kind):
                values[field.name] = self.convert(kind, _Node(node.where, ""), name)
            else:
                self.report(node, name, f"is missing; it must be {describe_type(kind)}.")
                values[field.name] = _BAD
        if any(v is _BAD for v in values.values()):
            return _BAD
        instance = cls(**values)
        for field_path, message in _own_problems(instance):
            self.report(_deepest(node, field_path), prefix + field_path, message)
        return instance

    def suggest(self, key: str, hints: dict[str, Any]) -> str:
        if near := nearest(key, hints):
            return near
        paths = [row.path for row in option_rows(self.root)]
        elsewhere = [p for p in paths if p.rpartition(".")[2] == key]
        if elsewhere:
            return " It exists as " + " and ".join(repr(p) for p in elsewhere) + "."
        return f" Known: {', '.join(hints)}."


def _scalar(kind: type, node: _Node) -> Any:
    text = node.content
    if not isinstance(text, str) or node.is_null:
        return _BAD
    if kind is str:
        return text
    if node.quoted:
        return _BAD
    if kind is bool:
        return _BOOL.get(text.lower(), _BAD)
    try:
        value = kind(text)
    except ValueError:
        return _BAD
    return _BAD if kind is float and not math.isfinite(value) else value


def _own_problems(instance: Any) -> Iterator[tuple[str, str]]:
    return instance.problems() if hasattr(instance, "problems") else iter(())


def _deepest(node: _Node, path: str) -> _Node:
    """The node at `path`, or the last one on the way that the file or an override gave."""
    for part in path.split("."):
        content = node.content
        if isinstance(content, dict) and part in content:
            node = content[part]
        elif isinstance(content, list) and part.isdecimal() and int(part) < len(content):
            node = content[int(part)]
        else:
            break
    return node


# ------------------------------------------------------------------- public functions


def load(cls: type[T], path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> T:
    """An instance of the dataclass `cls` from a YAML file (or nothing) and overrides.

    Raises UserError that lists every problem: unknown, duplicate and missing keys, values of
    the wrong type, and what the `problems()` of the dataclasses find.
    """
    problems: list[str] = []
    root = _Node("command line", "") if path is None else _read_file(Path(path), problems)
    if not root.is_null and not isinstance(root.content, dict):
        raise UserError(f"{root.where}: expected keys and values at the top, got {root}.")
    for override in overrides:
        _apply_override(root, override, problems)
    if path is not None:
        root.where = str(path)
    instance = _Converter(cls, problems).convert(cls, root, "")
    _raise(problems)
    return instance


def validate(instance: Any) -> None:
    """Raises UserError with all that the `problems()` of a dataclass and those below it find."""
    problems: list[str] = []

    def visit(value: Any, prefix: str) -> None:
        if dataclasses.is_dataclass(value):
            problems.extend(f"{prefix}{path}: {why}" for path, why in _own_problems(value))
            for field in dataclasses.fields(value):
                visit(getattr(value, field.name), f"{prefix}{field.name}.")
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                visit(item, f"{prefix}{i}.")
        elif isinstance(value, dict):
            for key, item in value.items():
                visit(item, f"{prefix}{key}.")

    visit(instance, "")
    _raise(problems)


def _line_number(problem: str) -> int:
    match = re.search(r":(\d+): ", problem)
    return int(match[1]) if match else 0


def _raise(problems: list[str]) -> None:
    problems = sorted(dict.fromkeys(problems), key=_line_number)
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError(f"{len(problems)} problems:\n  " + "\n  ".join(problems))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


def dump(instance: Any) -> str:
    """YAML that `load` reads back as an equal instance, every field written out."""
    plain = _plain(instance)
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    if _YAML_BREAKS.search(text):  # PyYAML writes these line breaks raw and reads them as spaces
        return yaml.safe_dump(plain, sort_keys=False)
    return text


def plain_leaves(instance: Any) -> Iterator[tuple[str, Any]]:
    """`(path, value)` of each field that is no section, as YAML has it."""
    return _leaves(_plain(instance))


def differences(before: Any, after: Any) -> Iterator[tuple[str, str, str]]:
    """`(path, value before, value after)` for each leaf in which two instances differ."""
    old, new = dict(plain_leaves(before)), dict(plain_leaves(after))
    for path in dict.fromkeys((*old, *new)):
        if path not in old or path not in new or old[path] != new[path]:
            yield (
                path,
                _plain_text(old[path]) if path in old else "absent",
                _plain_text(new[path]) if path in new else "absent",
            )


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list) and any(isinstance(v, dict) for v in value):
        items = list(enumerate(value))
    else:
        yield path, value
        return
    for key, item in items:
        yield from _leaves(item, f"{path}.{key}" if path else str(key))
