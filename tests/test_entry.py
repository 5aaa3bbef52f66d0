"""The entry of every launcher: what it says, and that it is `llamapro train`."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from llamapro_jax import cli, exit_codes
from llamapro_jax.errors import UserError
from llamapro_jax.launch import entry

CONFIG = str(Path(entry.__file__).parents[2] / "configs/llama2_7b_pro.yaml")
EXPLICIT = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.2:8476",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "one process"),
        (SLURM, "Slurm, number 9"),
        (EXPLICIT, "explicit settings, process 3 of 4, meeting at 10.0.0.2:8476"),
        ({"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}, "several CPU devices"),
    ],
)
def test_where_it_runs(environment: dict[str, str], said: str) -> None:
    assert entry.place(environment) == said


def test_it_says_where_it_runs_and_trains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = []

    def main(arguments: list[str]) -> int:
        given.append(arguments)
        return exit_codes.PREEMPTED

    monkeypatch.setattr(cli, "main", main)
    for name, value in EXPLICIT.items():
        monkeypatch.setenv(name, value)
    assert entry.main(["a.yaml", "output=b"]) == exit_codes.PREEMPTED
    assert given == [["train", "a.yaml", "output=b"]]
    given.clear()
    for arguments in (["--takeover", "a.yaml", "b=1"], ["a.yaml", "--takeover", "b=1"]):
        entry.main(arguments)
    # A job that its cluster starts once more: of the attempt before something may hang.
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    entry.main(["a.yaml", "b=1"])
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    entry.main(["a.yaml", "b=1"])
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    monkeypatch.setenv("LLAMAPRO_RESTARTS", "1")
    entry.main(["a.yaml", "b=1"])
    taking = ["train", "--takeover", "a.yaml", "b=1"]
    assert given == [taking, taking, ["train", "a.yaml", "b=1"], taking, taking]
    capsys.readouterr()
    entry.main(["a.yaml", "output=b"])
    said = capsys.readouterr().out
    assert said == f"{socket.gethostname()}: {entry.place(EXPLICIT)}\n"


def test_what_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    with pytest.raises(UserError, match="JAX_PROCESS_ID is set, but not"):
        entry.place()
    assert entry.main(["a.yaml"]) == exit_codes.REFUSED
    assert "error: JAX_PROCESS_ID is set, but not" in capsys.readouterr().err


def test_dry_run_reads_the_configuration_and_trains_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "main", lambda _: pytest.fail("trained"))
    assert entry.main(["--dry-run", CONFIG, "output=gs://b/run"]) == 0
    assert "would train" in capsys.readouterr().out
    assert entry.main(["--dry-run", CONFIG, "outptu=gs://b/run"]) == exit_codes.REFUSED
    assert "outptu" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        entry.main(["--help"])
    assert end.value.code == 0
    assert "python -m llamapro_jax.launch.entry configs/" in capsys.readouterr().out


@pytest.mark.parametrize("status", [42, 43, 129, 134, 137, 143, -6, -9, -15])
def test_worth_restarting(status: int) -> None:
    assert exit_codes.worth_restarting(status)


@pytest.mark.parametrize("status", [0, 1, 2, 44, 45, 126, 127, 128, 130, -2, 255, -255])
def test_not_worth_restarting(status: int) -> None:
    assert not exit_codes.worth_restarting(status)
