"""Measure what a model learned and what it forgot: perplexity and its like on texts, and tasks.

Each --text is a UTF-8 file, a .jsonl with a field `text`, or a directory of them. Unshifted,
marginal and shifted are the shares of positions whose most likely token is first, second or third,
or later under the base; KL is from the base, in nats a token. Each --task is a .jsonl of multiple
choice or of problems that end in a number (GSM8K), in lm-evaluation-harness's field names;
--lm-eval and --suite run that harness's own tasks. A model with new blocks is measured with them
on, off (the base, bit for bit), and at each --strength between. For a run the table is also kept in
RUN/evaluation.json with the step of the run, where `llamapro report` finds it. --compare prints
several models side by side, with the LLaMA Pro paper's figures for the names that it has.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llamapro_jax.compilation_cache import AUTO, enabled

if TYPE_CHECKING:
    from llamapro_jax.evaluation.assessment import Request

HELP = "perplexity, tasks, and how far the model moved from its base"
EXAMPLE = """\
llamapro evaluate runs/llama2_7b_pro --text prose=data/prose.txt code=data/code.jsonl
llamapro evaluate runs/llama2_7b_pro --text code=src --strength 0.25 0.5 0.75 --json result.json
llamapro evaluate runs/instruct --text prose=data/prose.txt --base models/llama2-7b
llamapro evaluate runs/llama2_7b_pro --task gsm8k=data/gsm8k.jsonl --shots 5
llamapro evaluate --compare models/llama2-7b runs/llama2_7b_pro --task arc=data/arc.jsonl
llamapro evaluate runs/llama2_7b_pro --lm-eval arc_challenge hellaswag --limit 200"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    model = "Flax checkpoint, run, Hugging Face directory or hub id"
    add("model", metavar="MODEL", nargs="?", help=model)
    many: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    add("--compare", metavar="MODEL", **many, help="several models, side by side")
    add("--text", metavar="NAME=PATH", **many, help="a text and what the table calls it")
    add("--task", metavar="NAME=FILE", **many, help="a .jsonl of questions, and its name")
    add("--lm-eval", metavar="TASK", **many, help="a task of lm-evaluation-harness (extra `eval`)")
    add("--suite", metavar="FILE", help="a YAML file with tasks of lm-evaluation-harness")
    add("--include-path", metavar="DIR", help="where --lm-eval finds tasks of your own")
    add(
        "--allow-code-execution",
        action="store_true",
        help="run tasks that execute what the model writes, such as humaneval",
    )
    add("--shots", type=int, metavar="K", help="examples before each question (default 0)")
    add(
        "--shots-from",
        metavar="NAME=FILE",
        **many,
        help="where a --task's examples are from (default: its own first lines, not asked then)",
    )
    add("--limit", type=int, metavar="N", help="at most the first N questions of each task")
    add("--max-tokens", type=int, metavar="N", help="of a generated answer (default 256)")
    add("--generations", type=int, metavar="G", help="the model after G expansions; 0 the original")
    add(
        "--strength",
        type=float,
        metavar="S",
        nargs="+",
        action="extend",
        help="also with what the new blocks add times S, 0 to 1",
    )
    add("--base", metavar="PATH", help="compare with this model (default: MODEL's own base)")
    add("--max-rows", type=int, metavar="N", help="at most the first N rows of each text")
    add(
        "--sequence-length",
        type=int,
        metavar="T",
        help="tokens in a row (default: the run's, else what the model takes, at most 2048)",
    )
    add("--batch-size", type=int, default=8, metavar="B", help="rows at a time (default 8)")
    add("--dtype", default="float32", metavar="TYPE", help="float32 (the default) or bfloat16")
    add("--json", metavar="OUT", help="write all figures into this file")
    add("--allow-bin", action="store_true", help="read .bin weights, which needs PyTorch")


@enabled(AUTO)
def run(args: argparse.Namespace) -> None:
    check_arguments(args)
    from llamapro_jax.local_copies import path_here

    named = parse_named("--text", args.text, "code=data/code.txt")
    texts = {name: path_here(path) for name, path in named.items()}
    task_files = parse_named("--task", args.task, "arc=data/arc.jsonl")
    examples = parse_named("--shots-from", args.shots_from, "arc=data/arc_train.jsonl")
    for name in set(examples) - set(task_files):
        raise_error(f"--shots-from {name}={examples[name]}: no --task is called {name!r}.")

    from llamapro_jax.evaluation.texts import text_files

    for path in texts.values():  # a text that is missing is found before the model is opened
        text_files(path)
    request = _request(args, texts, task_files, examples)
    if args.compare:
        _run_compared(args, request)
    else:
        _run_alone(args, request)


def _request(
    args: argparse.Namespace,
    texts: Mapping[str, str],
    task_files: Mapping[str, str],
    examples: Mapping[str, str],
) -> Request:
    from llamapro_jax.evaluation.assessment import Request
    from llamapro_jax.evaluation.suite import load_suite
    from llamapro_jax.evaluation.tasks import MAX_TOKENS, read_task

    options = {"shots": args.shots or 0, "limit": args.limit}
    request = Request(
        texts=texts,
        tasks=[
            read_task(name, path, shots_from=examples.get(name), **options)
            for name, path in task_files.items()
        ],
        lm_eval=args.lm_eval,
        suite=load_suite(args.suite) if args.suite else None,
        include_path=args.include_path,
        shots=args.shots,
        limit=args.limit,
        allow_code=args.allow_code_execution,
        sequence_length=args.sequence_length,
        max_rows=args.max_rows,
        max_tokens=MAX_TOKENS if args.max_tokens is None else args.max_tokens,
        batch_size=args.batch_size,
    )
    request.check_harness()
    return request


def _run_alone(args: argparse.Namespace, request: Request) -> None:
    from llamapro_jax.evaluation.assessment import assess
    from llamapro_jax.evaluation.results_table import tasks_table
    from llamapro_jax.evaluation.texts import as_json, as_table, default_sequence_length
    from llamapro_jax.files import write_json
    from llamapro_jax.model.api import open_model
    from llamapro_jax.remote import as_path
    from llamapro_jax.training.run_directory import RunSource

    options = {"dtype": args.dtype, "allow_bin": args.allow_bin}
    model = open_model(args.model, generation=args.generations, **options)
    base = open_model(args.base, **options) if args.base else None
    strengths = None
    if args.strength:
        strengths = sorted({1.0, *args.strength, 0.0}, reverse=True)
    length = args.sequence_length
    length = default_sequence_length(model) if length is None else length
    results = assess(model, request, strengths=strengths, base=base)

    title = f"{args.model} in {args.dtype}"
    if results.texts:
        title += f", rows of {length} tokens"
    if args.generations is not None:
        title += f", after {args.generations} expansions"
    tables = []
    if results.texts:
        tables.append(as_table(results.texts))
    if results.tasks:
        tables.append(tasks_table(results.tasks))
    for table in tables:
        print_table(table, title)
    about = {
        "model": args.model,
        "step": model.source.step if isinstance(model.source, RunSource) else None,
        "base": args.base,
        "generations": args.generations,
        "dtype": args.dtype,
        "sequence_length": length,
        "max_rows": args.max_rows,
        "limit": args.limit,
    }
    if isinstance(model.source, RunSource):
        shown = {"title": title, "step": about["step"], "max_rows": args.max_rows, **tables[0]}
        if len(tables) > 1:
            shown["more"] = tables[1:]
        write_json(as_path(model.source.path) / "evaluation.json", shown)
    if args.json:
        kept = {"results": as_json(results.texts), "tasks": as_json(results.tasks)}
        write_json(args.json, {**about, **kept})


def _run_compared(args: argparse.Namespace, request: Request) -> None:
    from llamapro_jax.evaluation.assessment import assess_alone, prepare
    from llamapro_jax.evaluation.published import SOURCE
    from llamapro_jax.evaluation.results_table import side_by_side
    from llamapro_jax.evaluation.texts import as_json
    from llamapro_jax.files import write_json
    from llamapro_jax.model.api import open_model

    paths = list(dict.fromkeys([args.model, *args.compare] if args.model else args.compare))
    # All are opened, and all questions put into their ids, before the weights of one are read.
    prepared = [
        prepare(open_model(path, dtype=args.dtype, allow_bin=args.allow_bin), request)
        for path in paths
    ]
    results = {path: assess_alone(one) for path, one in zip(paths, prepared, strict=True)}
    table = side_by_side({path: (one.texts, one.tasks) for path, one in results.items()})
    print_table(table, f"in {args.dtype}; shares in percent; paper: {SOURCE}")
    if args.json:
        models = [
            {"model": path, "results": as_json(one.texts), "tasks": as_json(one.tasks)}
            for path, one in results.items()
        ]
        about = {"dtype": args.dtype, "max_rows": args.max_rows, "limit": args.limit}
        write_json(args.json, {**about, "models": models, "table": table})


# ------------------------------------------------------------------- arguments


def check_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for arguments that do not go together."""
    if not args.model and not args.compare:
        raise_error("no model; name one, or several after --compare.")
    if not (args.text or args.task or args.lm_eval or args.suite):
        raise_error("nothing to measure; give --text, --task, --lm-eval or --suite.")
    if args.compare:
        for name in ("generations", "strength", "base"):
            if getattr(args, name) is not None:
                raise_error(f"--{name} is of one model; leave it out with --compare.")
    if args.shots is not None and not (args.task or args.lm_eval):
        raise_error("--shots is of --task and --lm-eval; a suite names its own.")
    if args.shots_from and not args.shots:
        raise_error("--shots-from: say with --shots how many examples to take.")
    if args.include_path and not args.lm_eval:
        raise_error("--include-path is of --lm-eval; a suite names its own.")
    if args.max_tokens is not None and not args.task:
        raise_error("--max-tokens is of --task; tasks of lm_eval name their own.")
    for name in ("max_rows", "sequence_length"):
        if getattr(args, name) is not None and not args.text:
            raise_error(f"--{name.replace('_', '-')} is of --text; name one, or leave it out.")
    if args.json:
        check_output(args.json)


def raise_error(message: str) -> None:
    from llamapro_jax.errors import UserError

    raise UserError(message)


def check_output(path: str) -> None:
    """Raises UserError when a file cannot be written at `path`."""
    from pathlib import Path

    if Path(path).is_dir():
        raise_error(f"--json {path}: is a directory; name the file to write, such as out.json.")
    if not Path(path).parent.is_dir():
        raise_error(f"--json {path}: {Path(path).parent} is not a directory; make it first.")


def parse_named(option: str, arguments: Sequence[str], example: str) -> dict[str, str]:
    """NAME=PATH arguments. Raises UserError for another form or a name given twice."""
    named: dict[str, str] = {}
    for argument in arguments:
        name, _, path = argument.partition("=")
        if not name or not path:
            raise_error(f"{option} {argument}: must be NAME=PATH, such as {example}.")
        if name in named:
            raise_error(f"{option} {argument}: {name!r} is given twice; names must differ.")
        named[name] = path
    return named


# ------------------------------------------------------------------- tables


def print_table(table: Mapping[str, Sequence[Any]], title: str) -> None:
    """Prints the table on standard output; "-" stands for a figure that there is not."""
    from rich.console import Console
    from rich.table import Table

    rich_table = Table(title=title, title_justify="left")
    for i, column in enumerate(table["columns"]):
        texts = all(isinstance(row[i], str) for row in table["rows"])
        rich_table.add_column(column, justify="left" if texts else "right", overflow="fold")
    for row in table["rows"]:
        rich_table.add_row(*map(cell, row))
    console = Console()
    # A file or a pipe has no width of its own: nothing may wrap there.
    (console if console.is_terminal else Console(width=200)).print(rich_table)


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        digits = 4 if abs(value) < 10 else 2 if abs(value) < 100 else 1
        return f"{value:,.{digits}f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
