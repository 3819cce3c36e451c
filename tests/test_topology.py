"""The servers of compose.yaml together: a flow trains on them, and outlives them."""

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.same_training import assert_same_files, lineage_folder
from tests.test_compose import PROJECT, SECRETS, read
from tests.topology import MISSING, Topology

pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(MISSING), reason=f"not on this machine: {', '.join(MISSING)}")]

PUBLIC_HOST = "vrt.example"


@pytest.fixture
def workspace(make_workspace):
    """The project, as it is in the image: without git, and without the session's servers."""
    workspace = make_workspace("topology")
    for path in ("prefect.toml", ".dvc/config.local"):
        (workspace.root / path).unlink(missing_ok=True)
    (workspace.root / ".dvc/config.local").write_text("[core]\n    no_scm = true\n")
    shutil.copytree(PROJECT / "deploy", workspace.root / "deploy")
    shutil.rmtree(workspace.root / ".git")
    return workspace


@pytest.fixture
def topology(workspace):
    services = read({secret: f"{secret.lower()}-of-this-test" for secret in SECRETS} | {"PUBLIC_HOST": PUBLIC_HOST})["services"]
    # Not below pytest's folder, which PostgreSQL's user can't enter.
    with tempfile.TemporaryDirectory(prefix="topology-") as folder:
        Path(folder).chmod(0o755)
        topology = Topology(services, workspace.root, Path(folder))
        try:
            yield topology
        finally:
            topology.down()


def test_a_flow_trains_on_them_while_postgresql_is_killed_under_it(topology):
    topology.up("postgres", "s3", "mlflow", "prefect", "worker")
    findings = {finding["subject"]: finding["state"] for finding in json.loads(topology.ask("python", "-m", "vrt", "doctor", "--json"))}
    assert not {"wrong", "unavailable"} & set(findings.values()), findings
    # The health check of the image, with the worker's environment.
    assert "MLflow" in topology.ask("python", "-m", "vrt", "services", "status", "--given")
    run = subprocess.Popen(topology.command("prefect", "deployment", "run", "train/vrt", "--watch"), env=topology.environment("worker"))
    while "checkpoint 4 registered" not in topology.log("worker"):
        assert run.poll() is None, topology.log("worker")
        time.sleep(0.2)

    topology.kill("postgres")
    time.sleep(5)
    topology.up("postgres")

    assert run.wait(300) == 0, topology.log("worker")
    listed = json.loads(topology.ask("python", "-m", "vrt", "checkpoints", "list", "--json"))
    assert re.search(r"step 24 of \S+ trained and registered", topology.log("worker"))
    assert listed
    assert topology.stop("worker") == 0


def test_a_browser_on_another_machine_lists_runs_in_mlflows_pages_and_no_other_site_does_so_through_it(topology):
    topology.up("postgres", "s3", "mlflow")

    def answer(host: str, origin: str) -> str:
        request = ["--json", '{"experiment_ids": ["0"]}', "--header", f"Host: {host}", "--header", f"Origin: {origin}"]
        place = "http://mlflow:5000/ajax-api/2.0/mlflow/runs/search"
        return topology.ask("curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}", *request, place)

    public = f"{PUBLIC_HOST}:5000"
    assert answer(public, f"http://{public}") == "200"
    assert answer("localhost:5000", "http://localhost:5000") == "200"
    assert answer(public, "http://elsewhere.example") == "403"
    assert answer("elsewhere.example", f"http://{public}") == "403"


def train(topology, workspace, steps: int) -> str:
    workspace.edit(train__total_steps=steps)
    return topology.ask("python", "-m", "vrt", "train")


def test_a_backup_brings_back_a_lost_registry_and_a_lost_bucket_and_trainings_go_on(topology, workspace, uninterrupted):
    topology.up("postgres", "s3", "mlflow")
    backup = topology.folder / "backup"
    train(topology, workspace, 12)

    saved = topology.run_script("deploy/backup.sh", str(backup))
    assert saved.returncode == 0, saved.stdout

    topology.run_script("docker", "compose", "exec", "-T", "postgres", "dropdb", "--username", "postgres", "--force", "mlflow")
    topology.kill("mlflow")
    restored = topology.run_script("deploy/restore.sh", str(backup), "mlflow")
    assert restored.returncode == 0, restored.stdout
    # As before an upgrade of MLflow.
    topology.ask("sh", "-c", 'mlflow db upgrade "$MLFLOW_BACKEND_STORE_URI"', service="mlflow")
    assert "continuing after step 12 of 16" in train(topology, workspace, 16)

    # What is newer than the backup stays: this one was still growing when it was copied.
    (torn,) = backup.glob("s3/mlflow/**/12_G.pth")
    whole = torn.read_bytes()
    torn.write_bytes(whole[:1000])
    os.utime(torn, (0, 0))
    restored = topology.run_script("deploy/restore.sh", str(backup), "bucket")
    assert restored.returncode == 0, restored.stdout
    in_store = topology.ask("sh", "-c", f"wc -c </srv/{torn.relative_to(backup)}").strip()
    assert in_store == str(len(whole))
    torn.write_bytes(whole)

    # The bucket and the machine that trained are lost, the registry is not: it names a step of which nothing is left.
    topology.ask("sh", "-c", "rm -r /srv/s3/*")
    shutil.rmtree(workspace.root / "checkpoints")
    # The next backup of every night must not take over what was lost.
    again = topology.run_script("deploy/backup.sh", str(backup))
    assert again.returncode == 1 and "the store is empty and its copy in " in again.stdout, again.stdout
    restored = topology.run_script("deploy/restore.sh", str(backup), "bucket")
    assert restored.returncode == 0, restored.stdout
    continued = train(topology, workspace, 24)
    assert "continuing after step 12 of 24" in continued, continued
    assert_same_files(uninterrupted, workspace)

    # What a backup would replace or delete of the one before is kept beside it.
    (lost,) = (path for path in backup.glob("s3/mlflow/**/12_manifest.json"))
    topology.ask("sh", "-c", f"rm -f /srv/{lost.relative_to(backup)}")
    again = topology.run_script("deploy/backup.sh", str(backup))
    assert again.returncode == 0 and not lost.exists(), again.stdout
    kept = {path.name for path in backup.glob("replaced/*/**/*") if path.is_file()}
    assert {"mlflow.dump", "prefect.dump", "12_manifest.json"} <= kept


def test_a_registry_that_is_lost_without_a_backup_is_made_anew_from_the_bucket(topology, workspace, uninterrupted):
    topology.up("postgres", "s3", "mlflow")
    train(topology, workspace, 12)
    checkpoints = lineage_folder(workspace)
    topology.kill("mlflow")
    for command in (["dropdb", "--force"], ["createdb"]):
        ended = topology.run_script("docker", "compose", "exec", "-T", "postgres", *command, "--username", "postgres", "mlflow")
        assert ended.returncode == 0, ended.stdout
    shutil.rmtree(checkpoints)
    topology.up("mlflow")

    bucket = ":s3,provider=Other,env_auth=true,endpoint='http://s3:9000':mlflow"
    found = topology.ask("rclone", "lsf", "--config", "/dev/null", "--files-only", "--recursive", "--include", "*_manifest.json", bucket).split()
    topology.ask("rclone", "copy", "--config", "/dev/null", f"{bucket}/{Path(max(found)).parent}", str(checkpoints))

    continued = train(topology, workspace, 24)
    assert "continuing after step 12 of 24" in continued, continued
    assert_same_files(uninterrupted, workspace)


def test_beside_trainings_that_save_all_the_while_what_was_registered_is_backed_up(topology, workspace):
    topology.up("postgres", "s3", "mlflow")
    workspace.edit(train__total_steps=100_000, train__checkpoint_every=1, checkpoints__keep_last=3)
    training = begun(topology, "training", "python", "-m", "vrt", "train")
    while "checkpoint 4 registered" not in topology.log("training"):
        assert training.poll() is None, topology.log("training")
        time.sleep(0.2)
    # What the S3 server does with a large upload; those of the training are done in a moment, which the copy would hardly ever meet.
    grow = "cd /srv/s3/mlflow && truncate --size 500M large && while sleep 0.01; do head -c 10000 /dev/zero; done >>large"
    uploading = begun(topology, "uploading", "sh", "-c", grow, service="s3")
    before = newest_registered(topology)

    saved = topology.run_script("deploy/backup.sh", str(topology.folder / "backup"))

    assert saved.returncode == 0, saved.stdout
    assert uploading.poll() is None and training.poll() is None, "nothing was shown: they did not last as long as the backup"
    for process in (uploading, training):
        process.kill()
        process.wait()
    topology.ask("sh", "-c", "rm -r /srv/s3/*")
    shutil.rmtree(workspace.root / "checkpoints")
    for lost in ("bucket", "mlflow"):
        restored = topology.run_script("deploy/restore.sh", str(topology.folder / "backup"), lost)
        assert restored.returncode == 0, restored.stdout
    continued = train(topology, workspace, steps=newest_registered(topology) + 1)
    assert before <= int(re.search(r"continuing after step (\d+)", continued)[1]), continued


def begun(topology, name: str, *words: str, service: str = "worker") -> subprocess.Popen:
    """A command that was started with the environment of a service; `name` is its log."""
    with (topology.folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(topology.command(*words), env=topology.environment(service), stdout=log, stderr=subprocess.STDOUT)


def newest_registered(topology) -> int:
    return max(map(int, re.findall(r"checkpoint (\d+) registered", topology.log("training"))))


def test_a_restore_of_nothing_that_is_known_says_what_there_is(topology):
    wrong = topology.run_script("deploy/restore.sh", str(topology.folder), "mlflow")
    assert wrong.returncode == 2 and "expected a folder that deploy/backup.sh made, found no mlflow.dump in it" in wrong.stdout
    (topology.folder / "mlflow.dump").touch()
    (topology.folder / "s3").mkdir(exist_ok=True)
    for what, said in (
        ("mlflow", "mlflow.dump: expected a dump that pg_restore can read; nothing was changed"),
        ("prefect", "prefect.dump: expected a dump that pg_restore can read; nothing was changed"),
        ("bucket", "s3: expected the copy of a store, found no object in it; nothing was changed"),
    ):
        wrong = topology.run_script("deploy/restore.sh", str(topology.folder), what)
        assert wrong.returncode == 2 and said in wrong.stdout, wrong.stdout
    (topology.folder / "s3" / "object").symlink_to("nowhere")
    (topology.folder / "s3" / "other").touch()
    wrong = topology.run_script("deploy/restore.sh", str(topology.folder), "bucket")
    assert wrong.returncode == 2 and "found files or folders that it may not; nothing was changed: chmod -R a+rX" in wrong.stdout, wrong.stdout
    wrong = topology.run_script("deploy/restore.sh", str(topology.folder), "everything")
    assert wrong.returncode == 2 and "expected mlflow, prefect or bucket, found everything" in wrong.stdout
