"""The command line: what it says, what it imports and how it fails."""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import write_tiny

from llamapro_jax import __version__, cli
from llamapro_jax.errors import UserError

# Importing any of these takes longer than an answer to --help may.
HEAVY = {"jax", "flax", "optax", "orbax", "transformers", "tensorflow_datasets", "torch"}

# Runs the command line as the script does and prints the heavy modules that were imported.
PROBE = f"""
import sys
from llamapro_jax.cli import main
try:
    status = main()
except SystemExit as stop:
    status = stop.code or 0
print("heavy:", *sorted({{name.partition(".")[0] for name in sys.modules}} & {HEAVY!r}))
sys.exit(status)
"""


def probe(*arguments: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    result = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, timeout=60
    )
    assert result.stdout, result.stderr
    marker, _, heavy = result.stdout.strip().splitlines()[-1].partition(":")
    assert marker == "heavy", result.stdout + result.stderr
    return result, set(heavy.split())


def test_help_lists_the_verbs_and_imports_nothing_heavy() -> None:
    result, heavy = probe("--help")
    assert result.returncode == 0, result.stderr
    assert heavy == set()
    for verb in cli.VERBS:
        assert re.search(rf"^    {verb}\s", result.stdout, re.MULTILINE)
    assert "example" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_a_verb_has_an_example_and_imports_nothing_heavy(verb: str) -> None:
    result, heavy = probe(verb, "--help")
    assert result.returncode == 0, result.stderr
    assert heavy == set()
    assert f"usage: llamapro {verb}" in result.stdout
    example = result.stdout.partition("example:")[2]
    assert f"  llamapro {verb}" in example


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_option_of_a_verb_is_explained(verb: str) -> None:
    parser = argparse.ArgumentParser()
    cli.verb_module(verb).add_arguments(parser)
    unexplained = [action.dest for action in parser._actions if not action.help]
    assert unexplained == []


def test_a_verb_without_its_arguments_is_a_usage_error() -> None:
    result, heavy = probe("convert")
    assert result.returncode == 2
    assert "usage: llamapro convert" in result.stderr
    assert heavy == set()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"llamapro_jax {__version__}\n"


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "llamapro_jax", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, f"llamapro_jax {__version__}\n")


def test_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["exprot", "a", "b"]) == 2
    captured = capsys.readouterr()
    assert "unknown verb 'exprot'. Did you mean 'export'" in captured.err
    assert captured.out == ""


# --- what a verb returns and raises -------------------------------------------------------------


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A command line of one verb, `act`, whose `run` a test replaces."""
    module = SimpleNamespace(
        __doc__="Acts.", HELP="act", EXAMPLE="llamapro act", add_arguments=lambda parser: None
    )
    monkeypatch.setattr(cli, "VERBS", ("act",))
    monkeypatch.setattr(cli, "verb_module", lambda name: module)
    return module


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (1, 1)])
def test_status_is_what_the_verb_returns(
    verb: SimpleNamespace, returned: int | None, status: int
) -> None:
    verb.run = lambda args: returned
    assert cli.main(["act"]) == status


def fail(args: argparse.Namespace) -> None:
    raise UserError("models/llama: no such directory.")


def test_user_error_is_one_line_and_status_2(
    verb: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    verb.run = fail
    assert cli.main(["act"]) == 2
    assert capsys.readouterr().err == "error: models/llama: no such directory.\n"


@pytest.mark.parametrize("arguments", [["--debug", "act"], ["act", "--debug"]])
def test_debug_lets_the_traceback_through(verb: SimpleNamespace, arguments: list[str]) -> None:
    verb.run = fail
    with pytest.raises(UserError, match="no such directory"):
        cli.main(arguments)


def test_a_bug_is_not_dressed_as_a_user_error(verb: SimpleNamespace) -> None:
    def run(args: argparse.Namespace) -> None:
        raise KeyError("layers.4")

    verb.run = run
    with pytest.raises(KeyError, match=r"layers\.4"):
        cli.main(["act"])


def test_interrupt_has_the_status_of_sigint(
    verb: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    verb.run = run
    assert cli.main(["act"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_a_verb_may_say_how_to_go_on_when_it_was_stopped(
    verb: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    verb.run, verb.STOPPED = run, "stopped; again"
    assert cli.main(["act"]) == 130
    assert capsys.readouterr().err == "stopped; again\n"


def test_what_the_package_logs_is_a_plain_line(
    verb: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    log = logging.getLogger("llamapro_jax.somewhere")

    def run(args: argparse.Namespace) -> None:
        log.info("of no interest")
        log.warning("%s: has no tokenizer", "models/a")

    verb.run = run
    # As a library does at its import.
    raw = logging.StreamHandler()
    raw.setFormatter(logging.Formatter("%(levelname)s:%(name)s:%(message)s"))
    logging.getLogger().addHandler(raw)
    try:
        assert cli.main(["act"]) == 0
    finally:
        logging.getLogger().removeHandler(raw)
    assert capsys.readouterr().err == "warning: models/a: has no tokenizer\n"
    package = logging.getLogger("llamapro_jax")
    assert package.propagate and not package.handlers


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied", "/models/out"), "/models/out: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ConnectionError("no route to the hub"), "no route to the hub"),
    ],
)
def test_what_the_system_refuses_is_one_line_and_status_2(
    verb: SimpleNamespace, capsys: pytest.CaptureFixture[str], error: OSError, message: str
) -> None:
    def run(args: argparse.Namespace) -> None:
        raise error

    verb.run = run
    assert cli.main(["act"]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    with pytest.raises(OSError, match=re.escape(error.args[-1])):
        cli.main(["--debug", "act"])


def test_sigterm_unwinds_what_runs_and_the_handler_is_put_back(
    verb: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def run(args: argparse.Namespace) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # a second one is of no account
            seen.append("cleared up")

    verb.run = run
    assert cli.main(["act"]) == 143
    assert seen == ["cleared up"]
    assert capsys.readouterr().err == "stopped\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_leaves_nothing_half_written(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "base", vocab_size=60_000, hidden_size=256)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "llamapro_jax.cli", "expand", str(source), str(out)]
    process = subprocess.Popen(
        [*command, "--blocks", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        while process.poll() is None and not list(tmp_path.glob(".tmp-out-*/*")):
            time.sleep(0.001)
        process.terminate()
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, errors
    assert errors.endswith("stopped\n")
    assert [entry.name for entry in tmp_path.iterdir()] == ["base"]


def test_a_reader_that_has_enough_is_no_error(tmp_path: Path) -> None:
    model = write_tiny(tmp_path)
    command = [sys.executable, "-m", "llamapro_jax.cli", "inspect", str(model), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 128 + signal.SIGPIPE
