"""Writes docs/reference.md from signatures and docstrings: `python docs/generate_reference.py`.

Only what `SECTIONS` names is public. The source is read, not imported, so that the page is the
same on every Python and needs no accelerator's packages.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = Path(__file__).with_name("reference.md")

HEAD = """\
# API reference

What can be called from Python: signatures, shapes, units and errors, from the docstrings by
`python docs/generate_reference.py`. [api.md](api.md) begins with examples; for the command line
there is `llamapro VERB --help`.

What is not listed here may change between two versions without notice. Axes of arrays are letters,
`tokens_BT` is [B, T]: B batch, T query length, S key length, D model, H query heads, K key/value
heads, C head dim, F feed-forward, V vocabulary. Everything that a user can mend raises
`llamapro_jax.UserError`.
"""

# Title, what it is for, and the names by module. A module's own name stands for itself.
SECTIONS: tuple[tuple[str, str, dict[str, tuple[str, ...]]], ...] = (
    (
        "Models in memory",
        "Open any model, score, generate.",
        {
            "llamapro_jax.model.api": ("load", "open_model", "OpenedModel", "Model"),
            "llamapro_jax.generate": ("stream_answer",),
            "llamapro_jax.sampling": ("Sampling",),
            "llamapro_jax.errors": ("UserError",),
        },
    ),
    (
        "The verbs as functions",
        "What `llamapro convert`, `expand`, `export`, `apply`, `verify`, `inspect`, `report` do.",
        {
            "llamapro_jax.convert": ("convert",),
            "llamapro_jax.expand": ("expand",),
            "llamapro_jax.proof": ("Proof", "prove_identity"),
            "llamapro_jax.export": ("export", "Export"),
            "llamapro_jax.delta": ("write_delta", "apply_delta"),
            "llamapro_jax.verify": ("verify",),
            "llamapro_jax.inspect": ("describe",),
            "llamapro_jax.report": ("write_report",),
        },
    ),
    (
        "Plans and architectures",
        "Which block stands where; the sizes of a model. [Concepts](concepts.md) has the words.",
        {
            "llamapro_jax.expansion": (
                "ExpansionPlan",
                "Insertion",
                "Block",
                "Segment",
                "spread",
                "after",
            ),
            "llamapro_jax.model.config": ("ModelConfig", "RopeScaling"),
        },
    ),
    (
        "Training",
        "A whole run, and the parts of its step for a loop of your own. The settings of a "
        "`RunConfig` are in [configuration.md](configuration.md).",
        {
            "llamapro_jax.config": ("load_config", "save_config"),
            "llamapro_jax.training.loop": ("train",),
            "llamapro_jax.training.run_directory": ("is_run", "open_run"),
            "llamapro_jax.sharding": ("build_mesh",),
            "llamapro_jax.model.params": ("load_params", "init_params"),
            "llamapro_jax.training.state": (
                "TrainState",
                "partition",
                "merge",
                "labels",
                "dtype_of",
                "init_state",
            ),
            "llamapro_jax.optimizer": ("build_optimizer", "build_schedule"),
            "llamapro_jax.training.step": ("build_train_step", "build_eval_step"),
            "llamapro_jax.flops": ("step_flops", "StepFlops"),
            "llamapro_jax.capacity": ("assess", "Assessment"),
        },
    ),
    (
        "Data",
        "Texts to rows, rows to batches. [data.md](data.md) says what a row is.",
        {
            "llamapro_jax.data.preparation.prepare": ("prepare", "Preparation"),
            "llamapro_jax.data.dataset": ("open_rows", "Rows"),
            "llamapro_jax.data.mixture": ("Mixture",),
        },
    ),
    (
        "Evaluation",
        "The figures of [evaluation.md](evaluation.md) and [lm_eval.md](lm_eval.md).",
        {
            "llamapro_jax.evaluation.texts": ("evaluate",),
            "llamapro_jax.evaluation.tasks": ("read_task", "Task", "encode_task", "measure_task"),
            "llamapro_jax.evaluation.harness": ("run_harness", "run_suite"),
        },
    ),
    (
        "Models on disk, a tensor at a time",
        "Every format behind one interface: read, look through, write, without a model in memory.",
        {
            "llamapro_jax.sources": ("open_source", "Source", "base_is_original"),
            "llamapro_jax.model.weights": ("tensors", "Tensor"),
            "llamapro_jax.views": ("Until", "Expanded", "Strength", "Cast"),
            "llamapro_jax.sinks": ("copy",),
            "llamapro_jax.fingerprint": ("Fingerprint", "TensorPrint"),
        },
    ),
)

# What is called by a shorter name than the module that defines it.
SHOWN = {
    "llamapro_jax.model.api.load": "llamapro_jax.load",
    "llamapro_jax.errors.UserError": "llamapro_jax.UserError",
}
Definition = ast.FunctionDef | ast.ClassDef


def public_names() -> Iterator[tuple[str, str]]:
    """(module, name) of everything on the page."""
    for _, _, modules in SECTIONS:
        for module, names in modules.items():
            yield from ((module, name) for name in names)


def shown(module: str, name: str) -> str:
    return SHOWN.get(f"{module}.{name}", f"{module}.{name}")


def definition(module: str, name: str) -> Definition:
    """The class or function `name`, as it is written in its module."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, Definition) and node.name == name:
            return node
    raise KeyError(f"{module} defines no {name}")


def signature(name: str, node: ast.FunctionDef, method: bool = False, wrap: bool = True) -> str:
    """`name(arguments) -> result`, an argument a line when it is long."""
    arguments = parameters(node.args)[1 if method else 0 :]
    result = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    line = f"{name}({', '.join(arguments)}){result}"
    if len(line) <= 96 or not wrap:
        return line
    return f"{name}(\n" + "".join(f"    {part},\n" for part in arguments) + f"){result}"


def parameters(arguments: ast.arguments) -> list[str]:
    """Each argument with its type and default, as it is written."""

    def one(argument: ast.arg, default: ast.expr | None = None) -> str:
        equals = "" if default is None else f" = {ast.unparse(default)}"
        return ast.unparse(argument) + equals

    missing = [None] * (len(arguments.args) - len(arguments.defaults))
    found = [
        one(*pair) for pair in zip(arguments.args, [*missing, *arguments.defaults], strict=True)
    ]
    if arguments.vararg is not None:
        found.append(f"*{one(arguments.vararg)}")
    elif arguments.kwonlyargs:
        found.append("*")
    found += [one(*p) for p in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg is not None:
        found.append(f"**{one(arguments.kwarg)}")
    return found


def is_a(node: ast.FunctionDef | ast.ClassDef, *decorators: str) -> bool:
    found = (ast.unparse(d).partition("(")[0].rpartition(".")[2] for d in node.decorator_list)
    return any(name in decorators for name in found)


def prose(docstring: str) -> str:
    """A docstring as Markdown: what stands below `Raises:` becomes a paragraph of its own."""
    parts = []
    for paragraph in docstring.split("\n\n"):
        head, _, rest = paragraph.partition("\n")
        if head in ("Raises:", "Returns:"):
            words = " ".join(rest.split())
            paragraph = f"*{head[:-1]}* " + re.sub(r"^(\w+Error): ", r"`\1`: ", words)
        parts.append(_escaped(paragraph))
    return "\n\n".join(parts)


def _escaped(text: str) -> str:
    """`<` as it is, outside of `code`."""
    pieces = re.split(r"(`[^`]*`)", text)
    kept = [p if p.startswith("`") else p.replace("<", "&lt;") for p in pieces]
    return "".join(kept)


def fields(node: ast.ClassDef) -> list[str]:
    """The fields of a dataclass, with those defaults that are plain values."""
    found = []
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and not ast.unparse(part.target).startswith("_"):
            if isinstance(part.value, ast.Call):
                part.value = None
            found.append(ast.unparse(part))
    return found


def members(node: ast.ClassDef) -> Iterator[ast.FunctionDef]:
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
            if not is_a(part, "overload") and ast.get_docstring(part):
                yield part


def entry(module: str, name: str) -> str:
    node, called = definition(module, name), shown(module, name)
    parts = [f"### `{called}`\n"]
    if isinstance(node, ast.FunctionDef):
        parts.append(f"```python\n{signature(name, node)}\n```\n")
        return "\n".join([*parts, prose(ast.get_docstring(node) or "")]) + "\n"
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    lines = [f"class {name}({bases}):" if bases else f"class {name}:"]
    lines += [f"    {field}" for field in fields(node)]
    shown_class = "\n".join(lines) if len(lines) > 1 else lines[0].removesuffix(":")
    parts.append(f"```python\n{shown_class}\n```\n")
    parts.append(prose(ast.get_docstring(node) or "") + "\n")
    for member in members(node):
        if is_a(member, "property", "cached_property"):
            title = (
                f"{member.name}: {ast.unparse(member.returns)}" if member.returns else member.name
            )
        else:
            title = signature(member.name, member, not is_a(member, "staticmethod"), wrap=False)
        words = textwrap.indent(prose(ast.get_docstring(member) or ""), "  ")
        parts.append(f"- `{title}`\n\n{words}\n")
    return "\n".join(parts)


def anchors() -> dict[tuple[str, str], str]:
    """The anchor that GitHub gives to the heading of each entry; those that repeat get a number."""
    seen: Counter[str] = Counter()
    found = {}
    for module, name in public_names():
        plain = re.sub(r"[^\w-]", "", shown(module, name).lower())
        found[module, name] = f"{plain}-{seen[plain]}" if seen[plain] else plain
        seen[plain] += 1
    return found


def reference_markdown() -> str:
    """The whole page."""
    parts, links = [HEAD], anchors()
    for title, purpose, modules in SECTIONS:
        names = [(module, name) for module, found in modules.items() for name in found]
        index = " · ".join(f"[`{name}`](#{links[module, name]})" for module, name in names)
        parts.append(f"## {title}\n\n{purpose}\n\n{index}\n")
        parts += [entry(module, name) for module, name in names]
    return re.sub(r"[ \t]+\n", "\n", "\n".join(parts))


if __name__ == "__main__":
    TARGET.write_text(reference_markdown(), encoding="utf-8")
    print(f"wrote {TARGET}")
