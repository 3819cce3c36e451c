"""The templates of work pools for Docker and Kubernetes: what both take, and what a run in a pod does when its node is taken away."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import kubernetes_validate
import psutil
import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.workers.base import BaseJobConfiguration
from prefect_docker.worker import DockerWorkerJobConfiguration
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration
from ruamel.yaml import YAML

from tests.pipelines.conftest import at_work as working
from tests.same_training import assert_same_training
from vrt.lifecycle import SECONDS_TO_SAVE

PROJECT = Path(__file__).parents[2]
WORKERS = {"docker": DockerWorkerJobConfiguration, "kubernetes": KubernetesWorkerJobConfiguration}
KINDS = list(WORKERS)
KUBERNETES = "1.31"


def path_of(kind: str) -> Path:
    return PROJECT / "deploy" / f"{kind}-pool.json"


def template(kind: str) -> dict[str, Any]:
    return json.loads(path_of(kind).read_text())


@pytest.fixture
def configured(services) -> Callable[[str], BaseJobConfiguration]:
    """Makes what a worker makes of a template for a run whose deployment sets nothing."""

    def make(kind: str) -> BaseJobConfiguration:
        with temporary_settings({PREFECT_API_URL: services["PREFECT_API_URL"]}):
            configuration = asyncio.run(WORKERS[kind].from_template_and_values(base_job_template=template(kind), values={}))
        configuration.prepare_for_flow_run(FlowRun(flow_id=uuid4(), name="run"))
        return configuration

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_prefects_server_makes_a_pool_of_it(kind: str, services):
    command = [sys.executable, "-m", "prefect", "work-pool", "create", f"{kind}-{os.getpid()}", "--type", kind, "--base-job-template", path_of(kind)]
    ended = subprocess.run(command, env={**os.environ, **services}, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Created work pool" in ended.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_every_variable_is_used_every_use_is_one_and_the_worker_knows_every_setting(kind: str):
    found = template(kind)
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(found["job_configuration"])))
    assert used == set(found["variables"]["properties"])
    assert set(found["job_configuration"]) <= set(WORKERS[kind].model_fields)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_beats_as_one_of_the_process_pool_does(kind: str, configured):
    deployed = YAML(typ="safe").load((PROJECT / "prefect.yaml").read_text())["definitions"]["work"]["job_variables"]["env"]
    assert deployed.items() <= configured(kind).env.items()


def test_the_job_is_one_that_kubernetes_takes(configured):
    manifest = configured("kubernetes").job_manifest
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    manifest["spec"]["template"]["spec"]["tolerance"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_a_pod_has_a_gpu_shared_memory_time_to_save_and_no_secret_of_its_own(configured):
    pod = configured("kubernetes").job_manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert pod["volumes"][0]["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}
    assert container["volumeMounts"] == [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    assert pod["terminationGracePeriodSeconds"] > 2 * SECONDS_TO_SAVE
    assert container["envFrom"] == [{"secretRef": {"name": "vrt-servers"}}]
    # Of a worker's own settings Prefect hands on its own.
    assert all(variable["name"].startswith("PREFECT_") for variable in container["env"])


@pytest.mark.long
def test_a_run_whose_pod_is_told_to_end_saves_is_scheduled_again_and_completes(make_workspace, uninterrupted):
    workspace = make_workspace("pod")
    pool = f"pods-{os.getpid()}"
    # The worker is there for what it sets up alone; nobody works for the pool.
    with working(workspace) as worker:
        worker.prefect("work-pool", "create", pool, "--type", "kubernetes", "--base-job-template", str(path_of("kubernetes")))
        worker.prefect("--no-prompt", "deploy", "pipelines/train.py:train", "--name", "pod", "--pool", pool)
        run = worker.start("train/pod", retry_pause=0)
        environment = {**workspace.environment, **template("kubernetes")["variables"]["properties"]["env"]["default"], "PREFECT__FLOW_RUN_ID": run}
        states = []
        for told in (True, False):
            pod = pod_of(workspace, environment)
            if told:
                workspace.wait_for("checkpoint 4 registered", pod)
                everything = psutil.Process(pod.pid).children(recursive=True)
                pod.send_signal(signal.SIGTERM)
                assert pod.wait(2 * SECONDS_TO_SAVE) == 0, workspace.log.read_text()
                assert not psutil.wait_procs(everything, timeout=5)[1]
            assert pod.wait(300) == 0, workspace.log.read_text()
            states.append(worker.look(run).state_name)
    assert states == ["AwaitingRetry", "Completed"], workspace.log.read_text()
    assert_same_training(uninterrupted, workspace)


def pod_of(workspace, environment: dict[str, str]) -> subprocess.Popen:
    """The main process of a pod, with the command that a worker gives it."""
    workspace.log.write_text("")
    with workspace.log.open("a") as output:
        command = [sys.executable, "-m", "prefect", "flow-run", "execute"]
        return subprocess.Popen(command, cwd=workspace.root, env=environment, stdout=output, stderr=subprocess.STDOUT)
