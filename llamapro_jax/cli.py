"""The command `llamapro`: parse, call, print. What a verb does is in `llamapro_jax.verbs`."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType

from llamapro_jax import __version__, exit_codes
from llamapro_jax.errors import UserError, nearest

VERBS = (
    "quickstart",
    "convert",
    "expand",
    "inspect",
    "verify",
    "plan",
    "prepare",
    "train",
    "launch",
    "evaluate",
    "report",
    "generate",
    "export",
    "apply",
)

DESCRIPTION = """\
LLaMA Pro for JAX: grow a LLaMA by zero-initialised copies of some of its blocks, train only
those on a new domain, and hand back a Hugging Face checkpoint.
"""

EXAMPLE = """\
example, from a LLaMA 2 to one that knows a new domain:
  llamapro convert meta-llama/Llama-2-7b-hf models/llama2-7b
  llamapro expand models/llama2-7b models/llama2-7b-pro --blocks 8
  llamapro train configs/llama2_7b_pro.yaml
  llamapro export runs/llama2_7b_pro exports/llama2-7b-pro

  llamapro VERB --help explains a verb.
"""


def verb_module(verb: str) -> ModuleType:
    return importlib.import_module(f"llamapro_jax.verbs.{verb}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llamapro",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"llamapro_jax {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb in VERBS:
        module = verb_module(verb)
        subparser = subparsers.add_parser(
            verb,
            help=module.HELP,
            description=module.__doc__,
            epilog="example:\n" + "\n".join("  " + line for line in module.EXAMPLE.splitlines()),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        # Its own default would overwrite what stood before the verb.
        subparser.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
        module.add_arguments(subparser)
    return parser


class _Terminated(SystemExit):
    """SIGTERM came. An exception, so that what is half-written is removed on the way out."""


def _terminate(number: int, frame: FrameType | None) -> None:
    # `timeout` and others send it twice; the second one must not cut the clearing up short.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Terminated(exit_codes.TERMINATED)


@contextmanager
def _termination_raises() -> Iterator[None]:
    """Outside the main thread, where Python allows no handlers, it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Notes(logging.Handler):
    """What the package logs, as a line on standard error like every other message."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr, flush=True)


@contextmanager
def _notes_are_plain() -> Iterator[None]:
    """Libraries give the root logger handlers of their own, with their own prefixes."""
    log, handler = logging.getLogger("llamapro_jax"), _Notes(logging.WARNING)
    before = log.propagate
    log.addHandler(handler)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = before


def _described(error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    return reason if error.filename is None else f"{error.filename}: {reason}"


def main(arguments: list[str] | None = None) -> int:
    """Runs one verb. Returns the exit status, one of `llamapro_jax.exit_codes`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # The libraries log to standard error at import; a user asked for none of it.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    verb = next((a for a in arguments if not a.startswith("-")), None)
    if verb is not None and verb not in VERBS:
        message = f"unknown verb {verb!r}.{nearest(verb, VERBS)} Known: {', '.join(VERBS)}."
        print(f"error: {message}", file=sys.stderr)
        return exit_codes.REFUSED
    parsed = build_parser().parse_args(arguments)
    try:
        with _termination_raises(), _notes_are_plain():
            status = verb_module(parsed.verb).run(parsed) or exit_codes.DONE
            sys.stdout.flush()
            return status
    except BrokenPipeError:
        # Whoever read, such as `head`, has enough; nothing is left to be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (UserError, OSError) as error:
        if parsed.debug:
            raise
        message = _described(error) if isinstance(error, OSError) else error
        print(f"error: {message}", file=sys.stderr)
        return exit_codes.status_of(error)
    except (KeyboardInterrupt, _Terminated) as stopped:
        print(getattr(verb_module(parsed.verb), "STOPPED", "stopped"), file=sys.stderr)
        return exit_codes.status_of(stopped)


if __name__ == "__main__":
    sys.exit(main())
