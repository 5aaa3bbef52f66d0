"""`llamapro launch`: the manifests for GKE, the commands for xpk, what is refused before."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from manifests import action, documents, pod, rendered

from llamapro_jax import capacity, cli, topology
from llamapro_jax.errors import UserError
from llamapro_jax.exit_codes import PREEMPTED, worth_restarting
from llamapro_jax.launch import jobset, xpk
from llamapro_jax.launch.job import default_name, job
from llamapro_jax.launch.nodes import nodes_of
from llamapro_jax.machines import machine_names

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "llama2_7b_pro.yaml"
SCHEMA = json.loads((ROOT / "tests/schemas/jobset.json").read_text())
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("v4-8", {}),
    ("v5p-128", {"namespace": "research", "max_restarts": 3}),
    ("2xv5e-32", {"spot": True}),
    ("v6e-8", {"claim": None, "bucket": "files", "service_account": "trainer"}),
    ("4xv6e-256", {"reservation": "mine", "grace": 90}),
    ("tpu7x-16", {}),
    ("h100-8", {}),
    ("h100-16", {}),
    ("h200-32", {}),
    ("b200-16", {}),
]


# ------------------------------------------------------------------- machines


@pytest.mark.parametrize(
    ("name", "accelerator", "topology", "machine", "chips", "hosts"),
    [
        ("v4-8", "tpu-v4-podslice", "2x2x1", "ct4p-hightpu-4t", 4, 1),
        ("v4-32", "tpu-v4-podslice", "2x2x4", "ct4p-hightpu-4t", 4, 4),
        ("v5e-1", "tpu-v5-lite-podslice", "1x1", "ct5lp-hightpu-1t", 1, 1),
        ("v5e-8", "tpu-v5-lite-podslice", "2x4", "ct5lp-hightpu-8t", 8, 1),
        ("v5e-16", "tpu-v5-lite-podslice", "4x4", "ct5lp-hightpu-4t", 4, 4),
        ("v5p-128", "tpu-v5p-slice", "4x4x4", "ct5p-hightpu-4t", 4, 16),
        ("v5p-16", "tpu-v5p-slice", "2x2x2", "ct5p-hightpu-4t", 4, 2),
        ("v6e-4", "tpu-v6e-slice", "2x2", "ct6e-standard-4t", 4, 1),
        ("v6e-256", "tpu-v6e-slice", "16x16", "ct6e-standard-4t", 4, 64),
        ("tpu7x-16", "tpu7x", "2x2x2", "tpu7x-standard-4t", 4, 2),
    ],
)
def test_tpus(
    name: str, accelerator: str, topology: str, machine: str, chips: int, hosts: int
) -> None:
    nodes = nodes_of(name)
    assert nodes.labels == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    assert (nodes.machine_type, nodes.chips, nodes.hosts) == (machine, chips, hosts)


def test_every_machine_that_plan_knows_has_nodes_or_says_why() -> None:
    for name in machine_names():
        kind = name.partition("-")[0]
        if kind in ("cpu", "a100"):
            with pytest.raises(UserError, match=f"'{name}' cannot be launched on GKE; .*h200"):
                nodes_of(name)
        else:
            nodes = nodes_of(name)
            devices = nodes.hosts * nodes.chips * nodes.machine.chip.devices_per_chip
            assert devices == nodes.machine.devices, name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("2xv6e-8", "v6e-8 is one host; take one larger slice"),
        ("v6e-12", "of v6e there are v6e-1, v6e-4"),
        ("h100-12", "of h100 there are h100-1"),
        ("b200-12", "of h200 there are"),
        ("v7-8", "is not known"),
    ],
)
def test_machines_that_are_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        nodes_of(name)


# ------------------------------------------------------------------- manifests


@pytest.mark.parametrize(("name", "options"), KINDS, ids=[name for name, _ in KINDS])
def test_manifests_are_what_kubernetes_and_jobset_take(name: str, options: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    text = rendered(CONFIG, name, "training.steps=3", **options)
    for document in yaml.safe_load_all(text):
        jsonschema.Draft7Validator(SCHEMA).validate(document)
    assert "\n\n\n" not in text and not re.search(r"[ \t]$", text, re.MULTILINE)
    config_map, job_set = documents(text)
    assert config_map["data"]["run.yaml"] == CONFIG.read_text()
    spec, nodes = pod(job_set), nodes_of(name)
    [replicated] = job_set["spec"]["replicatedJobs"]
    assert replicated["replicas"] == nodes.slices
    assert replicated["template"]["spec"]["parallelism"] == nodes.hosts
    assert replicated["template"]["spec"]["completions"] == nodes.hosts
    [trainer] = spec["containers"]
    assert trainer["resources"]["limits"] == {nodes.resource: nodes.chips}
    assert trainer["args"][-2:] == ["/etc/llamapro/run.yaml", "training.steps=3"]
    mounted = {volume["name"] for volume in spec["volumes"]}
    containers = [trainer, *spec.get("initContainers", [])]
    assert mounted == {mount["name"] for one in containers for mount in one["volumeMounts"]}
    # What Kubernetes checks beside the types.
    assert spec["restartPolicy"] == "Never"
    for rule in replicated["template"]["spec"]["podFailurePolicy"]["rules"]:
        values = rule.get("onExitCodes", {}).get("values", [1])
        assert values == sorted(set(values)) and 0 < len(values) < 256


def test_the_schema_refuses_what_is_wrong() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft7Validator(SCHEMA)
    text = rendered(CONFIG, "v5p-128")
    for old, new in (
        ("action: FailJobSet", "action: StopJobSet"),
        ("maxRestarts: 100", "maxRestarts: ten"),
        ("completionMode: Indexed", "completionmode: Indexed"),
        ("terminationGracePeriodSeconds: 600", "gracePeriodSeconds: 600"),
        ("operator: NotIn", "operators: NotIn"),
    ):
        assert text.count(old) == 1
        job_set = list(yaml.safe_load_all(text.replace(old, new)))[1]
        assert not validator.is_valid(job_set), new


@pytest.mark.parametrize("name", ["v5p-128", "h200-16"])
def test_what_restarts_is_what_the_exit_codes_say(name: str) -> None:
    _, job_set = documents(rendered(CONFIG, name))
    for status in range(1, 256):
        found = action(job_set, status)
        if status == PREEMPTED:
            assert found == "RestartJobSetAndIgnoreMaxRestarts"
        else:
            assert found == ("RestartJobSet" if worth_restarting(status) else "FailJobSet"), status
    # Preempted before it had saved.
    assert action(job_set, None) == "RestartJobSetAndIgnoreMaxRestarts"


def test_options_of_the_nodes() -> None:
    _, job_set = documents(rendered(CONFIG, "2xv5e-32", spot=True, grace=90))
    spec = pod(job_set)
    assert spec["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert {"key": "cloud.google.com/gke-spot", "operator": "Exists"} in spec["tolerations"]
    assert spec["terminationGracePeriodSeconds"] == 90
    assert spec["hostNetwork"] and spec["dnsPolicy"] == "ClusterFirstWithHostNet"
    annotations = job_set["metadata"]["annotations"]
    assert list(annotations.values()) == ["cloud.google.com/gke-nodepool"]

    text = rendered(CONFIG, "v5p-16", claim=None, bucket="b", reservation="r")
    _, job_set = documents(text)
    assert pod(job_set)["nodeSelector"]["cloud.google.com/reservation-name"] == "r"
    [data] = [volume for volume in pod(job_set)["volumes"] if volume["name"] == "data"]
    assert data["csi"]["volumeAttributes"]["bucketName"] == "b"
    template = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert template["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
    assert "--reservation=r" in text and "--tpu-topology=2x2x2 " in text


@pytest.mark.parametrize("name", ["h100-16", "h200-16", "b200-16"])
def test_gpu_nodes_find_each_other_and_their_network(name: str) -> None:
    _, job_set = documents(rendered(CONFIG, name, name="first"))
    [trainer] = pod(job_set)["containers"]
    environment = {entry["name"]: entry.get("value") for entry in trainer["env"]}
    assert "LLAMAPRO_RESTARTS" in environment
    assert environment["JAX_COORDINATOR_ADDRESS"] == "first-train-0-0.first:8476"
    assert environment["JAX_NUM_PROCESSES"] == "2"
    # The networks are asked for, and the plugin's own script sets NCCL's environment.
    template = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    interfaces = json.loads(template["metadata"]["annotations"]["networking.gke.io/interfaces"])
    assert [one["interfaceName"] for one in interfaces] == [
        f"eth{n}" for n in range(len(interfaces))
    ]
    script = trainer["command"][2].split()[1]
    mounts = [mount["mountPath"] for mount in trainer["volumeMounts"]]
    assert any(script.startswith(f"{mount}/") for mount in mounts)
    assert trainer["securityContext"]["runAsNonRoot"]
    assert ("initContainers" in pod(job_set)) == (name == "h100-16")

    _, alone = documents(rendered(CONFIG, name.replace("16", "8")))
    [trainer] = pod(alone)["containers"]
    assert not any(entry["name"].startswith(("JAX_C", "NCCL")) for entry in trainer["env"])


def test_the_image_starts_the_arguments_behind_the_nodes_script(tmp_path: Path) -> None:
    """The shell line of GPU nodes, run: quotes and spaces in settings stay."""
    _, job_set = documents(rendered(CONFIG, "h200-16", "output=runs/it's so"))
    [trainer] = pod(job_set)["containers"]
    (tmp_path / "set_nccl_env.sh").write_text("export NCCL_NET=gIB\n")
    (tmp_path / "dumb-init").write_text('#!/bin/sh\necho "$NCCL_NET"; printf "%s\\n" "$@"\n')
    (tmp_path / "dumb-init").chmod(0o755)
    bash, option, line, name = trainer["command"]
    line = re.sub(r"\S+/set_nccl_env.sh", str(tmp_path / "set_nccl_env.sh"), line)
    done = subprocess.run(
        [bash, option, line, name, *trainer["args"]],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["gIB", "--", *trainer["args"]]


def test_the_commands_in_the_comments() -> None:
    text = rendered(CONFIG, "2xv5e-32", name="first", spot=True)
    comments = [line[2:] for line in text.splitlines() if line.startswith("# ")]
    assert comments[0] == f"llamapro train {CONFIG}"
    assert "on 2xv5e-32: 2 slices of 8 hosts of 4 TPU chips" in comments[1]
    for word in ("nodes", "start", "watch", "log", "why", "stop"):
        assert len([line for line in comments if line.startswith(f"{word} ")]) == 1, word


@pytest.mark.slow
def test_the_node_pools_are_what_gcloud_takes(tmp_path: Path) -> None:
    """With the SDK's own lint, which needs no login."""
    program = shutil.which("gcloud")
    if program is None:
        pytest.skip("gcloud is not installed")
    lines = []
    for name, options in KINDS:
        options = options if options.get("bucket") else {"claim": "files"} | options
        found = job(str(CONFIG), [], name, image="i:1", **options)
        lines.append(shlex.join(jobset.node_pool(found)))
    wrong = lines[0].replace("--num-nodes", "--nodes-num")
    file = tmp_path / "commands.json"
    file.write_text(json.dumps([{"command_string": line} for line in [*lines, wrong]]))
    done = subprocess.run(
        [program, "meta", "lint-gcloud-commands", f"--commands-file={file}"],
        env={**os.environ, "CLOUDSDK_CONFIG": str(tmp_path / "config")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode != 0:
        pytest.skip(f"this SDK has no lint: {done.stderr[-200:]}")
    found = json.loads(done.stdout)
    refused = [one["command_string"] for one in found if not one["success"]]
    assert len(found) == len(lines) + 1
    assert refused == [wrong], found


# ------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ([], {"claim": None}, "output: 'runs/llama2_7b_pro' needs storage .*give --claim NAME"),
        (["output=/tmp/run"], {}, "output: '/tmp/run' is in the container and lost with it"),
        (["output=hdfs://b/run"], {}, "output: 'hdfs://b/run': a run writes to gs://"),
        (["model=/models/a"], {}, "model: '/models/a' is in the container"),
        (["output=/database/run"], {}, "output: '/database/run' is in the container"),
        ([], {"bucket": "b"}, "--claim and --bucket: both"),
        ([], {"spot": True, "reservation": "r"}, "--spot and --reservation"),
        ([], {"image": "registry:5000/llamapro"}, "names no version; give one, such as"),
        ([], {"image": "llamapro"}, "--image: 'llamapro' names no version"),
        ([], {"name": "My_Run"}, "--name: 'My_Run' is no name for Kubernetes"),
        ([], {"name": "a" * 41}, "up to 40 small letters"),
        ([], {"max_restarts": -1}, "--max-restarts: -1 is below 0"),
        ([], {"grace": 5}, "--grace: 5 s is too short for a save; give 30"),
        ([], {"claim": "my: files"}, "--claim: 'my: files' is no name: small letters"),
        ([], {"service_account": "A"}, "--service-account: 'A' is no name"),
        (["training.step=3"], {}, "training.step"),
    ],
)
def test_jobs_that_are_refused(overrides: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rendered(CONFIG, "v5p-128", *overrides, **options)


def test_a_remote_output_needs_no_storage_and_data_under_it_is_taken() -> None:
    rendered(CONFIG, "v5p-8", "output=gs://b/run", "model=gs://b/model", claim=None)
    rendered(CONFIG, "v5p-8", "output=/data/runs/a", "model=/data/models/b")


@pytest.mark.parametrize(
    ("output", "name"),
    [("runs/Llama2_7B.pro/", "llama2-7b-pro"), ("gs://b/x", "x"), ("gs://b/--", "llamapro")],
)
def test_the_name_is_that_of_the_output(output: str, name: str) -> None:
    config = job(str(CONFIG), [f"output={output}"], "v5p-8", image="i:1", claim="c", name="n")
    assert default_name(config.config) == name


# ------------------------------------------------------------------- the verb


def launch(*words: str) -> int:
    return cli.main(["launch", *words])


def test_the_verb_prints_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    common = ["configs/llama2_7b_pro.yaml", "topology=v5p-16", "--image", "i:1", "--claim", "c"]
    assert launch("gke", *common) == 0
    printed = capsys.readouterr().out
    assert documents(printed)[1]["metadata"]["name"] == "llama2-7b-pro"
    file = tmp_path / "my job.yaml"
    assert launch("gke", *common, "--output", str(file)) == 0
    assert f"kubectl apply --filename '{file}'" in capsys.readouterr().out
    assert documents(file.read_text()) == documents(printed)

    assert launch("gke", "configs/llama2_7b_pro.yaml", *common[2:]) == 2
    assert "topology: is given 0 times; give it once" in capsys.readouterr().err
    assert launch("gke", *common[:2], "topology=v5p-8", *common[2:]) == 2
    with pytest.raises(SystemExit) as end:
        launch("gcp", *common)
    assert end.value.code == 2 and "invalid choice: 'gcp'" in capsys.readouterr().err


def assessment(fits: bool) -> Any:
    return SimpleNamespace(
        fits=fits,
        peak_bytes=70 * 2**30,
        hbm_bytes=90 * 2**30,
        advice=("training.remat=full", "v5p-32"),
        seconds=SimpleNamespace(roofline=2.0),
        tokens_per_step=1000_000,
        trainable_parameters=10**9,
        days=lambda share=1.0: 3.0 / share,
    )


def test_plan_says_how_fast_and_refuses_what_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(topology, "prepare_environment", lambda machine: None)
    words = [str(CONFIG), "topology=v5p-16", "--image", "i:1", "--claim", "c", "--plan"]
    monkeypatch.setattr(capacity, "assess", lambda *_: assessment(fits=True))
    assert launch("gke", *words) == 0
    hints = capsys.readouterr().out.splitlines()[2:5]
    assert hints[0] == "# 70.0 of 90.0 GiB of each device (llamapro plan)"
    assert "500,000 tokens/s, 3.0 days; at half" in hints[1] and "250,000 tokens/s" in hints[1]
    assert "a save writes 12.0 GB: in 600 s if the storage takes 20 MB/s" in hints[2]
    monkeypatch.setattr(capacity, "assess", lambda *_: assessment(fits=False))
    assert launch("gke", *words) == 2
    assert "It fits with: training.remat=full; v5p-32" in capsys.readouterr().err


# ------------------------------------------------------------------- xpk


def xpk_command(name: str, *overrides: str, **options: Any) -> list[str]:
    options = {"image": "registry/llamapro:1.0", "claim": "files"} | options
    found = job("configs/llama2_7b_pro.yaml", list(overrides), name, **options)
    return xpk.command(found, "my-xpk", options["claim"], "us-east5-b")


@pytest.fixture
def in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.usefixtures("in_checkout")
def test_xpk_is_told_what_it_does_not_know() -> None:
    words = xpk_command("2xv5e-32", "optimizer.learning_rate=1e-4", spot=True)
    assert "--tpu-type=v5litepod-32" in words and "--num-slices=2" in words
    assert "--restart-on-exit-codes=43" in words and "--spot" in words
    [line] = [word for word in words if word.startswith("--command=")]
    assert line.endswith("/opt/llamapro/configs/llama2_7b_pro.yaml optimizer.learning_rate=1e-4")
    assert "&& exec python -m llamapro_jax.launch.entry " in line
    assert "--tpu-type=tpu7x-16" in xpk_command("2xtpu7x-16")


@pytest.mark.usefixtures("in_checkout")
def test_xpk_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="with xpk TPUs alone are covered; for GPUs use"):
        xpk_command("h200-16")
    elsewhere = shutil.copy(CONFIG, tmp_path / "my.yaml")
    more = ["--image", "i:1", "--cluster", "c", "--storage", "files"]
    assert launch("xpk", str(elsewhere), "topology=v5p-16", *more) == 2
    assert "xpk carries no file to the pods" in capsys.readouterr().err
    assert launch("xpk", "configs/llama2_7b_pro.yaml", "topology=v5p-16", *more) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("xpk workload create --workload=llama2-7b-pro --cluster=c ")
    assert all(line.startswith("# ") for line in lines[:-1])


def xpk_program() -> str | None:
    """xpk needs an environment of its own: LLAMAPRO_XPK, or on PATH."""
    return os.environ.get("LLAMAPRO_XPK") or shutil.which("xpk")


@pytest.mark.slow
@pytest.mark.usefixtures("in_checkout")
@pytest.mark.parametrize("name", ["2xv6e-64", "v5p-128", "v5e-16", "v4-32"])
def test_xpk_accepts_the_command(name: str, tmp_path: Path) -> None:
    program = xpk_program()
    if program is None:
        pytest.skip("xpk is not installed")
    words = xpk_command(name, "output=runs/it's so", spot=True)
    file = tmp_path / "xpk.yaml"
    dry = ["--dry-run", "--skip-validation", "--project=p", f"--output-manifest-file={file}"]
    done = subprocess.run(
        [program, *words[1:], *dry],
        env={**os.environ, "HOME": str(tmp_path), "PYTHONPATH": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    job_set = yaml.safe_load(file.read_text())
    nodes = nodes_of(name)
    [replicated] = job_set["spec"]["replicatedJobs"]
    assert replicated["replicas"] == nodes.slices
    assert replicated["template"]["spec"]["completions"] == nodes.hosts
    spec = pod(job_set)
    for label, value in nodes.labels.items():
        assert str(spec["nodeSelector"][label]) == value
    assert spec["terminationGracePeriodSeconds"] == 600
    [line] = [word for word in words if word.startswith("--command=")]
    assert line.removeprefix("--command=") in spec["containers"][0]["command"][-1]
    [rule] = replicated["template"]["spec"]["podFailurePolicy"]["rules"]
    restarted = rule["onExitCodes"]["values"]
    assert {42, 43, 134, 137, 143} <= set(restarted) and not {1, 2, 44, 45} & set(restarted)


def test_help_names_the_places() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llamapro_jax.cli", "launch", "gke", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    for option in ("--image", "--claim", "--bucket", "--grace", "--max-restarts", "--spot"):
        assert option in done.stdout
