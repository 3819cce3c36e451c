"""The MLflow registry against a real server: one run per lineage, each point and each checkpoint once."""

import dataclasses
import io
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from vrt.checkpoint.errors import CheckpointError, StoreRefuses, StoreUnavailable
from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.manifest import Manifest
from vrt.checkpoint.registry import MlflowRegistry, Sibling
from vrt.checkpoint.resume import Registered
from vrt.checkpoint.tracking import Lineage


@pytest.fixture
def named(services, tmp_path: Path) -> Lineage:
    """A lineage of the test's own in the shared server."""
    return Lineage(f"{tmp_path.name}-{os.getpid()}", "0123456789abcdef", {"seed": 1})


@pytest.fixture
def opened(named: Lineage):
    """Opens the registry as each attempt, in a process of its own, does."""

    def attempt(lineage: Lineage = named, **params: object) -> MlflowRegistry:
        registry = MlflowRegistry(lineage)
        registry.open(params or {"seed": 1}, {"vrt.host": "here"})
        return registry

    return attempt


@pytest.fixture
def mlflow(services) -> MlflowClient:
    return MlflowClient()


def history(mlflow: MlflowClient, registry: MlflowRegistry, key: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in mlflow.get_metric_history(registry.run_id, key))


def test_each_attempt_continues_the_run_of_its_lineage(opened, mlflow, named):
    first = opened(seed=1)
    first.close("KILLED")
    assert mlflow.get_run(first.run_id).info.status == "KILLED"
    second = opened(seed=1)
    assert (first.attempt, second.attempt) == (1, 2)
    run = mlflow.get_run(second.run_id)
    assert second.run_id == first.run_id
    assert (run.info.run_name, run.info.status, run.data.params) == (named.id, "RUNNING", {"seed": "1"})
    assert run.data.tags | {"vrt.attempts": "2", "vrt.host": "here", "vrt.lineage": named.id} == run.data.tags
    assert second.checkpoints_address == f"{run.info.artifact_uri}/checkpoints"
    assert second.checkpoints_address.startswith("s3://mlflow/")


def test_other_params_than_the_runs_do_not_stop_an_attempt(opened, mlflow):
    # A longer training of the same lineage: MLflow refuses to change a param, and marks the run failed where one tries.
    opened(total_steps=10)
    assert mlflow.get_run(opened(total_steps=20).run_id).data.params == {"total_steps": "10"}


ROWS = [{"step": 1, "train/loss": 0.5}, {"step": 2, "train/loss": 0.25, "val/psnr": 30.0}, {"step": 3, "train/loss": 0.125}]


def test_a_point_sent_again_is_shown_once(opened, mlflow):
    registry = opened()
    registry.send(ROWS[:2])
    registry.send(ROWS)
    # After a restart the whole history is sent again, and goes on.
    restarted = opened()
    restarted.send(ROWS)
    restarted.send([{"step": 4, "train/loss": 0.0625, "val/psnr": 31.0}])
    assert history(mlflow, registry, "train/loss") == [(1, 0.5), (2, 0.25), (3, 0.125), (4, 0.0625)]
    assert history(mlflow, registry, "val/psnr") == [(2, 30.0), (4, 31.0)]


def test_points_that_arrived_before_an_outage_are_not_sent_again(opened, mlflow, monkeypatch, unused_port):
    registry = opened()
    registry.send(ROWS[:2])
    with monkeypatch.context() as outage, pytest.raises(StoreUnavailable):
        outage.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{unused_port}")
        outage.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        registry.send(ROWS)
    # Another process of the lineage: what this one believes to have sent is not the truth.
    opened().send(ROWS)
    registry.send([*ROWS, {"step": 4, "train/loss": 0.0625}])
    assert history(mlflow, registry, "train/loss") == [(1, 0.5), (2, 0.25), (3, 0.125), (4, 0.0625)]


def test_a_long_history_arrives_whole(opened, mlflow):
    # More than fits in one request.
    rows = [{"step": step, "train/loss": 1.0 / step, "train/lr": 0.5} for step in range(1, 1202)]
    registry = opened()
    registry.send(rows)
    assert history(mlflow, registry, "train/loss") == [(row["step"], row["train/loss"]) for row in rows]


@pytest.fixture
def committed(folder: CheckpointFolder, named: Lineage):
    """A checkpoint of the lineage with a preview, on local disk."""

    def write(step: int, text: str = "") -> Manifest:
        picture = io.BytesIO()
        Image.new("RGB", (4, 3), (step, 0, 0)).save(picture, "PNG")
        contents = {
            "G.pth": lambda file: file.write(f"weights of {step}{text}".encode()),
            "preview.png": lambda file: file.write(picture.getvalue()),
        }
        origin = {"attempt": "1", "code_version": "abc", "host": "here", "created": "2026-11-24T00:00:00+00:00"}
        return folder.commit(step, contents, lambda files: Manifest(named.id, step, files, {"val/psnr": 31.25}, named.identity, origin))

    return write


def test_a_version_tells_all_about_its_checkpoint(opened, mlflow, committed, folder, named):
    registry, manifest = opened(), committed(40)
    registry.about = {"recipe": "quickstart"}
    address = f"{registry.checkpoints_address}/00000040"
    registry.register(manifest, address, folder.path)
    (version,) = mlflow.search_model_versions(f"name = '{named.model}'")
    assert (version.source, version.run_id) == (address, registry.run_id)
    page = f"#/experiments/{mlflow.get_run(registry.run_id).info.experiment_id}/runs/{registry.run_id}"
    assert version.description.splitlines() == [
        f"**Step 40** of [{named.id}]({page}): [its files]({page}/artifacts/checkpoints/00000040)",
        "- val/psnr 31.25",
        "",
        "Input, restored, truth:",
        "",
        f"![preview](get-artifact?path=checkpoints/00000040/40_preview.png&run_uuid={registry.run_id})",
    ]
    assert version.tags == {
        "step": "40",
        "lineage": named.id,
        "digest": manifest.digest,
        "bytes": str(manifest.size),
        "val_psnr": "31.25",
        "recipe": "quickstart",
        "attempt": "1",
        "code_version": "abc",
    }
    assert registry.registered() == {40: Registered(40, manifest.digest, address, psnr=31.25)}
    pictures = [artifact.path for artifact in mlflow.list_artifacts(registry.run_id, "images")]
    assert [path for path in pictures if "preview" in path and "step%40" in path.replace("+", "%")], pictures


def test_registering_again_enters_nothing_new(opened, mlflow, committed, folder, named):
    registry, manifest = opened(), committed(40)
    registry.register(manifest, f"{registry.checkpoints_address}/00000040", folder.path)
    # The same step made again on another machine is the same content.
    again = dataclasses.replace(manifest, origin=manifest.origin | {"host": "there", "attempt": "2"})
    opened().register(again, f"{registry.checkpoints_address}/00000040", folder.path)
    assert len(mlflow.search_model_versions(f"name = '{named.model}'")) == 1


def test_other_content_under_a_registered_step_is_refused(opened, committed, folder, named):
    registry, manifest = opened(), committed(40)
    registry.register(manifest, "s3://mlflow/x/00000040", folder.path)
    with pytest.raises(CheckpointError, match=f"{named.id} step 40 is registered with other content .*two trainers wrote one lineage"):
        registry.register(committed(40, " of another"), "s3://mlflow/x/00000040", folder.path)
    assert registry.registered()[40].digest == manifest.digest


def test_the_latest_step_is_the_highest_whatever_was_registered_last(opened, mlflow, committed, folder, named):
    registry = opened()
    for step in (100, 20, 100, 60):
        registry.register(committed(step), f"s3://mlflow/x/{step:08d}", folder.path)
        assert mlflow.get_model_version_by_alias(named.model, "latest-step").tags["step"] == "100"
    registry.register(committed(120), "s3://mlflow/x/00000120", folder.path)
    assert mlflow.get_model_version_by_alias(named.model, "latest-step").tags["step"] == "120"


def test_versions_that_people_made_and_other_lineages_do_not_count(opened, mlflow, committed, folder, named):
    registry = opened()
    registry.register(committed(40), "s3://mlflow/x/00000040", folder.path)
    mlflow.create_model_version(named.model, "s3://mlflow/x/by-hand", run_id=registry.run_id, await_creation_for=None)
    other = opened(Lineage(named.name, "fedcba9876543210", {"seed": 2}))
    assert list(registry.registered()) == [40]
    assert other.registered() == {}


def test_a_new_lineage_finds_the_older_one_of_its_name_that_has_checkpoints(opened, committed, folder, named):
    first = opened(seed=1)
    second = opened(Lineage(named.name, "fedcba9876543210", {"seed": 2}), seed=2)
    assert (first.sibling(), second.sibling()) == (None, None), "without checkpoints there is nothing to lose"
    for step in (40, 20):
        first.register(committed(step), f"s3://mlflow/x/{step:08d}", folder.path)
    assert first.sibling() is None
    assert second.sibling() == Sibling(named.id, 40, {"seed": "1"})


def test_reading_a_run_is_no_attempt(opened, mlflow, named):
    reader = MlflowRegistry(named)
    assert not reader.attach()
    registry = opened()
    assert reader.attach()
    assert reader.run_id == registry.run_id
    reader.record(40, {"test/psnr": 30.5})
    reader.record(40, {"test/psnr": 30.5})
    assert history(mlflow, registry, "test/psnr") == [(40, 30.5)]
    assert mlflow.get_run(registry.run_id).data.tags["vrt.attempts"] == "1"


def test_of_two_that_begin_a_lineage_in_the_same_moment_both_take_the_older_run(named, mlflow, monkeypatch):
    first, second = MlflowRegistry(named), MlflowRegistry(named)
    first.find_or_create({})
    real, looks = second._find, iter([None])
    # It looked before the other's run was there.
    monkeypatch.setattr(second, "_find", lambda client: next(looks, real(client)))
    second.find_or_create({})
    assert second.run_id == first.run_id
    experiment = mlflow.get_run(first.run_id).info.experiment_id
    assert len(mlflow.search_runs([experiment], filter_string=f"tags.`vrt.lineage` = '{named.id}'")) == 1


def test_a_note_shows_on_the_run(opened, mlflow):
    registry = opened()
    registry.note("failed_save", "x" * 9000)
    assert mlflow.get_run(registry.run_id).data.tags["vrt.failed_save"] == "x" * 5000


def test_a_server_that_is_gone_is_an_outage(named, monkeypatch, unused_port):
    address = f"http://127.0.0.1:{unused_port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    # How often MLflow asks again is its own affair.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    registry = MlflowRegistry(named)
    registry.run_id = "0" * 32
    for call in (lambda: registry.open({}, {}), registry.registered, lambda: registry.send(ROWS), lambda: registry.close("FINISHED")):
        with pytest.raises(StoreUnavailable, match=f"MLflow at {address} does not answer .*; see `vrt services status`"):
            call()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://somebody:secret@127.0.0.1:{unused_port}")
    with pytest.raises(StoreUnavailable, match=f"MLflow at {address} does not answer") as told:
        registry.registered()
    assert "secret" not in str(told.value) and "secret" not in registry.page


@pytest.fixture
def answering(monkeypatch):
    """A server in MLflow's place that gives every request an answer with this HTTP status and text."""
    servers = []

    def start(status: int, text: bytes) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST

            def log_message(self, *_):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{servers[-1].server_port}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        return address

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_lets_nobody_in_is_asked_again_and_says_what_to_check(status, named, answering):
    address = answering(status, b"denied by the proxy")
    registry = MlflowRegistry(named)
    registry.run_id = "0" * 32
    with pytest.raises(StoreRefuses) as error:
        registry.registered()
    assert str(error.value).startswith(f"MLflow at {address} refused (API request to endpoint ")
    assert str(error.value).endswith(
        "; check that MLFLOW_TRACKING_URI is MLflow's, and MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and _PASSWORD, where it asks for them"
    )


@pytest.mark.parametrize("code", ["REQUEST_LIMIT_EXCEEDED", "TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR"])
def test_what_mlflow_itself_calls_an_outage_is_one(code, named, answering):
    answering(400, json.dumps({"error_code": code, "message": "not now"}).encode())
    registry = MlflowRegistry(named)
    registry.run_id = "0" * 32
    with pytest.raises(StoreUnavailable, match="does not answer"):
        registry.registered()


def test_without_an_address_the_way_to_local_services_is_told(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(StoreUnavailable, match="no address; run `vrt services up` for local services, or set MLFLOW_TRACKING_URI"):
        MlflowRegistry(Lineage("tiny", "0" * 64, {})).open({}, {})
