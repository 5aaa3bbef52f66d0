"""How errors travel between processes, and the launcher of a pod in small."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llamapro_jax.launch import local
from llamapro_jax.launch.surroundings import Join, free_port, reason_to_join

ROOT = Path(local.__file__).parents[2]


# ------------------------------------------------------------------- speaking


def two(script: str, tmp_path: Path) -> list[tuple[int, str, str]]:
    """Status, output and errors of two joined processes that run `script`."""
    (tmp_path / "script.py").write_text(
        "import sys, time\n"
        "from llamapro_jax.launch import processes\n"
        "from llamapro_jax.errors import UserError\n"
        "def body(first):\n" + "".join(f"    {line}\n" for line in script.splitlines()) + "try:\n"
        "    with processes.joined():\n"
        "        body(processes.is_first())\n"
        "except UserError as error:\n"
        "    print('error:', error, file=sys.stderr)\n"
        "    sys.exit(2)\n"
    )
    port = free_port()
    running = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py")],
            env={**local.environment(index, 2, 1, port), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        texts = [process.communicate(timeout=60) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(p.returncode, *text) for p, text in zip(running, texts, strict=True)]


def test_what_the_first_does_all_know(tmp_path: Path) -> None:
    script = """
assert processes.count() == 2
for value in ({"a": [1, None]}, "text"):
    def act():
        assert first
        time.sleep(0.5)
        return value
    assert processes.from_first(act) == value
print("done")
"""
    for status, output, errors in two(script, tmp_path):
        assert status == 0 and "done" in output, errors


def test_an_error_of_the_first_ends_all_with_one_message(tmp_path: Path) -> None:
    script = """
def act():
    raise UserError("the disk is full")
processes.from_first(act)
"""
    (status, _, errors), (other_status, _, other_errors) = two(script, tmp_path)
    assert (status, other_status) == (2, 2), other_errors
    assert "error: the disk is full" in errors and "full" not in other_errors


def test_an_error_of_another_is_told_by_the_first(tmp_path: Path) -> None:
    began = time.monotonic()
    script = """
processes._COURTESY = 1
if not first:
    raise UserError("no such model here")
time.sleep(600)
"""
    (status, _, errors), (other_status, _, other_errors) = two(script, tmp_path)
    assert (status, other_status) == (2, 2), other_errors
    assert "error: process 1 on " in errors and "no such model here" in errors
    assert "no such model" not in other_errors
    assert time.monotonic() - began < 50


def test_an_error_that_all_have_is_told_once(tmp_path: Path) -> None:
    (status, _, errors), (other_status, _, other_errors) = two(
        'raise UserError("bad mesh")', tmp_path
    )
    assert (status, other_status) == (2, 2), other_errors
    assert errors.count("bad mesh") == 1 and "bad mesh" not in other_errors


def test_a_process_that_fails_while_it_is_being_ended_leaves_once(tmp_path: Path) -> None:
    """Two threads that leave at a time abort it, when one ends Python before the other is done."""
    script = """
import threading
leave, leaving = processes._leave, threading.Event()
def slowly():
    print("leaves", flush=True)
    leaving.set()
    time.sleep(1)
    leave()
if not first:
    processes._leave = slowly
    leaving.wait()
raise UserError("bad mesh")
"""
    (status, _, _), (other_status, output, errors) = two(script, tmp_path)
    assert (status, other_status) == (2, 2), errors
    assert output.count("leaves") == 1


def test_a_bug_in_another_process_ends_the_first(tmp_path: Path) -> None:
    (status, _, errors), (other_status, _, other_errors) = two(
        "if not first: {}['key']\ntime.sleep(600)", tmp_path
    )
    assert (status, other_status) == (1, 1)
    assert "error: process 1 on " in errors and "KeyError: 'key'" in errors
    assert "Traceback" in other_errors


# ------------------------------------------------------------------- the launcher


def test_the_launcher_gives_each_process_its_place() -> None:
    base = {"XLA_FLAGS": "--xla_a=1 --xla_force_host_platform_device_count=3", "HOME": "/h"}
    found = local.environment(1, 2, 4, 77, base)
    assert found["XLA_FLAGS"] == "--xla_a=1 --xla_force_host_platform_device_count=4"
    assert found["HOME"] == "/h" and found["JAX_PLATFORMS"] == "cpu"
    assert reason_to_join(found) == Join("explicit settings", "127.0.0.1:77", 2, 1)


def test_the_launcher_has_help_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        local.main(["--help"])
    assert end.value.code == 0
    assert "--processes 2 --devices 4 --" in capsys.readouterr().out
    for arguments, message in (
        ([], "what is to run?"),
        (["--", "convert", "a", "b"], "convert: `train` alone runs on several processes"),
        (["--processes", "0", "--", "train"], "0 is not a positive whole number"),
    ):
        with pytest.raises(SystemExit) as end:
            local.main(arguments)
        assert end.value.code == 2
        assert message in capsys.readouterr().err


def test_the_launcher_shows_what_it_would_start(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dry-run", "--processes", "2", "--devices", "4", "--", "train", "a.yaml", "b=1"]
    assert local.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    for index, line in enumerate(lines):
        words = shlex.split(line)
        assert words[-4:] == ["-m", "llamapro_jax.launch.entry", "a.yaml", "b=1"]
        assert f"JAX_PROCESS_ID={index}" in words and "JAX_NUM_PROCESSES=2" in words
    assert len(lines) == 2
    assert local.main(["--dry-run", "--", "train", "--takeover", "a.yaml"]) == 0
    assert "launch.entry --takeover a.yaml\n" in capsys.readouterr().out


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the launcher starts in place of Python: a script that is to be written."""
    file = tmp_path / "program"
    file.write_text("#!/usr/bin/env bash\n")
    file.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(file))
    return file


def test_the_launcher_shows_who_failed(program: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program.write_text(
        "#!/usr/bin/env bash\n"
        'echo "speaks $JAX_PROCESS_ID: $*"\n'
        "if ((JAX_PROCESS_ID == 1)); then echo lost >&2; exit 7; fi\n"
    )
    assert local.main(["--", "train", "a.yaml"]) == 7
    out, errors = capfd.readouterr()
    assert out == "speaks 0: -m llamapro_jax.launch.entry a.yaml\n"
    assert errors == "[1] speaks 1: -m llamapro_jax.launch.entry a.yaml\n[1] lost\n"


@pytest.mark.parametrize("status", [2, 42, 44])
def test_what_the_first_said_is_not_said_again(
    program: Path, capfd: pytest.CaptureFixture[str], status: int
) -> None:
    program.write_text(f"#!/usr/bin/env bash\necho 'error: bad' >&2\nexit {status}\n")
    assert local.main(["--processes", "3", "--", "train", "a.yaml"]) == status
    assert capfd.readouterr().err == "error: bad\n"


def test_the_stacks_of_each_stalled_process_are_shown(
    program: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program.write_text('#!/usr/bin/env bash\necho "stack of $JAX_PROCESS_ID" >&2\nexit 43\n')
    assert local.main(["--", "train", "a.yaml"]) == 43
    assert capfd.readouterr().err == "stack of 0\n[1] stack of 1\n"


def test_the_launcher_ends_what_does_not_end(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_GRACE", 0.2)
    program.write_text(
        "#!/usr/bin/env bash\nif ((JAX_PROCESS_ID == 0)); then kill -KILL $$; fi\nexec sleep 600\n"
    )
    began = time.monotonic()
    assert local.main(["--", "train"]) == 128 + signal.SIGKILL
    assert time.monotonic() - began < 30


def test_the_launcher_passes_signals_on(program: Path, tmp_path: Path) -> None:
    program.write_text(
        "#!/usr/bin/env bash\n"
        'trap "exit 42" TERM\n'
        f'touch "{tmp_path}/began-$JAX_PROCESS_ID"\n'
        "while true; do sleep 0.05; done\n"
    )

    def send() -> None:
        while len(list(tmp_path.glob("began-*"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send, daemon=True).start()
    assert local.main(["--", "train"]) == 42
