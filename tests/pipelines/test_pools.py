"""The templates of work pools for Docker and Kubernetes: what both take, and what a run in a pod does when its node is taken away."""

import asyncio
import dataclasses
import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import kubernetes_validate
import prefect_kubernetes.observer
import prefect_kubernetes.worker
import psutil
import pytest
from docker.constants import DEFAULT_DOCKER_API_VERSION
from docker.models.containers import _create_container_args
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.workers.base import BaseJobConfiguration
from prefect_docker.worker import DockerWorker, DockerWorkerJobConfiguration
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration
from ruamel.yaml import YAML

from tests.pipelines.conftest import Worker
from tests.pipelines.conftest import at_work as working
from tests.same_training import assert_same_training
from vrt.lifecycle import SECONDS_TO_SAVE

PROJECT = Path(__file__).parents[2]
WORKERS = {"docker": DockerWorkerJobConfiguration, "kubernetes": KubernetesWorkerJobConfiguration}
KINDS = list(WORKERS)
KUBERNETES = "1.31"
RIGHTS = PROJECT / "deploy" / "kubernetes-rights.yaml"


def path_of(kind: str) -> Path:
    return PROJECT / "deploy" / f"{kind}-pool.json"


def template(kind: str) -> dict[str, Any]:
    return json.loads(path_of(kind).read_text())


@pytest.fixture
def configured(services) -> Callable[..., BaseJobConfiguration]:
    """Makes what a worker makes of a template for a run whose deployment sets nothing but these values."""

    def make(kind: str, prefect: str = services["PREFECT_API_URL"], **values: Any) -> BaseJobConfiguration:
        with temporary_settings({PREFECT_API_URL: prefect}):
            configuration = asyncio.run(WORKERS[kind].from_template_and_values(base_job_template=template(kind), values=values))
            configuration.prepare_for_flow_run(FlowRun(flow_id=uuid4(), name="run"))
        return configuration

    return make


@pytest.fixture
def container(configured) -> Callable[..., dict[str, Any]]:
    """Makes what a Docker worker has the engine create for a run whose deployment sets nothing but these values."""

    def make(**values: Any) -> dict[str, Any]:
        # Of a Prefect on this machine an engine would be asked how containers reach it.
        configuration = configured("docker", prefect="http://prefect:4200/api", **values)
        settings = DockerWorker(work_pool_name="docker")._build_container_settings(None, configuration)
        return _create_container_args({**settings, "version": DEFAULT_DOCKER_API_VERSION})

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_prefects_server_makes_a_pool_of_it_and_an_older_one_takes_it(kind: str, services):
    name = f"{kind}-{os.getpid()}"
    for words, said in ((("create", name, "--type", kind), "Created work pool"), (("update", name), f"Updated work pool '{name}'")):
        command = [sys.executable, "-m", "prefect", "work-pool", *words, "--base-job-template", path_of(kind)]
        ended = subprocess.run(command, env={**os.environ, **services}, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert said in ended.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_every_variable_is_used_every_use_is_one_and_the_worker_knows_every_setting(kind: str):
    found = template(kind)
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(found["job_configuration"])))
    assert used == set(found["variables"]["properties"])
    assert set(found["job_configuration"]) <= set(WORKERS[kind].model_fields)


def test_a_container_trains_with_the_servers_of_its_worker_whose_keys_no_template_has(container, make_workspace, monkeypatch):
    workspace = make_workspace("container")
    workspace.edit(train__total_steps=1)
    # As compose.yaml's worker has it.
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    given = dict(container()["environment"])
    assert given.pop("PREFECT_API_URL") == "http://prefect:4200/api"
    # The keys that the folder itself has: an image has none.
    for path in (".dvc/config.local", "prefect.toml"):
        (workspace.root / path).unlink()
    image = {name: workspace.environment[name] for name in ("PATH", "PYTHONPATH")} | {"HOME": str(workspace.root), "VRT_HOME": "none"}
    for command in (["dvc", "repro", "prepare"], ["dvc", "push"], ["vrt", "train"]):
        ended = dataclasses.replace(workspace, environment=image | given).run(*command)
        assert ended.returncode == 0, ended.stdout
    named = template("docker")["variables"]["properties"]["env"]["default"].items()
    assert all(value == f"{{{{ ${name} }}}}" for name, value in named if not name.startswith("PREFECT_"))


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
    # GPUs, and the machines that Google's and Azure's clouds may take away; Amazon's have no taint of their own.
    taints = {"nvidia.com/gpu", "cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"}
    assert taints <= {toleration["key"] for toleration in pod["tolerations"]}
    assert container["envFrom"] == [{"secretRef": {"name": "vrt-servers"}}]
    # Of a worker's own settings Prefect hands on its own.
    assert all(variable["name"].startswith("PREFECT_") for variable in container["env"])


def test_a_container_has_shared_memory_and_gpus_only_where_they_are_asked_for(container):
    host = container()["host_config"]
    assert host["ShmSize"] == 2 * 1024**3
    assert host["DeviceRequests"] == []
    (example,) = re.findall(r"\[\{.*\}\]", template("docker")["variables"]["properties"]["gpus"]["description"])
    (asked,) = container(gpus=json.loads(example))["host_config"]["DeviceRequests"]
    assert (asked["Driver"], asked["Count"], asked["Capabilities"]) == ("nvidia", -1, [["gpu"]])


def test_the_worker_of_a_cluster_has_the_rights_that_prefects_code_uses_and_no_more():
    account, role, binding = documents = list(YAML(typ="safe").load_all(RIGHTS.read_text()))
    for document in documents:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    home = template("kubernetes")["variables"]["properties"]["namespace"]["default"]
    assert [document["metadata"]["namespace"] for document in documents] == [home] * 3
    assert binding["subjects"] == [{"kind": "ServiceAccount", **account["metadata"]}]
    assert binding["roleRef"] == {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": role["metadata"]["name"]}

    code = inspect.getsource(prefect_kubernetes.worker) + inspect.getsource(prefect_kubernetes.observer)
    verbs = {"read": "get"}
    used = {
        (f"{noun}s".replace("pod_logs", "pods/log"), verbs.get(verb, verb))
        for verb, noun in re.findall(r"\.(create|delete|list|patch|read|replace)_namespaced_(\w+)\(", code)
        # Prefect keeps secrets of its own only where settings ask for that.
        if noun != "secret"
    }
    watched = re.findall(r'kopf\.on\.event\((?:\s*"batch",\s*"v1",)?\s*"(\w+)"', code)
    used |= {(resource, verb) for resource in watched for verb in ("list", "watch")}
    assert {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]} == used


@dataclasses.dataclass
class Pods:
    """One run, which is executed as in a pod: by the template's command, again and again."""

    workspace: Any
    worker: Worker
    run: str

    def start(self) -> subprocess.Popen:
        """The main process of a pod."""
        variables = template("kubernetes")["variables"]["properties"]
        environment = {**self.workspace.environment, **variables["env"]["default"], "PREFECT__FLOW_RUN_ID": self.run}
        self.workspace.log.write_text("")
        with self.workspace.log.open("a") as output:
            return subprocess.Popen(
                shlex.split(variables["command"]["default"]), cwd=self.workspace.root, env=environment, stdout=output, stderr=subprocess.STDOUT
            )

    def newest(self) -> int:
        """The newest registered step."""
        listed = json.loads(self.workspace.vrt("checkpoints", "list", "--json").stdout)
        return max(row["step"] for row in listed["checkpoints"] if row["registered"])

    def ended(self, pod: subprocess.Popen) -> str:
        """The state of the run in Prefect, once the pod has ended well."""
        # What Prefect gives a flow, what a save may take, and starting anew.
        assert pod.wait(300) == 0, self.workspace.log.read_text()
        return self.worker.look(self.run).state_name


@pytest.fixture
def pods(make_workspace) -> Iterator[Pods]:
    workspace = make_workspace("pod")
    pool = f"pods-{workspace.name}"
    # The worker is there for what it sets up alone; nobody works for the pool.
    with working(workspace) as worker:
        worker.prefect("work-pool", "create", pool, "--type", "kubernetes", "--base-job-template", str(path_of("kubernetes")))
        worker.prefect("--no-prompt", "deploy", "pipelines/train.py:train", "--name", "pod", "--pool", pool)
        yield Pods(workspace, worker, worker.start("train/pod", retry_pause=0))


@pytest.mark.long
def test_a_run_whose_pod_is_told_to_end_saves_is_scheduled_again_and_completes(pods: Pods, uninterrupted):
    pod = pods.start()
    pods.workspace.wait_for("checkpoint 4 registered", pod)
    everything = psutil.Process(pod.pid).children(recursive=True)
    pod.send_signal(signal.SIGTERM)
    assert pods.ended(pod) == "AwaitingRetry"
    assert not psutil.wait_procs(everything, timeout=5)[1]
    assert pods.ended(pods.start()) == "Completed"
    assert_same_training(uninterrupted, pods.workspace)


@pytest.mark.long
def test_a_pod_outlives_the_flow_that_prefect_kills_until_the_trainer_has_saved(pods: Pods, uninterrupted):
    pod = pods.start()
    pods.workspace.wait_for("checkpoint 4 registered", pod)
    everything = psutil.Process(pod.pid).children(recursive=True)
    (flow,) = (process for process in everything if "prefect.engine" in process.cmdline())
    (trainer,) = (process for process in everything if process.cmdline()[-3:] == ["-m", "vrt", "train"])
    # As one that is in the middle of a step of minutes.
    trainer.suspend()
    before = pods.newest()
    pod.send_signal(signal.SIGTERM)
    assert not psutil.wait_procs([flow], timeout=90)[1]
    assert pod.poll() is None
    # Linux may have done so already: it wakes those whose group has lost its last parent.
    with suppress(psutil.NoSuchProcess):
        trainer.resume()
    assert pods.ended(pod) == "AwaitingRetry"
    assert not [process for process in everything if process.is_running()]
    saved = pods.newest()
    assert saved > before

    again = pods.start()
    pods.workspace.wait_for(f"continuing after step {saved} of", again)
    assert pods.ended(again) == "Completed"
    assert_same_training(uninterrupted, pods.workspace)
