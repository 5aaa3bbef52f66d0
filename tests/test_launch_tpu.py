"""launch/tpu.sh as it is typed, on a cloud in small where what is sent to a host runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cloud import unknown_flags
from local_cloud import LocalCloud
from runs import log_lines, overrides, settings, write_model, write_texts

from llamapro_jax.errors import UserError
from llamapro_jax.exit_codes import worth_restarting
from llamapro_jax.launch import tpu, tpu_job
from llamapro_jax.launch.gcloud import Gcloud, GcloudError, Kind
from llamapro_jax.launch.queued_resource import RUNTIME_VERSIONS, Request, read_reports
from llamapro_jax.launch.surroundings import free_port

ROOT = Path(tpu.__file__).parents[2]
CONFIG = "configs/quickstart.yaml"


def wait_for(condition: Callable[[], object], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def tpu_sh(cloud: LocalCloud, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["launch/tpu.sh", *words],
        cwd=ROOT,
        env=cloud.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., LocalCloud]]:
    """Makes a cloud; at the end nothing of it runs, and gcloud was asked for what it knows."""
    clouds = []

    def make(*arguments: object, **keywords: object) -> LocalCloud:
        clouds.append(LocalCloud(tmp_path / "cloud", *arguments, **keywords))
        return clouds[-1]

    yield make
    for cloud in clouds:
        cloud.preempt()
        assert [flag for call in cloud.calls() for flag in unknown_flags(call)] == []


# ------------------------------------------------------------------- the verbs, one after another


def test_a_run_by_hand(make: Callable[..., LocalCloud], tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    cloud = make(hosts=2, trainer=SLOW)
    assert tpu_sh(cloud, "create", "my-tpu", "--type", "v4-16").returncode == 0
    waited = tpu_sh(cloud, "wait", "my-tpu", "--poll", "0")
    assert waited.stdout == "my-tpu is PROVISIONING\nmy-tpu is ACTIVE\n"

    def status() -> list[str]:
        return tpu_sh(cloud, "status", "my-tpu").stdout.splitlines()

    assert status() == ["my-tpu is ACTIVE", *(f"  my-tpu-0-w-{i}: none" for i in (0, 1))]
    prepare = ["--prepare", "echo 'mounted {here}' >mounts"]
    assert tpu_sh(cloud, "setup", "my-tpu", *prepare).returncode == 0
    assert status()[1:] == [f"  my-tpu-0-w-{i}: installed" for i in (0, 1)]
    hosts = sorted((cloud.directory / "hosts").iterdir())
    stale = hosts[0] / "opt/checkout/llamapro_jax/removed.py"
    stale.touch()
    started = tpu_sh(cloud, "run", "my-tpu", CONFIG, "run.name=a 'b'", f"output={output}")
    assert started.returncode == 0, started.stderr
    assert "launch/tpu.sh logs my-tpu --follow" in started.stdout
    for host in hosts:
        assert (host / "opt/mounts").read_text() == "mounted {here}\n"
        assert (host / "opt/checkout" / CONFIG).exists()
        log = host / "opt/log"
        wait_for(lambda log=log: log.exists() and log.read_text().count("\n") == 3, "no output")
        # The override arrives as one argument, its quotes and space kept.
        arguments = f"['{CONFIG}', \"run.name=a 'b'\", 'output={output}']"
        assert arguments in log.read_text()
    assert not stale.exists()
    assert status()[1:] == [f"  my-tpu-0-w-{i}: running, step 6 saved" for i in (0, 1)]
    second = tpu_sh(cloud, "run", "my-tpu", CONFIG)
    assert second.returncode == 2 and "a training run is under way here" in second.stderr
    logs = tpu_sh(cloud, "logs", "my-tpu", "--worker", "1", "--lines", "1")
    assert logs.stdout == "step 6: saved\n"
    stopped = tpu_sh(cloud, "stop", "my-tpu").stdout
    assert stopped == "".join(f"my-tpu-0-w-{i}: training saves and stops\n" for i in (0, 1))
    ended = [f"  my-tpu-0-w-{i}: stopped with status 42, step 6 saved" for i in (0, 1)]
    wait_for(lambda: status()[1:] == ended, "the run did not end")
    assert tpu_sh(cloud, "delete", "my-tpu").returncode == 0
    assert status() == ["my-tpu is ABSENT"]


SLOW = """\
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
print(sys.argv[3:], flush=True)
print("step 6: saving", flush=True)
print("step 6: saved", flush=True)
time.sleep(300)
"""


# ------------------------------------------------------------------- supervised, to the end


def supervised(cloud: LocalCloud, *words: str, log: Path) -> subprocess.Popen[bytes]:
    command = ["launch/tpu.sh", "supervise", "my-tpu", "--zone", "z", "--poll", "0.1", *words]
    with log.open("wb") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=cloud.environment, stdout=file, stderr=subprocess.STDOUT
        )


def test_a_run_survives_a_signal_and_a_preemption(
    make: Callable[..., LocalCloud], tmp_path: Path
) -> None:
    """Two slices of two hosts, which start by themselves; the entry is a stand-in."""
    output, log = tmp_path / "run", tmp_path / "log"
    output.mkdir()
    cloud = make(hosts=2)
    words = ["--type", "v5litepod-8", "--slices", "2", "--spot", "--staging", "gs://my-bucket/jobs"]
    process = supervised(cloud, *words, CONFIG, f"output={output}", log=log)

    def step() -> int:
        return int((output / "step").read_text()) if (output / "step").exists() else 0

    def starts() -> list[int]:
        return [int(line) for line in (output / "starts").read_text().split()]

    try:
        wait_for(lambda: step() >= 2, "training did not begin")
        wait_for(lambda: len([*output.glob("ready-*")]) == 4, "a host did not begin")
        wait_for(lambda: len(cloud.units()) == 4, "a host has no unit")
        os.kill(cloud.units()[3], signal.SIGTERM)
        wait_for(lambda: (output / "starts").read_text().count("\n") == 2, "not started again")
        wait_for(lambda: step() > starts()[1], "no progress")
        cloud.preempt()
        wait_for(lambda: (output / "starts").read_text().count("\n") == 3, "not created again")
        wait_for(lambda: step() > starts()[2], "no progress")
        (output / "finish").touch()
        assert process.wait(120) == 0, log.read_text()
    finally:
        process.kill()
    assert starts()[0] == 0 < starts()[1] < starts()[2]
    said = log.read_text()
    assert "my-tpu-0-w-0: ended with status 42" in said
    assert "my-tpu is SUSPENDED. Restart " in said
    assert re.search(r"training is done, step \d+ saved", said)
    assert cloud.state() == "ABSENT"
    verbs = [call[3] for call in cloud.calls() if call[2] == "queued-resources"]
    assert [v for v in verbs if v in ("create", "delete")] == ["create", "delete"] * 2


def test_one_that_was_stopped_stays_stopped(
    make: Callable[..., LocalCloud], tmp_path: Path
) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    output.mkdir()
    cloud = make(hosts=1)
    process = supervised(cloud, "--type", "v6e-8", CONFIG, f"output={output}", log=log)
    try:
        wait_for((output / "step").exists, "training did not begin")
        tpu_sh(cloud, "stop", "my-tpu")
        assert process.wait(60) == 42, log.read_text()
    finally:
        process.kill()
    assert cloud.state() == "ACTIVE"
    # As its start-up script would at the next boot.
    [host] = (cloud.directory / "hosts").iterdir()

    def boots(ended: int | None) -> bool:
        environment = {**cloud.environment, "HOST_DIRECTORY": str(host)}
        environment["PATH"] = f"{cloud.directory}/hosts-bin:{environment['PATH']}"
        if ended is not None:
            (host / "opt/ended").write_text(f"{ended}\n")
        command = [host / "opt/checkout/launch/tpu_worker.sh", "--dry-run", "boot", CONFIG]
        said = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
        assert ("is not started again" in said) != (" start " in said)
        return " start " in said

    assert not boots(None)
    (host / "opt/stopped").unlink()
    statuses = (0, 1, 2, 42, 43, 44, 45, 130, 134, 137, 143, 255)
    assert [s for s in statuses if boots(s)] == [s for s in statuses if worth_restarting(s)]
    (host / "opt/ended").unlink()
    assert boots(None)
    assert (output / "starts").read_text() == "0\n"


@pytest.mark.slow
def test_a_real_run_goes_on_on_new_hosts(make: Callable[..., LocalCloud], tmp_path: Path) -> None:
    """Two hosts train, are taken away without a word, and others go on to the end."""
    output, log = tmp_path / "run", tmp_path / "log"
    write_model(tmp_path)
    write_texts(tmp_path / "texts")
    # After its first save it has seconds left at least, in which it is taken away.
    changes = {"training.steps": 150, "training.save_every": 25, "training.eval_every": 75}
    values = settings(tmp_path / "model", tmp_path / "texts", output) | changes
    values["data.cache_directory"] = "null"
    cloud = make(hosts=2, trainer=None)
    port = free_port()
    cloud.host_environment(
        JAX_PLATFORMS="cpu",
        JAX_NUM_PROCESSES="2",
        JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
        JAX_COORDINATOR_BIND_ADDRESS=f"127.0.0.1:{port}",
    )
    words = ["--type", "v4-16", "--poll", "0.5", CONFIG, *overrides(values)]
    process = supervised(cloud, *words, log=log)
    try:
        saved = output / "checkpoints"

        def has_saved() -> bool:
            assert process.poll() is None, log.read_text()
            return any(saved.glob("*/commit_success.txt"))

        wait_for(has_saved, "no save", 300)
        cloud.preempt()
        assert process.wait(300) == 0, log.read_text()
    finally:
        process.kill()
    assert "training is done, step 150 saved" in log.read_text()
    created = [call for call in cloud.calls() if call[3] == "create"]
    assert len(created) == 2
    assert json.loads((output / "summary.json").read_text())["steps"] == 150
    assert [line["step"] for line in log_lines(output) if line["kind"] == "eval"][-1] == 150


# ------------------------------------------------------------------- arguments


@pytest.mark.parametrize("verb", tpu.VERBS)
def test_dry_run_prints_what_the_sdk_knows_and_runs_nothing(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert tpu.main([verb, "my-tpu", *MORE.get(verb, []), "--dry-run", *JOBS.get(verb, [])]) == 0
    lines = re.findall(r"^gcloud (.*)", capsys.readouterr().out, re.MULTILINE)
    assert lines
    for line in lines:
        # The command of ssh may go on in the next lines.
        words = shlex.split(line.partition(" '--command=")[0])
        assert unknown_flags(words) == []


STAGING = ["--staging", "gs://my-bucket/jobs"]
MORE = {
    "create": ["--type", "v4-8", "--project=p", "--zone=z", *STAGING],
    "supervise": ["--type", "v4-8", "--reserved", "--slices", "2", *STAGING],
    "wait": ["--zone=z"],
    "logs": ["--follow", "--worker", "3", "--ssh-with=--tunnel-through-iap"],
}
JOBS = {"create": [CONFIG], "run": [CONFIG, "a.b=1"], "supervise": [CONFIG, "output=/mnt/a"]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["create", "n", "--type", "tpu7x-8"], "--type tpu7x-8: is none of v4-N, v5litepod-N"),
        (["create", "n", "--type", "v4-8", "--slices", "0"], "--slices 0: there is one slice"),
        (["create", "n", "--type", "v4-8", CONFIG], "--staging and CONFIG come together"),
        (["create", "n", "--type", "v4-8", *STAGING], "--staging and CONFIG come together"),
        (["create", "n", "--type", "v4-8", "--prepare", "ls"], "--prepare belongs to setup"),
        (
            ["create", "n", "--type", "v4-8", "--staging", "/b", CONFIG],
            "is no directory of a bucket",
        ),
        (["run", "n", "configs/absent.yaml"], "configs/absent.yaml: no such configuration file"),
        (["run", "n", "/etc/passwd"], "/etc/passwd: is outside"),
        (["run", "n", CONFIG, "word"], "word: is no key.path=value"),
    ],
)
def test_what_cannot_be_is_refused_before_gcloud_is_called(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("PATH", "/nowhere")
    assert tpu.main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["create", "n", "--type", "v4-8", "--spot", "--reserved"],
        ["stop", "n", "--worker", "0"],
        ["delete", "n", "a=b"],
        ["create", "n", "--type", "v4-8", "--typo"],
        ["lgos", "n"],
    ],
)
def test_options_that_do_not_exist(words: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        tpu.main(words)
    assert end.value.code == 2


@pytest.mark.parametrize("words", [[], *[[verb] for verb in tpu.VERBS]])
def test_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        tpu.main([*words, "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "--dry-run" in said if words else all(verb in said for verb in tpu.VERBS)


def test_tpu_sh_names_the_python_that_is_missing(tmp_path: Path) -> None:
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    ended = subprocess.run([ROOT / "launch/tpu.sh"], env=environment, capture_output=True)
    assert ended.returncode == 2 and b"no Python 3.11 or newer" in ended.stderr


def test_the_script_of_the_hosts_explains_and_rehearses(tmp_path: Path) -> None:
    (tmp_path / "checkout").mkdir()
    shutil.copytree(ROOT / "launch", tmp_path / "checkout/launch")
    worker = tmp_path / "checkout/launch/tpu_worker.sh"

    def said(*words: str) -> tuple[int, str]:
        ended = subprocess.run([worker, *words], capture_output=True, text=True)
        return ended.returncode, ended.stdout + ended.stderr

    status, text = said("--help")
    assert status == 0 and "example:" in text
    verbs = re.findall(r"^(\w+)\(\) \{", worker.read_text(), re.MULTILINE)
    assert {"install", "start", "boot", "status", "stop", "run"} <= set(verbs)
    assert all(
        f"\n{verb} " in text for verb in ("install", "start", "boot", "status", "stop", "run")
    )
    status, text = said("--dry-run", "start", CONFIG, "a=b c")
    assert status == 0 and "systemd-run" in text and text.endswith(f"run {CONFIG} a=b\\ c \n")
    assert [file.name for file in tmp_path.iterdir()] == ["checkout"]
    assert said("begin")[0] == said("start")[0] == said("stop", "now")[0] == 2


def test_a_workstation_needs_no_package() -> None:
    """-S: without those of this environment."""
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import llamapro_jax.launch.tpu"
    subprocess.run([sys.executable, "-S", "-c", script], check=True, timeout=60)


def test_a_request_in_the_words_of_the_sdk() -> None:
    for start, version in RUNTIME_VERSIONS.items():
        assert f"--runtime-version={version}" in Request(f"{start}8").arguments("n")
    given = Request("v9-8", runtime_version="new", tier="reserved", flags=("--network=a",))
    assert given.arguments("n") == [
        "--accelerator-type=v9-8", "--runtime-version=new", "--node-id=n", "--reserved",
        "--network=a",
    ]  # fmt: skip


def test_reports_are_read_among_other_lines() -> None:
    text = "noise\n@llamapro b running - 12\n@llamapro a ended 137 -\n@llamapro c running\n"
    assert [str(report) for report in read_reports(text)] == [
        "a: ended with status 137",
        "b: running, step 12 saved",
    ]


def documented() -> list[str]:
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "launch/README.md").read_text(), re.M | re.S)
    found = [line for block in blocks for line in block.splitlines() if "launch/tpu.sh" in line]
    example = tpu.EXAMPLE.partition("\n")[2].replace("\\\n", " ").strip()
    return [example, *found]


def test_what_the_documents_say_can_be_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(documented()) > 6
    for line in documented():
        words = shlex.split(line)[1:]
        assert tpu.main([*words[:2], "--dry-run", *words[2:]]) == 0, line
        assert capsys.readouterr().out


# ------------------------------------------------------------------- gcloud itself


def test_without_gcloud_it_says_where_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="cloud.google.com/sdk/docs/install"):
        Gcloud().call("version")


def test_a_call_that_hangs_is_ended_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gcloud").write_text("#!/usr/bin/env bash\nsleep 300 &\necho $! >pid\nwait\n")
    (tmp_path / "gcloud").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GcloudError, match="no answer after 3 seconds") as error:
        Gcloud(timeout=3).call("version")
    assert error.value.kind is Kind.PASSING
    stat = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    wait_for(lambda: not stat.exists() or ") Z " in stat.read_text(), "ssh outlives the timeout")


def test_the_archive_has_what_runs_and_nothing_else(tmp_path: Path) -> None:
    with tpu_job.archive(CONFIG) as file:
        shutil.unpack_archive(file, tmp_path)
    assert (tmp_path / "llamapro_jax/launch/entry.py").is_file()
    assert os.access(tmp_path / "launch/tpu_worker.sh", os.X_OK)
    assert not list(tmp_path.rglob("__pycache__"))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(tpu_job._CARRIED)


@pytest.mark.slow
def test_the_sdk_itself_takes_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where it is installed, with its own lint, which needs no login."""
    sdk = shutil.which("gcloud")
    if sdk is None:
        pytest.skip("the Google Cloud SDK is not installed")
    for verb in tpu.VERBS:
        tpu.main([verb, "my-tpu", *MORE.get(verb, []), "--dry-run", *JOBS.get(verb, [])])
    said = capsys.readouterr().out
    # What is said to a host is no matter of the SDK's.
    lines = re.sub(r"'--command=.*?(?= --node)", "--command=ls", said, flags=re.DOTALL)
    commands = sorted(set(re.findall(r"^gcloud .*", lines, re.MULTILINE)))
    assert len(commands) > 8
    file = tmp_path / "commands.json"
    file.write_text(json.dumps([{"command_string": command} for command in commands]))
    result = subprocess.run(
        [sdk, "meta", "lint-gcloud-commands", f"--commands-file={file}"],
        env={
            **os.environ,
            "CLOUDSDK_CONFIG": str(tmp_path),
            "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false",
            "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "true",
            "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "true",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    if result.returncode != 0:
        pytest.skip(f"this SDK has no lint: {result.stderr[-200:]}")
    found = json.loads(result.stdout)
    assert len(found) == len(commands)
    assert [(f["command_string"], f["error_message"]) for f in found if not f["success"]] == []
