"""What Kubernetes and JobSet would make of a manifest, as far as the tests need it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from llamapro_jax.launch.job import job
from llamapro_jax.launch.jobset import render


def rendered(config: Path | str, topology: str, *overrides: str, **options: Any) -> str:
    options = {"image": "registry/llamapro:1.0", "claim": "files"} | options
    return render(job(str(config), list(overrides), topology, **options), "job.yaml")


def documents(manifest: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ConfigMap and the JobSet."""
    config_map, job_set = yaml.safe_load_all(manifest)
    return config_map, job_set


def pod(job_set: dict[str, Any]) -> dict[str, Any]:
    return job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def job_failure(job_set: dict[str, Any], status: int | None) -> tuple[str, str]:
    """Reason and message of a Job of which a pod ended: exit status, or None when disrupted.

    https://kubernetes.io/docs/concepts/workloads/controllers/job, "Pod failure policy".
    """
    job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["backoffLimit"] == 0
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        codes = rule.get("onExitCodes")
        if codes is None and status is None:
            assert rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
            what = "Pod default/name has condition DisruptionTarget"
        elif codes and status and (status in codes["values"]) == (codes["operator"] == "In"):
            name = codes["containerName"]
            what = f"Container {name} for pod default/name failed with exit code {status}"
        else:
            continue
        return "PodFailurePolicy", f"{what} matching {rule['action']} rule at index {index}"
    return "BackoffLimitExceeded", "Job has reached the specified backoff limit"


def action(job_set: dict[str, Any], status: int | None) -> str:
    """What JobSet does then. https://jobset.sigs.k8s.io, "Failure Policy"."""
    reason, message = job_failure(job_set, status)
    for rule in job_set["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns")
        matches = not patterns or any(re.search(pattern, message) for pattern in patterns)
        if reason in rule["onJobFailureReasons"] and matches:
            return rule["action"]
    return "RestartJobSet"
