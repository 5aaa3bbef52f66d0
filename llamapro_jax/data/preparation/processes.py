"""Pieces over several processes, which die with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from llamapro_jax.data.preparation.shards import Recipe, Report, Seen
from llamapro_jax.data.preparation.work import Result, Work
from llamapro_jax.data.readers.documents import Piece
from llamapro_jax.errors import UserError

Task = tuple[int, Piece]


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def make_pieces(
    tasks: Sequence[Task], work: Work, recipe: Recipe, workers: int, report: Report
) -> dict[int, Result]:
    """The results of all pieces by their index; with one worker in this process.

    Raises what the making of a piece or `report` raises, and UserError when a process is killed.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        return {i: work.finish_piece(i, piece, recipe, report) for i, piece in tasks}
    return _in_processes(tasks, work, recipe, workers, report)


def _in_processes(
    tasks: Sequence[Task], work: Work, recipe: Recipe, workers: int, report: Report
) -> dict[int, Result]:
    context = multiprocessing.get_context("spawn")
    running: dict[Connection, BaseProcess] = {}
    left = list(reversed(tasks))
    results: dict[int, Result] = {}
    try:
        # In a file: through the pipe of a start it would take until the process reads it, one
        # start after the other.
        work.recipe.write_bytes(pickle.dumps(recipe))
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_main, args=(theirs, work), daemon=True)
            with _interrupts_ignored():
                process.start()
            theirs.close()
            running[ours] = process
        for ours in running:
            _next_task(ours, running, left)
        while len(results) < len(tasks):
            for ready in connection.wait(list(running)):
                message = _receive(ready, running)
                if isinstance(message, Seen):
                    report(message)
                elif isinstance(message, BaseException):
                    raise message
                else:
                    index, result = message
                    results[index] = result
                    _next_task(ready, running, left)
    finally:
        for process in running.values():
            process.kill()
        for process in running.values():
            process.join()
    return results


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """What is started in here never sees Ctrl-C: this process gets it too, and ends it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _next_task(ready: Connection, running: dict[Connection, BaseProcess], left: list[Task]) -> None:
    if not left:
        return
    try:
        ready.send(left.pop())
    except OSError:
        raise _killed(running[ready]) from None


def _receive(
    ready: Connection, running: dict[Connection, BaseProcess]
) -> Seen | BaseException | tuple[int, Result]:
    try:
        return ready.recv()
    except (EOFError, OSError):
        raise _killed(running[ready]) from None


def _killed(process: BaseProcess) -> UserError:
    process.join()
    return UserError(
        f"a process that prepares data was killed (status {process.exitcode}), most likely for "
        "want of memory; run the same command again to go on, with fewer workers."
    )


def _main(pipe: Connection, work: Work) -> None:
    """What a process does, until it is ended."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        recipe = pickle.loads(work.recipe.read_bytes())
        while True:
            index, piece = pipe.recv()
            pipe.send((index, work.finish_piece(index, piece, recipe, pipe.send)))
    except (EOFError, BrokenPipeError):
        pass
    except BaseException as error:
        error.add_note(traceback.format_exc())
        with suppress(OSError):
            pipe.send(error)


def _die_with_parent() -> None:
    """A parent that is killed cannot say so; its end of the sentinel closes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
