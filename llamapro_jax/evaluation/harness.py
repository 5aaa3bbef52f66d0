"""Tasks of lm-evaluation-harness on our models: `docs/lm_eval.md`.

lm_eval is imported only when something is called, so that this module is there without the extra
`eval`. Tasks of one's own, with data on disk, need no network.
"""

from __future__ import annotations

import importlib
import logging
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llamapro_jax.errors import UserError, nearest
from llamapro_jax.evaluation.suite import SuiteConfig

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from llamapro_jax.evaluation.harness_model import HarnessModel
    from llamapro_jax.model.api import Model

log = logging.getLogger(__name__)

CODE_FLAG = "--allow-code-execution"
RESAMPLES = 1000  # for the standard error of a figure that is no mean, such as a perplexity

Results = dict[str, dict[str, float]]


def require_lm_eval() -> None:
    """Raises UserError when the extra `eval` is not installed."""
    try:
        importlib.import_module("lm_eval")
    except ModuleNotFoundError:
        raise UserError(
            "tasks of lm-evaluation-harness need the package lm_eval; install it with "
            "`pip install 'llamapro_jax[eval]'`."
        ) from None


# ------------------------------------------------------------------- before a model is opened


def check_harness(
    tasks: Sequence[str], include_path: str | Path | None = None, allow_code: bool = False
) -> None:
    """What can be wrong with tasks; reads their data, fetching what is not on disk.

    Raises:
      UserError: no task, one that does not exist or cannot be made, one that executes code that
        the model writes without `allow_code`, data that is neither here nor can be fetched.
    """
    require_lm_eval()
    with _surroundings(allow_code):
        _load(_manager(tasks, include_path), tasks, allow_code)


def check_suite(suite: SuiteConfig, allow_code: bool = False) -> None:
    """`check_harness` of a suite's tasks."""
    check_harness([task.name for task in suite.tasks], suite.include_path, allow_code)


@lru_cache(maxsize=4)
def _all_tasks(include_path: str | None) -> TaskManager:
    """With the tasks of the harness itself: thousands of files, which takes some seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _manager(tasks: Sequence[str], include_path: str | Path | None) -> TaskManager:
    """What knows all of `tasks`; the harness's own tasks are left out where none is asked for."""
    from lm_eval.tasks import TaskManager

    if not tasks:
        raise UserError("no task to evaluate on; name at least one.")
    path = None if include_path is None else str(include_path)
    if path is not None and not Path(path).is_dir():
        raise UserError(f"{path}: is not a directory; name the one that holds the tasks' YAML.")
    manager = TaskManager(include_path=path, include_defaults=False)
    if not all(_known(manager, task) for task in tasks):
        manager = _all_tasks(path)
    for task in tasks:
        if not _known(manager, task):
            unread = "" if path is None else "".join(f" {line}" for line in _unread(path))
            raise UserError(
                f"{task}: is no task of lm-evaluation-harness"
                + (f", and not in {path}." if path else "; name one of your own by its directory.")
                + nearest(task, manager.all_tasks)
                + unread
            )
    return manager


def _known(manager: TaskManager, task: str) -> bool:
    return task in manager.task_index or (task.endswith(".yaml") and Path(task).is_file())


def _unread(directory: str) -> Iterator[str]:
    """The files that the harness passes over in silence, and why."""
    from lm_eval.tasks._index import TaskIndex
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in sorted(Path(directory).rglob("*.yaml")):
        try:
            TaskIndex.process_cfg(load_yaml(path, resolve_func=False), path, {})
        except Exception as error:  # whatever a YAML file can do wrong
            yield f"{path}: cannot be read ({_first_line(error)})."


def _unsafe(manager: TaskManager, task: str | Mapping[str, Any]) -> Iterator[str]:
    """The tasks within a task, group or tag that say that they execute what the model writes."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if isinstance(task, Mapping):  # a member of a group, with settings of its own
        config: Mapping[str, Any] = task
        name = str(task.get("task") or task.get("group"))
        if isinstance(task.get("task"), str):
            yield from _unsafe(manager, name)
    else:
        name, entry = task, manager.task_index.get(task)
        if entry is None:
            config = load_yaml(task, resolve_func=False) if Path(task).is_file() else {}
        else:
            config = entry.cfg or {}
            if not config:  # a tag
                for member in sorted(entry.tags - {task}):
                    yield from _unsafe(manager, member)
    if config.get("unsafe_code"):
        yield name
    if isinstance(config.get("task"), list):
        for member in config["task"]:
            yield from _unsafe(manager, member)


def _check_code(names: Sequence[str], allow_code: bool) -> None:
    if names and not allow_code:
        raise UserError(
            f"{', '.join(dict.fromkeys(names))}: executes the code that the model writes, on this "
            f"machine and as you. If that is what you want, in a container say, give {CODE_FLAG}."
        )


def _load(
    manager: TaskManager, tasks: Sequence[str], allow_code: bool
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """What lm_eval's `evaluate` takes, and for each of `tasks` the names of its results."""
    _check_code([name for task in tasks for name in _unsafe(manager, task)], allow_code)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    names: dict[str, list[str]] = {}
    for task in tasks:
        try:
            one = manager.load([task])
        except Exception as error:  # data, YAML, templates, and the tasks' own Python
            raise _load_error(task, error) from error
        twice = sorted(one["tasks"].keys() & loaded["tasks"].keys())
        if twice:
            raise UserError(f"{task}: its task {twice[0]} is asked for twice; name it once.")
        for part, found in loaded.items():
            found.update(one.get(part, {}))
        # The first group is the one that was asked for; a tag is no group.
        groups = list(one.get("groups", {}))[:1]
        names[task] = groups or list(one["tasks"])
    unsafe = [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    _check_code(unsafe, allow_code)
    return loaded, names


def _load_error(task: str, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError):  # ConnectionError and the hub's errors are such
        return UserError(
            f"{task}: its data cannot be read ({_first_line(error)}). The tasks of "
            "lm-evaluation-harness have their data on the Hugging Face hub: allow the network, or "
            "fetch it once where there is one and copy HF_HOME. A task of your own names files in "
            "dataset_kwargs.data_files, from the working directory."
        )
    if isinstance(error, ImportError):
        return UserError(f"{task}: needs a package that is not here ({_first_line(error)}).")
    return UserError(f"{task}: cannot be made ({_first_line(error)}); mend the task's YAML.")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def _surroundings(allow_code: bool) -> Iterator[None]:
    """As `lm_eval` itself runs, but for what it and its libraries would do without being asked."""
    import datasets
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    environment = dict(os.environ)
    counts = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    states = random.getstate(), np.random.get_state()
    # A pool of processes does not go with JAX's threads.
    os.environ["DISABLE_MULTIPROC"] = "1"
    if allow_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    # It is told to a server how often local JSONL is read.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    try:
        yield
    finally:
        for name in ("DISABLE_MULTIPROC", "HF_ALLOW_CODE_EVAL"):
            os.environ.pop(name, None)
            if name in environment:
                os.environ[name] = environment[name]
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        random.setstate(states[0])
        np.random.set_state(states[1])


# ------------------------------------------------------------------- the evaluation


def run_harness(
    model: Model,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    allow_code: bool = False,
    new_blocks: bool = True,
) -> Results:
    """The figures of each task, as `lm_eval` computes them.

    tasks: names of tasks, groups or tags, or paths of YAML files. include_path: a directory with
    tasks of your own; where all are there, the harness's own are not even looked at. shots:
    examples in the prompt, None for as many as the task says. limit: the first so many documents
    of each task. allow_code: run tasks that execute what the model writes. new_blocks=False: the
    model without its inserted blocks.

    Returns: {task: {metric: value}}; a group has one line, a tag one for each of its tasks. The
    names are lm_eval's (`acc_norm`, `acc_norm_stderr`, `exact_match,strict-match`) less the filter
    `none`.

    Raises UserError as `check_harness` does, and for a value out of range.
    """
    require_lm_eval()
    from llamapro_jax.evaluation.harness_model import HarnessModel

    _check_counts(shots, limit)
    lm = HarnessModel(model, batch_size=batch_size, new_blocks=new_blocks)
    return _evaluate(lm, tasks, include_path, shots, limit, allow_code)


def run_suite(
    model: Model,
    suite: SuiteConfig,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    allow_code: bool = False,
    new_blocks: bool = True,
) -> list[dict[str, Any]]:
    """A row for each task of the suite, in its order; the arguments are those of `run_harness`.

    A row has task, shots, metric, value and stderr as `lm_eval` gives them (None where it gives
    none), and published (percent, by model).

    Raises UserError as `run_harness` does.
    """
    require_lm_eval()
    from llamapro_jax.evaluation.harness_model import HarnessModel

    _check_counts(None, limit)
    lm = HarnessModel(model, batch_size=batch_size, new_blocks=new_blocks)
    rows = []
    for task in suite.tasks:
        results = _evaluate(lm, [task.name], suite.include_path, task.shots, limit, allow_code)
        figures = results.get(task.name) or next(iter(results.values()))
        value = figures.get(task.metric)
        if value is None:
            log.warning("%s: has no %s, but %s", task.name, task.metric, ", ".join(figures))
        metric, comma, filtered = task.metric.partition(",")
        rows.append(
            {
                "task": task.name,
                "shots": task.shots,
                "metric": task.metric,
                "value": value,
                "stderr": figures.get(f"{metric}_stderr{comma}{filtered}"),
                "published": dict(task.published or {}),
            }
        )
    return rows


def _check_counts(shots: int | None, limit: int | None) -> None:
    if shots is not None and shots < 0:
        raise UserError(f"shots is {shots}; it must be 0 or more.")
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; it must be at least 1.")


def _evaluate(
    lm: HarnessModel,
    tasks: Sequence[str],
    include_path: str | Path | None,
    shots: int | None,
    limit: int | None,
    allow_code: bool,
) -> Results:
    from lm_eval.evaluator import evaluate

    with _surroundings(allow_code):
        loaded, names = _load(_manager(tasks, include_path), tasks, allow_code)
        for name, task in loaded["tasks"].items():
            _prepare(lm, name, task, shots)
        results = evaluate(
            lm,
            loaded,
            limit=limit,
            log_samples=False,
            bootstrap_iters=RESAMPLES,
            confirm_run_unsafe_code=allow_code,
        )
    found = {**results["results"], **results.get("groups", {})}
    wanted: Results = {}
    for task in tasks:
        for name in names[task]:
            figures = _figures(found.get(name, {}))
            # A group that does not average its tasks has no line of its own.
            members = [] if figures else results["group_subtasks"].get(name, [])
            wanted |= {one: _figures(found.get(one, {})) for one in members or [name]}
    return wanted


def _prepare(lm: HarnessModel, name: str, task: Any, shots: int | None) -> None:
    """Sets the examples in the prompt, and checks what the task wants to be generated."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    from llamapro_jax.evaluation.harness_model import Generation

    own = task.get_config("num_fewshot")
    if shots is None or own == 0:
        if shots:
            log.warning("%s: takes no examples in its prompt; %d were asked for", name, shots)
        shots = own or 0
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    if task.get_config("output_type") == "generate_until":
        try:
            lm.check_generation(Generation.of(task.get_config("generation_kwargs") or {}))
        except UserError as error:
            raise UserError(f"{name}: {error}") from None


def _figures(results: Mapping[str, Any]) -> dict[str, float]:
    """`acc,none` -> acc and its like; what is no number ("N/A") is left out."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in results.items()
        if "," in key and isinstance(value, (int, float))
    }


# ------------------------------------------------------------------- lm_eval's own command


def main() -> None:
    """`lm_eval` with a model more: `python -m llamapro_jax.evaluation.harness --model llamapro`."""
    try:
        require_lm_eval()
        importlib.import_module("llamapro_jax.evaluation.harness_model")  # registers the model
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
