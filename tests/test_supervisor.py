"""The supervisor of a queued resource, turn by turn, with a gcloud that answers from a script."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from cloud import ScriptedCloud, fail, reports, say, state, unknown_flags

from llamapro_jax.launch import supervisor, tpu

ACTIVE = state("ACTIVE")
RUNS = reports("running - -")
DONE = reports("ended 0 8")
BUCKET = ["--staging", "gs://my-bucket/jobs"]
OPTIONS = ["--zone", "us-west4-a", "--type", "v5litepod-16", "--spot", "--poll", "0"]
JOB = ["configs/quickstart.yaml", "output=gs://my-bucket/runs/first"]
ABSENT = fail("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: no such thing")


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedCloud]:
    """One slice of one host. All that is said to gcloud is what the SDK knows."""
    cloud = ScriptedCloud(tmp_path / "cloud")
    monkeypatch.setenv("PATH", f"{cloud.directory}:{os.environ['PATH']}")
    monkeypatch.chdir(Path(tpu.__file__).parents[2])
    short = supervisor.Patience(unreachable=2, installing=2, apart=1, tries=4)
    monkeypatch.setattr(tpu, "PATIENCE", short)
    cloud.answer("hosts", say("10.0.0.2"))
    yield cloud
    assert [flag for call in cloud.calls() for flag in unknown_flags(call)] == []


def supervise(*more: str) -> int:
    return tpu.main(["supervise", "my-tpu", *OPTIONS, *more, *JOB])


def acts(cloud: ScriptedCloud) -> list[str]:
    """What was done, without what was only looked at."""
    return [key for key in cloud.keys() if key not in ("describe", "hosts", "ask")]


# ------------------------------------------------------------------- a run without disturbances


def test_from_nothing_to_done(cloud: ScriptedCloud, capsys: pytest.CaptureFixture[str]) -> None:
    cloud.answer(
        "describe", ABSENT, state("ACCEPTED"), state("WAITING_FOR_RESOURCES"),
        state("WAITING_FOR_RESOURCES"), state("PROVISIONING"), ACTIVE,
    )  # fmt: skip
    cloud.answer("ask", reports("none - -"), RUNS, reports("running - 4"), DONE)
    assert supervise() == 0
    assert acts(cloud) == ["create", "scp", "setup", "start", "delete"]
    said = capsys.readouterr().out
    assert said.count("WAITING_FOR_RESOURCES") == 1
    assert "training runs on 1 host(s), step 4 saved" in said
    assert "training is done, step 8 saved" in said and "my-tpu: deleted" in said
    [create] = [call for call in cloud.calls() if call[3] == "create"]
    assert {"--spot", "--node-id=my-tpu", "--zone=us-west4-a", "--async"} <= set(create)
    [start] = [call for call in cloud.calls() if "tpu_worker.sh start" in " ".join(call)]
    assert start[-4:-2] == ["--node=all", "--worker=all"]
    assert " start configs/quickstart.yaml output=gs://my-bucket/runs/first" in start[5]


def test_with_a_bucket_hosts_start_by_themselves(cloud: ScriptedCloud) -> None:
    cloud.answer("create", 'cp "${10#*startup-script=}" startup.sh')
    cloud.answer("describe", ABSENT, ACTIVE)
    cloud.answer("ask", reports("none - -"), reports("installing - -"), RUNS, DONE)
    assert supervise(*BUCKET) == 0
    assert acts(cloud) == ["storage", "create", "delete"]
    startup = (cloud.directory / "startup.sh").read_text()
    assert "gcloud storage cp gs://my-bucket/jobs/my-tpu.tar.gz llamapro_jax.tar.gz" in startup
    assert startup.endswith("tpu_worker.sh boot configs/quickstart.yaml output=gs://my-bucket/runs/first\n")  # noqa: E501  # fmt: skip


def test_one_that_runs_already_is_only_watched(cloud: ScriptedCloud) -> None:
    cloud.answer("describe", ACTIVE)
    cloud.answer("ask", RUNS, DONE)
    assert supervise("--keep") == 0
    assert acts(cloud) == []


def test_slices_are_one_resource(cloud: ScriptedCloud) -> None:
    cloud.answer("describe", ABSENT, state("ACTIVE", nodes=2))
    cloud.answer("hosts", say("10.0.0.2;10.0.0.3"))
    cloud.answer(
        "ask",
        reports(*["none - -"] * 4),
        reports(*["running - -"] * 4),
        reports(*["ended 0 8"] * 4),
    )
    assert supervise("--slices", "2") == 0
    [create] = [call for call in cloud.calls() if call[3] == "create"]
    assert {"--node-count=2", "--node-prefix=my-tpu"} <= set(create)
    [hosts] = [call for call in cloud.calls() if call[2] == "tpu-vm"]
    assert hosts[4] == "my-tpu-0"


# ------------------------------------------------------------------- preemption, restarts


@pytest.mark.parametrize("gone", ["SUSPENDED", "FAILED"])
def test_what_was_taken_away_is_created_again(
    cloud: ScriptedCloud, capsys: pytest.CaptureFixture[str], gone: str
) -> None:
    cloud.answer(
        "describe", ACTIVE, state("SUSPENDING"), state(gone, error="no capacity"),
        state("DELETING"), ABSENT, state("PROVISIONING"), ACTIVE,
    )  # fmt: skip
    cloud.answer("ask", reports("running - 4"), reports("none - -"), RUNS, DONE)
    assert supervise() == 0
    assert acts(cloud) == ["delete", "create", "scp", "setup", "start", "delete"]
    said = capsys.readouterr().out
    assert f"my-tpu is {gone} (no capacity). Restart 1 of 10 without a newer step" in said


@pytest.mark.parametrize("status", [42, 43, 134, 137, 143])
def test_what_a_restart_mends_is_started_again_where_it_is(
    cloud: ScriptedCloud, status: int
) -> None:
    cloud.answer("describe", ACTIVE)
    cloud.answer("ask", reports(f"ended {status} 4"), RUNS, DONE)
    assert supervise() == 0
    assert acts(cloud) == ["start", "delete"]


def test_a_host_that_was_started_anew_has_lost_its_run(cloud: ScriptedCloud) -> None:
    cloud.answer("describe", ACTIVE)
    cloud.answer("ask", reports("lost - 4"), RUNS, DONE)
    assert supervise("--prepare", "mount /mnt/files") == 0
    assert acts(cloud) == ["start", "delete"]
    # And its mounts; what hung on the old ones may have kept the output.
    [start] = [call[5] for call in cloud.calls() if "tpu_worker.sh start" in " ".join(call)]
    assert 0 < start.index("mount /mnt/files") < start.index("tpu_worker.sh start")
    assert f"start {JOB[0]} --takeover {JOB[1]}" in start


@pytest.mark.parametrize("status", [1, 2, 44, 45, 130])
def test_what_a_restart_does_not_mend_ends_with_its_status(
    cloud: ScriptedCloud, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    cloud.answer("describe", ACTIVE)
    cloud.answer("ask", RUNS, reports(f"ended {status} 4"))
    cloud.answer("tail", say("error: the last words"))
    assert supervise() == status
    assert acts(cloud) == ["tail", "delete"]
    said = capsys.readouterr().out
    assert f"training is ended with status {status}, step 4 saved" in said
    assert "error: the last words" in said


def test_keep_keeps(cloud: ScriptedCloud, capsys: pytest.CaptureFixture[str]) -> None:
    cloud.answer("describe", ACTIVE)
    cloud.answer("ask", reports("ended 2 -"))
    assert supervise("--keep") == 2
    assert acts(cloud) == ["tail"]
    assert "launch/tpu.sh delete my-tpu" in capsys.readouterr().out


def test_one_that_cannot_be_deleted_at_the_end_is_told(
    cloud: ScriptedCloud, capsys: pytest.CaptureFixture[str]
) -> None:
    cloud.answer("describe", ACTIVE)
    cloud.answer("ask", DONE)
    cloud.answer("delete", fail("backend error"))
    assert supervise() == 0
    assert "The resource stays, and costs" in capsys.readouterr().out


def test_somebody_who_stopped_it_is_obeyed(
    cloud: ScriptedCloud, capsys: pytest.CaptureFixture[str]
) -> None:
    cloud.answer("describe", ACTIVE)
    cloud.answer("hosts", say("10.0.0.2;10.0.0.3"))
    cloud.answer(
        "ask", reports("running - 4", "stopped 42 -"), reports("stopped 42 6", "stopped 42 -")
    )
    assert supervise() == 42
    assert acts(cloud) == []
    assert "was stopped by launch/tpu.sh stop, step 6 saved" in capsys.readouterr().out


def test_of_two_ends_the_one_that_a_restart_mends_counts(cloud: ScriptedCloud) -> None:
    """A host that died and came back alone is refused by the others, who die of its death."""
    cloud.answer("describe", ACTIVE)
    cloud.answer("hosts", say("10.0.0.2;10.0.0.3"))
    both = reports("running - 4", "running - -")
    cloud.answer(
        "ask", reports("ended 134 4", "ended 2 -"), both, reports("ended 0 8", "ended 0 -")
    )
    assert supervise() == 0
    assert acts(cloud) == ["start", "delete"]


@pytest.mark.parametrize("other", ["ended 134 4", "lost - 4", "stopped 42 4", "running - 4"])
def test_one_that_was_taken_over_is_not_started_again(cloud: ScriptedCloud, other: str) -> None:
    cloud.answer("describe", ACTIVE)
    cloud.answer("hosts", say("10.0.0.2;10.0.0.3"))
    cloud.answer("ask", reports("ended 45 4", other))
    assert supervise() == 45
    assert acts(cloud) == ["tail", "delete"]


def test_a_host_without_a_run_among_others_gets_one(cloud: ScriptedCloud) -> None:
    cloud.answer("describe", ACTIVE)
    cloud.answer("hosts", say("10.0.0.2;10.0.0.3"))
    apart = reports("running - 4", "ended 134 -")
    cloud.answer("ask", apart, apart, reports("running - 4", "running - -"), reports(*["ended 0 8"] * 2))  # noqa: E501  # fmt: skip
    assert supervise() == 0
    assert acts(cloud) == ["start", "delete"]


def test_restarts_without_progress_have_an_end(
    cloud: ScriptedCloud, capsys: pytest.CaptureFixture[str]
) -> None:
    cloud.answer("describe", ACTIVE)
    cloud.answer("ask", reports("ended 43 4"))
    assert supervise("--restarts", "2") == 1
    assert acts(cloud) == ["start", "start", "tail", "delete"]
    assert "2 restarts in a row saved no newer step: giving up" in capsys.readouterr().out


def test_a_newer_step_fills_the_budget_again(cloud: ScriptedCloud) -> None:
    cloud.answer("describe", ACTIVE)
    cloud.answer("ask", *[reports(f"ended 43 {step}") for step in (2, 4, 6)], DONE)
    assert supervise("--restarts", "1") == 0
    assert acts(cloud) == ["start"] * 3 + ["delete"]


def test_new_resources_count_as_restarts(cloud: ScriptedCloud) -> None:
    cloud.answer("describe", state("FAILED", error="internal error"))
    assert supervise("--restarts", "2") == 1
    assert acts(cloud) == ["delete"] * 3


# ------------------------------------------------------------------- what fails on the way


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (fail("ssh: connect to host 10.0.0.2 port 22: Connection refused", 255), "Connection"),
        (say("Could not prepare all 1 nodes, attempting to ssh into the rest."), "0 of 1 hosts"),
    ],
)
def test_hosts_that_do_not_answer_are_asked_again_and_then_replaced(
    cloud: ScriptedCloud, capsys: pytest.CaptureFixture[str], answer: str, said: str
) -> None:
    cloud.answer("describe", *[ACTIVE] * 4, ABSENT, ACTIVE)
    cloud.answer("ask", RUNS, answer, answer, answer, reports("none - -"), RUNS, DONE)
    assert supervise() == 0
    assert acts(cloud) == ["delete", "create", "scp", "setup", "start", "delete"]
    assert re.search(rf"my-tpu cannot be reached: .*{said}", capsys.readouterr().out)


def test_one_answer_that_is_missing_is_no_reason(cloud: ScriptedCloud) -> None:
    cloud.answer("describe", ACTIVE)
    cloud.answer("ask", RUNS, fail("", 255), RUNS, fail("", 255), fail("", 255), RUNS, DONE)
    assert supervise() == 0
    assert acts(cloud) == ["delete"]


def test_hosts_that_do_not_begin_by_themselves_are_set_up(cloud: ScriptedCloud) -> None:
    cloud.answer("describe", ACTIVE)
    cloud.answer("ask", *[reports("none - -")] * 3, RUNS, DONE)
    assert supervise(*BUCKET) == 0
    assert acts(cloud) == ["scp", "setup", "start", "delete"]


def test_an_install_without_end_is_given_another_resource(cloud: ScriptedCloud) -> None:
    cloud.answer("describe", *[ACTIVE] * 3, ABSENT, ACTIVE)
    cloud.answer("ask", *[reports("installing - -")] * 3, RUNS, DONE)
    assert supervise(*BUCKET) == 0
    assert acts(cloud) == ["delete", "storage", "create", "delete"]


def test_a_setup_that_fails_is_tried_again(cloud: ScriptedCloud) -> None:
    cloud.answer("describe", ACTIVE)
    cloud.answer("setup", fail("pip: no route to host"), "exit 0")
    cloud.answer("ask", reports("none - -"), reports("none - -"), RUNS, DONE)
    assert supervise() == 0
    assert acts(cloud) == ["scp", "setup", "scp", "setup", "start", "delete"]


def test_a_flaky_describe_does_not_matter(cloud: ScriptedCloud) -> None:
    flaky = fail("ERROR: (gcloud.compute...) There was a problem refreshing: 503 UNAVAILABLE")
    cloud.answer("describe", flaky, flaky, ACTIVE, flaky, ACTIVE)
    cloud.answer("ask", RUNS, DONE)
    assert supervise() == 0
    assert acts(cloud) == ["delete"]


def test_a_describe_that_always_fails_ends_it_without_touching_the_run(
    cloud: ScriptedCloud, capsys: pytest.CaptureFixture[str]
) -> None:
    cloud.answer("describe", fail("503 UNAVAILABLE"))
    assert supervise() == 2
    assert acts(cloud) == [] and len(cloud.keys()) == 5
    said = capsys.readouterr().err
    assert "503 UNAVAILABLE 5 times in a row" in said and "goes on" in said


def test_no_quota_is_waited_for(cloud: ScriptedCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    full = fail("ERROR: RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepodPerProjectPerZone' exceeded")
    cloud.answer("describe", ABSENT, ABSENT, ABSENT, ACTIVE)
    cloud.answer("create", full, full, "exit 0")
    cloud.answer("ask", RUNS, DONE)
    pauses: list[float] = []
    monkeypatch.setattr(tpu, "Supervisor", functools.partial(supervisor.Supervisor, sleep=pauses.append))  # noqa: E501  # fmt: skip
    arguments = [*OPTIONS[:-1], "30", *JOB]
    assert tpu.main(["supervise", "my-tpu", *arguments]) == 0
    assert acts(cloud) == ["create"] * 3 + ["delete"]
    assert pauses == [30, 60, 30, 30]


def test_requests_that_fail_for_want_of_room_are_made_more_and_more_seldom(
    cloud: ScriptedCloud, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = state("FAILED", error="Quota limit 'TPUV5sLitepodPerProjectPerZone' has been exceeded.")
    cloud.answer("describe", *[ABSENT, state("ACCEPTED"), full] * 3, ABSENT, ACTIVE)
    cloud.answer("ask", RUNS, DONE)
    pauses: list[float] = []
    monkeypatch.setattr(tpu, "Supervisor", functools.partial(supervisor.Supervisor, sleep=pauses.append))  # noqa: E501  # fmt: skip
    arguments = [*OPTIONS[:-1], "30", "--restarts", "1", *JOB]
    assert tpu.main(["supervise", "my-tpu", *arguments]) == 0
    assert acts(cloud) == ["create", "delete"] * 4
    assert pauses == [30, 30, 30, 30, 30, 60, 30, 30, 120, 30, 30]
    cloud.answer("describe", *[ABSENT, full] * 5)
    assert supervise() == 2
    assert "has been exceeded. 5 times in a row" in capsys.readouterr().err


def test_a_checkout_that_cannot_be_staged_is_tried_again(cloud: ScriptedCloud) -> None:
    cloud.answer("describe", ABSENT, ABSENT, ACTIVE)
    cloud.answer("storage", fail("503 UNAVAILABLE"), "exit 0")
    cloud.answer("ask", RUNS, DONE)
    assert supervise(*BUCKET) == 0
    assert acts(cloud) == ["storage", "storage", "create", "delete"]


@pytest.mark.parametrize(
    "text",
    [
        "ERROR: (gcloud.compute.tpus.queued-resources.create) PERMISSION_DENIED: Permission denied",
        "ERROR: (gcloud.compute.tpus.queued-resources.create) INVALID_ARGUMENT: v5litepod-17",
        "ERROR: You do not currently have an active account selected.",
    ],
)
def test_what_gcloud_refuses_is_not_tried_again(
    cloud: ScriptedCloud, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    cloud.answer("describe", ABSENT)
    cloud.answer("create", fail(text))
    assert supervise() == 2
    assert acts(cloud) == ["create"]
    assert text.split(": ", 1)[1] in capsys.readouterr().err


def test_a_create_whose_answer_was_lost(cloud: ScriptedCloud) -> None:
    cloud.answer("describe", ABSENT, ACTIVE)
    cloud.answer("create", fail("ALREADY_EXISTS: my-tpu"))
    cloud.answer("ask", RUNS, DONE)
    assert supervise() == 0


def test_one_that_exists_and_is_not_found_is_not_created_for_ever(cloud: ScriptedCloud) -> None:
    cloud.answer("describe", ABSENT)
    cloud.answer("create", fail("ALREADY_EXISTS: my-tpu"))
    assert supervise() == 2
    assert acts(cloud) == ["create"] * 5


@pytest.mark.parametrize(
    ("described", "hosts"), [(ACTIVE, ""), (say('{"state": {"state": "ACTIVE"}}'), "10.0.0.2")]
)
def test_a_slice_without_hosts_is_one_that_does_not_answer(
    cloud: ScriptedCloud, capsys: pytest.CaptureFixture[str], described: str, hosts: str
) -> None:
    cloud.answer("describe", described, ACTIVE)
    cloud.answer("hosts", say(hosts), say("10.0.0.2"))
    cloud.answer("ask", DONE)
    assert supervise() == 0
    assert "my-tpu: my-tpu has no host yet; asking again" in capsys.readouterr().out


def test_wait_takes_a_flaky_describe_and_ends_with_what_is_gone(
    cloud: ScriptedCloud, capsys: pytest.CaptureFixture[str]
) -> None:
    wait = ["wait", "my-tpu", "--poll", "0"]
    cloud.answer("describe", fail("503 UNAVAILABLE"), state("ACCEPTED"), ACTIVE, state("FAILED"))
    assert tpu.main(wait) == 0
    said = capsys.readouterr()
    assert "503 UNAVAILABLE; asking again" in said.err
    assert said.out == "my-tpu is ACCEPTED\nmy-tpu is ACTIVE\n"
    assert tpu.main(wait) == 2
    assert "my-tpu is FAILED; create it again" in capsys.readouterr().err
    cloud.answer("describe", fail("503 UNAVAILABLE"))
    assert tpu.main(wait) == 2


def test_a_delete_that_fails_is_tried_again(cloud: ScriptedCloud) -> None:
    cloud.answer("describe", state("SUSPENDED"), state("SUSPENDED"), ABSENT, ACTIVE)
    cloud.answer("delete", fail("backend error"), "exit 0")
    cloud.answer("ask", RUNS, DONE)
    assert supervise() == 0
    assert acts(cloud) == ["delete", "delete", "create", "delete"]


def test_a_state_that_is_not_known_is_waited_for(
    cloud: ScriptedCloud, capsys: pytest.CaptureFixture[str]
) -> None:
    cloud.answer("describe", state("PAINTED"), ACTIVE)
    cloud.answer("ask", DONE)
    assert supervise() == 0
    assert "PAINTED, which is not known here" in capsys.readouterr().out


def test_an_answer_that_is_not_understood_is_asked_for_again_and_shown(
    cloud: ScriptedCloud, capsys: pytest.CaptureFixture[str]
) -> None:
    cloud.answer("describe", "exit 0", say("{}"), ACTIVE)
    cloud.answer("ask", DONE)
    assert supervise() == 0
    assert "not understood" in capsys.readouterr().out
    cloud.answer("describe", *[say('{"state": "new style"}')] * 5)
    assert supervise() == 2
    assert "not understood" in capsys.readouterr().err


def test_output_on_a_disk_that_goes_with_the_host_is_refused(
    cloud: ScriptedCloud, capsys: pytest.CaptureFixture[str]
) -> None:
    for output in ([], ["output=runs/first"]):
        arguments = ["supervise", "my-tpu", *OPTIONS, JOB[0], *output]
        assert tpu.main(arguments) == 2
        assert "supervise: give output=gs://BUCKET/PATH" in capsys.readouterr().err
    assert cloud.keys() == []
