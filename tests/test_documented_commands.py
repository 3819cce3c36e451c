"""Every command that the documentation tells people to type is typed here, or by another test, or is listed with the reason why none can."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests.documentation import PAGES, PROJECT, blocks, commands
from tests.footage import moving, write_video
from tests.pipelines.conftest import at_work
from tests.same_training import lineage_folder, lineages
from tests.test_tutorial import DONE as DONE_BEFORE
from tests.test_tutorial import PAGE as TUTORIAL
from vrt.params import load_params
from vrt.training.session import build_network

DOCUMENTED = {command for page in PAGES for command in commands(page)}
TOGETHER = '"vrt", "train", "--processes", "1", "--machines", "2", "--meet"'
# Where it is run, and how it is written there.
BY_ANOTHER_TEST = {
    "deploy/backup.sh /backups/vrt": ("tests/test_topology.py", 'topology.run_script("deploy/backup.sh", str(backup))'),
    "deploy/restore.sh /backups/vrt bucket": ("tests/test_topology.py", 'topology.run_script("deploy/restore.sh", str(backup), "bucket")'),
    "deploy/restore.sh /backups/vrt mlflow": ("tests/test_topology.py", 'topology.run_script("deploy/restore.sh", str(backup), "mlflow")'),
    "make demo": ("tests/test_documented_commands.py", '["make", "demo"]'),
    "make test": (".ci/run", "exec make test"),
    "prefect flow-run cancel": ("tests/pipelines/test_train_flow.py", 'worker.prefect("flow-run", "cancel", '),
    'python -c "from pipelines.train import train; train()"': (
        "tests/pipelines/test_killed.py",
        '"from pipelines.train import train; train(retry_pause=0)"',
        'sys.executable, "-c", script',
    ),
    "prefect work-pool update NAME --base-job-template deploy/kubernetes-pool.json": (
        "tests/pipelines/test_pools.py",
        '(("update", name), f"Updated work pool \'{name}\'")',
        '"prefect", "work-pool", *words, "--base-job-template", path_of(kind)',
        'PROJECT / "deploy" / f"{kind}-pool.json"',
    ),
    "rclone copy BUCKET:mlflow/1/RUN/artifacts/checkpoints/00004000 checkpoints/NAME-FINGERPRINT": (
        "tests/test_topology.py",
        'topology.ask("rclone", "copy", "--config", "/dev/null", f"{bucket}/{Path(max(found)).parent}", str(checkpoints))',
    ),
    "vrt drill": ("tests/stages/test_drill.py", 'workspace.vrt("drill", '),
    "vrt train --machines 2 --meet 10.0.0.1:29500": ("tests/stages/test_together.py", TOGETHER),
    "vrt train --machines 2 --meet HOST:PORT": ("tests/stages/test_together.py", TOGETHER),
}
# What such a test has values of its own for.
VALUES = {
    *("/backups/vrt", "HOST:PORT", "10.0.0.1:29500", "python"),
    *("BUCKET:mlflow/1/RUN/artifacts/checkpoints/00004000", "checkpoints/NAME-FINGERPRINT", "NAME", "deploy/kubernetes-pool.json"),
}
NO_ENGINE = "needs a container engine; tests/test_container.py and tests/test_topology.py run what it would"
NO_CLUSTER = "needs a cluster; tests/pipelines/test_pools.py makes its jobs"
MEASURES = "measures for minutes to hours; its results are committed"
BY_NO_TEST = {
    "REVISION=$(git rev-parse HEAD) docker compose up --build --detach": NO_ENGINE,
    "VRT_MACHINES=2 VRT_MEET=10.0.0.1:29500 dvc repro": "needs two machines; two flows of tests/stages/test_together.py run `dvc repro` with these",
    "aws s3api put-bucket-lifecycle-configuration --bucket mlflow --lifecycle-configuration file://deploy/s3-lifecycle.json": "needs AWS's own "
    "program; tests/stages/test_rights.py has what it would send checked",
    "docker build": NO_ENGINE,
    "docker build --tag vrt --build-arg REVISION=$(git rev-parse HEAD) .": NO_ENGINE,
    "docker build --tag vrt --build-arg TORCH_WHEELS=https://... .": NO_ENGINE,
    "REVISION=$(git rev-parse HEAD) docker compose build": NO_ENGINE,
    "docker compose run --rm mlflow sh -c 'mlflow db upgrade \"$MLFLOW_BACKEND_STORE_URI\"'": NO_ENGINE,
    "docker compose run --rm worker ...": NO_ENGINE,
    "docker compose run --rm --volume $PWD/clips:/clips:ro worker vrt data import /clips --name mine --layout clips": NO_ENGINE,
    "docker compose run --detach --user 1000:$(stat -c %g /var/run/docker.sock) --volume /var/run/docker.sock:/var/run/docker.sock worker "
    "prefect worker start --pool vrt-docker": NO_ENGINE,
    "docker compose run --rm worker prefect deployment run train/vrt": NO_ENGINE,
    "docker compose stop worker": NO_ENGINE,
    "docker compose up --detach": NO_ENGINE,
    "docker run --rm --gpus all --shm-size 2g --stop-timeout 90 --env-file servers.env --volume vrt-data:/srv/vrt/data "
    "--volume vrt-checkpoints:/srv/vrt/checkpoints --volume $PWD/params.yaml:/srv/vrt/params.yaml vrt vrt train": NO_ENGINE,
    "docker inspect": NO_ENGINE,
    "docker stop": NO_ENGINE,
    "docker stop -t 180": NO_ENGINE,
    "echo $MLFLOW_TRACKING_URI": "the shell's own",
    "git pull": "git's own",
    "kubectl apply --filename deploy/kubernetes-rights.yaml": NO_CLUSTER,
    "kubectl create deployment vrt-worker --image vrt:latest -- prefect worker start --pool vrt-kubernetes": NO_CLUSTER,
    "kubectl create secret generic vrt-servers --from-env-file servers.env": NO_CLUSTER,
    "kubectl set env deployment/vrt-worker --from secret/vrt-servers": NO_CLUSTER,
    "kubectl set env deployment/vrt-worker PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_NAMESPACES=default": NO_CLUSTER,
    "kubectl set serviceaccount deployment vrt-worker vrt-worker": NO_CLUSTER,
    "make .venv/.installed": "`make test` and `make demo` begin with it",
    "make demo UV=uv": "needs uv",
    "make lock": "needs uv, and a newer world",
    "make serve": "`vrt services up`, then what tests/pipelines/conftest.py starts, and both until they are ended",
    "make test-long": "runs this test",
    "python -m benchmarks.data": MEASURES,
    "python -m benchmarks.network": MEASURES,
    "python -m benchmarks.scaling": MEASURES,
    "python -m benchmarks.tiling": MEASURES,
    "python -m docs.screenshots": "takes the pictures of the documentation, for people to look at",
    "python -m pytest tests/data -n 2": "runs tests as .ci/run does",
}
ONLY_NAMED = {"dvc add", "kill -9", "vrt data import", "vrt restore"}
IN_THE_IMAGE = "docker compose run --rm worker "


class Reader:
    """Types commands of the documentation in a workspace, as they stand there."""

    def __init__(self, workspace, home: Path):
        self.workspace = workspace
        names = {f"GIT_{role}_{what}": "reader@home" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        self.environment = workspace.environment | names | {"HOME": str(home)}

    def types(self, command: str, filled: Mapping[str, object] = {}, code: int = 0) -> str:  # noqa: B006
        """What a documented command says, with its placeholders `filled`."""
        assert command in DOCUMENTED, f"no page says {command!r}"
        return self.does(command, filled, code)

    def does(self, command: str, filled: Mapping[str, object] = {}, code: int = 0) -> str:  # noqa: B006
        for placeholder, value in filled.items():
            assert placeholder in command
            command = command.replace(placeholder, str(value))
        ended = subprocess.run(
            ["bash", "-e", "-c", command],
            cwd=self.workspace.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )
        assert ended.returncode == code, f"{command}\n{ended.stdout}"
        return ended.stdout

    def commits(self) -> None:
        self.does("git add --all && git commit --quiet --allow-empty --message 'as it is now'")


@pytest.fixture
def reader(make_workspace, tmp_path) -> Reader:
    return Reader(make_workspace("reader"), tmp_path)


def typed_here() -> set[str]:
    """What tests of this file give to `Reader.types`."""
    calls = [node for node in ast.walk(ast.parse(Path(__file__).read_text())) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return {ast.literal_eval(call.args[0]) for call in calls if call.func.attr == "types"}


def test_every_documented_command_is_typed_or_accounted_for():
    by_the_tutorial = {command for language, content in blocks(TUTORIAL) if not language for command in content.splitlines()} - {*DONE_BEFORE}
    accounts = [typed_here(), by_the_tutorial, {*BY_ANOTHER_TEST}, {*BY_NO_TEST}, ONLY_NAMED]
    assert DOCUMENTED - set().union(*accounts) == set()
    assert set().union(*accounts) - DOCUMENTED == set()


@pytest.mark.parametrize("command", BY_ANOTHER_TEST)
def test_the_other_test_really_runs_it(command: str):
    path, *written = BY_ANOTHER_TEST[command]
    assert [part for part in written if part not in (PROJECT / path).read_text()] == []
    words = {*re.findall(r"[^\s\"';()]+", command)} - VALUES
    assert {word for word in words if word not in " ".join(written)} == set()


def test_what_people_type_before_they_have_servers(make_project, tmp_path):
    reader = Reader(make_project("beginner"), tmp_path)
    root = reader.workspace.root
    (root / ".venv").symlink_to(sys.prefix)
    found = reader.types("source .venv/bin/activate", {"activate": "activate && command -v vrt"})
    assert Path(found.strip()).samefile(Path(sys.prefix) / "bin" / "vrt")
    shutil.copy2(PROJECT / ".env.example", root)
    reader.types("cp .env.example .env")
    assert "POSTGRES_PASSWORD=" in (root / ".env").read_text()
    assert subprocess.run(["git", "check-ignore", "--quiet", ".env"], cwd=PROJECT, check=False).returncode == 0, "passwords would be committed"
    status = f"{sys.executable} -m vrt services status --given"
    told = reader.types(
        "export MLFLOW_TRACKING_URI=http://HOST:5000 PREFECT_API_URL=http://HOST:4200/api AWS_ENDPOINT_URL=http://HOST:9000",
        {"HOST": "127.0.0.1", ":9000": f":9000 && {status} --json"},
        code=1,
    )
    addresses = {service["address"] for service in json.loads(told)}
    assert addresses == {"http://127.0.0.1:5000", "http://127.0.0.1:4200/api", "http://127.0.0.1:9000"}
    keys = f"{sys.executable} -c 'import boto3; print(boto3.Session().get_credentials().get_frozen_credentials()[:2])'"
    used = reader.types(
        "export AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=...", {"KEY_ID=...": "KEY_ID=who", "ACCESS_KEY=...": f"ACCESS_KEY=secret && {keys}"}
    )
    assert used.strip() == "('who', 'secret')"


@pytest.mark.long
def test_what_people_type_about_a_training(reader, tmp_path):
    workspace = reader.workspace
    # Four processes share a batch.
    workspace.edit(train__batch_size=4)
    write_video(workspace.root / "old.mp4", moving(4, 40, 40))
    shutil.copytree(workspace.root / "data/raw/tiny", workspace.root / "data/raw/other")
    (workspace.root / ".gitignore").write_text("/checkpoints\n/model\n/data/prepared\n/.vrt\n__pycache__\n")
    reader.commits()
    reader.types("vrt services up")
    reader.types("vrt services status")
    reader.types("vrt services status --given")
    reader.types("vrt doctor")
    reader.types("vrt data check")
    reader.types("vrt prepare")
    reader.types("vrt train --processes 4")
    reader.types("vrt train")
    reader.types("python -m vrt train")
    reader.types("dvc repro train")
    reader.types("VRT_PROCESSES=4 dvc repro")
    reader.types("dvc repro")
    reader.types("dvc metrics show")
    reader.types("dvc params diff; dvc metrics show; dvc plots show")
    reader.types("dvc push")
    shutil.rmtree(workspace.root / "model")
    reader.types("dvc pull")
    assert (workspace.root / "model/24_G.pth").exists()
    reader.types("vrt checkpoints list")
    reader.types("vrt checkpoints verify")
    reader.types("vrt checkpoints repair")
    reader.types("vrt checkpoints settle")
    reader.types("vrt promote")
    reader.types("vrt restore old.mp4 -o new.mp4")
    reader.types("vrt evaluate")
    reader.types("vrt evaluate --checkpoint best --dataset other")
    reader.types("vrt weights convert FILE.pth FILE.safetensors", {"FILE": "model/24_G"})
    workspace.edit(train__total_steps=28)
    reader.types("torchrun --nproc-per-node 4 -m vrt train")
    assert "28" in reader.types("vrt checkpoints list")

    reader.commits()
    first = lineage_folder(workspace)
    reader.types("vrt reproduce RUN", {"RUN": first.name})
    reader.types("dvc exp run -S optimizer.lr=1e-3")
    reader.does("dvc exp run --queue -S seed=5")
    reader.does("dvc exp run --queue -S seed=6")
    reader.types("dvc exp run --run-all -j 2")
    assert len(lineages(workspace)) == 4

    workspace.edit(optimizer__lr=2e-3, train__total_steps=24)
    assert "--resume never" in reader.types("vrt train", code=2)
    reader.types("vrt train --resume never")
    shutil.copytree(first, tmp_path / "kair", ignore=shutil.ignore_patterns("*.json*", "*.png"))
    workspace.edit(name=f"{workspace.name}-adopted")
    reader.types("vrt checkpoints adopt FOLDER", {"FOLDER": tmp_path / "kair"})
    workspace.edit(train__total_steps=32)
    assert "continuing after step 28 of 32" in reader.types("vrt train")


@pytest.mark.long
def test_what_people_type_about_data_and_published_networks(reader, published_copy, tmp_path):
    root = reader.workspace.root
    published_copy("gopro", frames=6, size=(64, 64)).rename(tmp_path / "GOPRO_Large")
    reader.types("vrt recipes")
    reader.types("vrt data import --help")
    write_video(root / "holiday.mp4", moving(48, 64, 64))
    reader.types("vrt data import holiday.mp4 --name holiday")
    reader.types("vrt data check holiday")
    reader.types("dvc add data/raw/holiday")
    for split in ("train", "val", "test"):
        for recorded, name in (("sharp", "sharp"), ("blur", "degraded")):
            shutil.copytree(tmp_path / "GOPRO_Large/train/GOPR0372_07_00" / recorded, root / f"pairs/{split}/of-{split}/{name}")
    reader.types("vrt data import FOLDER --name mine --layout clips", {"FOLDER": "pairs"})

    (root / "params.yaml").unlink()
    reader.types("vrt init --recipe 006")
    reader.types("vrt data check ~/GOPRO_Large --layout gopro")
    reader.types("vrt data import ~/GOPRO_Large --name gopro --layout gopro")
    reader.types("vrt prepare")
    write_published_weights(root / "006_VRT_videodeblurring_GoPro.pth", root / "params.yaml")
    assert "dB PSNR" in reader.types("vrt evaluate --checkpoint 006_VRT_videodeblurring_GoPro.pth")

    (root / "params.yaml").unlink()
    reader.types("vrt init --recipe 008")
    write_video(root / "noisy.mp4", moving(2, 64, 64))
    write_published_weights(root / "008_VRT_videodenoising_DAVIS.pth", root / "params.yaml")
    reader.types(
        "vrt restore noisy.mp4 -o restored.mp4 --params recipes/008_videodenoising_DAVIS.yaml "
        "--checkpoint 008_VRT_videodenoising_DAVIS.pth --sigma 30"
    )


def write_published_weights(path: Path, params: Path) -> None:
    """Weights of the shape of published ones; what they would make of a video is not what is looked at here."""
    torch.save({"params": build_network(load_params(params).network).state_dict()}, path)


@pytest.mark.long
def test_what_people_type_about_prefect(reader):
    workspace = reader.workspace
    workspace.edit(train__batch_size=4)
    shutil.copytree(PROJECT / "deploy", workspace.root / "deploy")
    write_video(workspace.root / "old.mp4", moving(4, 40, 40))
    with at_work(workspace):
        reader.types("prefect deploy --all")
        assert "Completed" in reader.types("prefect deployment run train/vrt --watch")
        assert "Completed" in reader.types("prefect deployment run train/vrt", {"train/vrt": "train/vrt --watch"})
        workspace.edit(train__total_steps=28)
        assert "Completed" in reader.types("prefect deployment run train/vrt -p processes=4", {"train/vrt": "train/vrt --watch"})
        restored = reader.types(
            "prefect deployment run restore/vrt -p input=$PWD/old.mp4 -p output=$PWD/new.mp4", {"restore/vrt": "restore/vrt --watch"}
        )
        assert "Completed" in restored
        # Its training takes GPUs and days, and a data set that people have to bring.
        rehearsed = {"train/vrt": "train/vrt --watch -p dry_run=true"}
        of_recipe = reader.types(
            'prefect deployment run train/vrt -p recipe=006_videodeblurring_GoPro -p \'overrides={"name": "mine", "train.total_steps": 1000}\'',
            rehearsed,
        )
        assert "Completed" in of_recipe
        of_data = reader.types(
            'docker compose run --rm worker prefect deployment run train/vrt -p \'overrides={"name": "mine", "data.dataset": "mine"}\'',
            {IN_THE_IMAGE: "", **rehearsed},
        )
        assert "Completed" in of_data
        # Two hosts that really meet are in tests/stages/test_together.py.
        assert "Completed" in reader.types("prefect deployment run train/vrt -p machines=2 -p meet=10.0.0.1:29500", rehearsed)
    process = f"vrt-{os.getpid()}"
    reader.types("prefect work-pool create vrt --type process", {"create vrt": f"create {process}"})
    assert "started!" in reader.types("prefect worker start --pool vrt", {"--pool vrt": f"--pool {process} --run-once"})
    pool = {"vrt-kubernetes": f"vrt-kubernetes-{os.getpid()}"}
    reader.types("prefect work-pool create vrt-kubernetes --type kubernetes --base-job-template deploy/kubernetes-pool.json", pool)
    reader.types("prefect --no-prompt deploy pipelines/train.py:train --name kubernetes --pool vrt-kubernetes", pool)
    reader.types("prefect deployment run train/kubernetes")
    pool = {IN_THE_IMAGE: "", "vrt-docker": f"vrt-docker-{os.getpid()}"}
    reader.types("docker compose run --rm worker prefect work-pool create vrt-docker --type docker --base-job-template deploy/docker-pool.json", pool)
    reader.types("docker compose run --rm worker prefect --no-prompt deploy pipelines/train.py:train --name docker --pool vrt-docker", pool)
    reader.types(
        "docker compose run --rm worker prefect --no-prompt deploy pipelines/train.py:train --name docker --pool vrt-docker "
        '--job-variable \'{"gpus": [{"Driver": "nvidia", "Count": -1, "Capabilities": [["gpu"]]}]}\'',
        pool,
    )
    reader.types("docker compose run --rm worker prefect deployment run train/docker", {IN_THE_IMAGE: ""})


@pytest.mark.long
def test_the_first_command_of_the_readme_installs_trains_and_shows_what_was_gained(tmp_path):
    subprocess.run(["git", "clone", "--quiet", str(PROJECT), str(tmp_path / "vrt")], check=True)
    hidden = {"VRT_HOME", "MLFLOW_TRACKING_URI", "PREFECT_API_URL", "AWS_ENDPOINT_URL", "VIRTUAL_ENV", "PYTHONPATH"}
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    try:
        ended = subprocess.run(
            ["make", "demo"], cwd=tmp_path / "vrt", env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        assert ended.returncode == 0, ended.stdout
        assert "restored clips gain" in ended.stdout and "Browse the checkpoints: http://127.0.0.1:" in ended.stdout, ended.stdout
    finally:
        subprocess.run([".venv/bin/vrt", "services", "down"], cwd=tmp_path / "vrt", env=environment, check=False)
