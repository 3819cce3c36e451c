"""The S3 store against a real server: what is published is there, bit by bit, and each failure says whether to try again."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import boto3
import pytest
from botocore.config import Config

from tests.wrong_clock import set_clock
from vrt.checkpoint.errors import CheckpointError, ClockRefused, StoreUnavailable
from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.store import S3Store


@pytest.fixture
def bucket(services):
    client = boto3.resource("s3", config=Config(s3={"addressing_style": "path"}))
    return client.Bucket("mlflow")


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """A place of the test's own in the shared bucket."""
    return f"store-{os.getpid()}/{tmp_path.name}/checkpoints"


@pytest.fixture
def store(services, prefix: str) -> S3Store:
    return S3Store(f"s3://mlflow/{prefix}/")


@pytest.fixture
def objects(bucket, prefix: str) -> Callable[[], dict[str, bytes]]:
    """All that is below the prefix, read by another client than the store's."""
    return lambda: {summary.key.removeprefix(f"{prefix}/"): summary.get()["Body"].read() for summary in bucket.objects.filter(Prefix=prefix)}


def files(folder: CheckpointFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.path.iterdir()}


def test_what_is_published_is_there_and_reads_back(store, objects, prefix, folder, commit, tmp_path, lineage):
    manifest = commit(folder, 40)
    address = store.publish(manifest, folder.path)
    assert address == f"s3://mlflow/{prefix}/00000040"
    assert objects() == {f"00000040/{name}": content for name, content in files(folder).items()}
    assert store.manifest(address) == manifest

    fetched = CheckpointFolder(tmp_path / "another machine")
    fetched.prepare()
    fetched.receive(store.manifest(address), lambda file, path: store.fetch(address, file, path))
    assert files(fetched) == files(folder)
    assert fetched.problems(40, lineage) == []


def test_publishing_again_changes_nothing_and_uploads_nothing(store, bucket, objects, prefix, folder, commit):
    manifest = commit(folder, 40)
    store.publish(manifest, folder.path)
    before = objects()
    uploaded = bucket.Object(f"{prefix}/00000040/40_G.pth").last_modified
    # Its local file could not be uploaded any more: the copy in the store suffices.
    (folder.path / "40_G.pth").unlink()
    store.publish(manifest, folder.path)
    assert objects() == before
    assert bucket.Object(f"{prefix}/00000040/40_G.pth").last_modified == uploaded


@pytest.mark.parametrize("damage", ["altered", "short", "missing", "manifest altered", "manifest missing"])
def test_publishing_again_repairs_what_was_damaged_in_the_store(store, bucket, objects, prefix, folder, commit, damage: str):
    manifest = commit(folder, 40)
    store.publish(manifest, folder.path)
    before = objects()
    name = "40_manifest.json" if "manifest" in damage else "40_G.pth"
    damaged = bucket.Object(f"{prefix}/00000040/{name}")
    content = before[f"00000040/{name}"]
    if "missing" in damage:
        damaged.delete()
    else:
        damaged.put(Body=content[:-1] + (b"" if damage == "short" else b"?"))
    assert objects() != before
    store.publish(manifest, folder.path)
    assert objects() == before


def test_what_was_published_but_never_registered_is_replaced(store, objects, folder, commit):
    # An attempt that was stopped between the two saved without a validation; trained again, the step has other files.
    store.publish(commit(folder, 40, text=" of an attempt that vanished"), folder.path)
    manifest = commit(folder, 40)
    address = store.publish(manifest, folder.path)
    assert store.manifest(address) == manifest


def test_a_damaged_copy_in_the_store_is_not_taken_for_the_checkpoint(store, bucket, prefix, folder, commit, tmp_path):
    manifest = commit(folder, 40)
    address = store.publish(manifest, folder.path)
    bucket.Object(f"{prefix}/00000040/40_G.pth").put(Body=b"x" * manifest.files[0].size)
    fetched = CheckpointFolder(tmp_path / "another machine")
    fetched.prepare()
    with pytest.raises(CheckpointError, match="40_G.pth has other content than the manifest says"):
        fetched.receive(manifest, lambda file, path: store.fetch(address, file, path))
    assert fetched.steps() == []
    bucket.Object(f"{prefix}/00000040/40_manifest.json").put(Body=b"{}")
    with pytest.raises(CheckpointError, match=f"{address}: no readable manifest"):
        store.manifest(address)


def test_what_is_left_of_a_deletion_goes_but_nothing_of_a_registered_step(store, bucket, objects, prefix, folder, commit, caplog):
    for step in (20, 40):
        store.publish(commit(folder, step), folder.path)
        bucket.Object(f"{prefix}/{step:08d}/{step}_manifest.json").delete()
    assert store.sweep(timedelta(0), {40}) == [20]
    assert {key.split("/")[0] for key in objects()} == {"00000040"}
    assert "checkpoint 40 is registered, and the store lists no manifest of it; see `vrt checkpoints verify`" in caplog.text


def test_a_checkpoint_that_is_not_there_is_named(store, prefix):
    with pytest.raises(CheckpointError, match=f"s3://mlflow/{prefix}/00000060: there is no such object"):
        store.manifest(f"s3://mlflow/{prefix}/00000060")


def test_wrong_credentials_are_named_and_may_be_mended_meanwhile(store, folder, commit, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    with pytest.raises(StoreUnavailable, match="the store refused .*check the credentials, the bucket and its policy"):
        store.publish(commit(folder, 40), folder.path)


@pytest.mark.parametrize("ahead, told", [(3600, r"\+3(599|600|601)"), (-3600, r"-3(599|600|601)")])
def test_a_wrong_clock_is_told_from_wrong_credentials_whatever_was_asked(store, folder, commit, prefix, monkeypatch, ahead: int, told: str):
    manifest = commit(folder, 40)
    set_clock(monkeypatch, ahead)
    refused = f"the store refused this machine's clock, which is {told} s off .*; synchronise both by NTP"
    # A trainer's first request is answered without a body, which would have the store's reason.
    for call in (lambda: store.publish(manifest, folder.path), lambda: store.put_beside(f"s3://mlflow/{prefix}/00000040", {"x": b"y"})):
        with pytest.raises(ClockRefused, match=refused):
            call()
    assert store.seconds_ahead() == pytest.approx(ahead, abs=2)
    set_clock(monkeypatch, ahead / 6)
    store.publish(manifest, folder.path)


def test_no_credentials_are_named_with_the_variables_to_set(store, folder, commit, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    with pytest.raises(StoreUnavailable, match="no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        store.publish(commit(folder, 40), folder.path)


def test_a_missing_bucket_is_named(services, folder, commit):
    with pytest.raises(StoreUnavailable, match="s3://nowhere/run/00000040: the store refused .*check the credentials, the bucket"):
        S3Store("s3://nowhere/run").publish(commit(folder, 40), folder.path)


def test_a_server_that_is_gone_is_an_outage(services, folder, commit, monkeypatch, unused_port):
    for variable in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(variable, f"http://127.0.0.1:{unused_port}")
    manifest = commit(folder, 40)
    store = S3Store("s3://mlflow/run")
    for call in (
        lambda: store.publish(manifest, folder.path),
        lambda: store.fetch("s3://mlflow/run/00000040", manifest.files[0], folder.path / "x"),
    ):
        with pytest.raises(StoreUnavailable, match="s3://mlflow/run/00000040: "):
            call()


@pytest.mark.parametrize("prefix", ["file:///tmp/x", "mlflow-artifacts:/1/2"])
def test_a_place_that_is_not_in_s3_is_refused_with_the_way_on(services, folder, commit, prefix: str):
    with pytest.raises(CheckpointError, match="expected an s3://bucket/... address; .*create the experiment with an S3 artifact location"):
        S3Store(prefix).publish(commit(folder, 40), folder.path)
