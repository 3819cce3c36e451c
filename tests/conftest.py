"""Fixtures for all tests: one set of real local services per session, apart from those of whoever runs the tests."""

import fcntl
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import boto3
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML

from tests.fork_server import ForkServer
from vrt.data.prepare import prepare
from vrt.services import Endpoints, endpoints, local, process, project, state

REPOSITORY = Path(__file__).parents[1]

TINY = {
    "data__dataset": "tiny",
    "network__img_size": [2, 16, 16],
    "network__window_size": [2, 4, 4],
    "network__depths": [1, 1, 1, 1, 1, 1, 1, 1],
    "network__indep_reconsts": [7],
    "network__embed_dims": [8] * 8,
    "network__num_heads": [2] * 8,
    "network__deformable_groups": 2,
    "optimizer__flow_frozen_steps": 6,
    "train__frames": 2,
    "train__crop": 16,
    "train__threads": 1,
    # Without it, on a GPU no training has the bits of another.
    "train__deterministic": torch.cuda.is_available(),
    "train__total_steps": 24,
    "train__checkpoint_every": 4,
    "train__validate_every": 4,
    "evaluate__tile": [3, 40, 40],
    "evaluate__overlap": [1, 8, 8],
}
"""A recipe that trains in seconds."""


@dataclass(frozen=True)
class LocalServices:
    """Running services: `environment` is the whole environment of a child process, `endpoints` their addresses and keys."""

    home: Path
    environment: Mapping[str, str]
    endpoints: Endpoints


@pytest.fixture(autouse=True)
def log_as_the_tests_have_it(monkeypatch: pytest.MonkeyPatch):
    """A command in this process must not leave the log a handler that writes to this test's captured stderr."""
    monkeypatch.setattr("vrt.observe.set_up_logging", lambda rank: None)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are tiny: on a busy machine, threads that wait for each other take ten times as long as one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    """Skips where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU on this machine")
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def two_gpus(gpu: torch.device) -> None:
    """Skips where there is but one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU on this machine, not two")


@pytest.fixture(params=["cpu", "gpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The test runs on each kind of device that is here."""
    return torch.device("cpu") if request.param == "cpu" else request.getfixturevalue("gpu")


@pytest.fixture(scope="session")
def nothing_given() -> Iterator[None]:
    """For the session, forget whatever leads to services of the user's: no test may touch those, or their project."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("VRT_HOME", "MLFLOW_DEFAULT_ARTIFACT_ROOT", *(name for names in endpoints.GIVEN_BY.values() for name in names)):
            patch.delenv(variable, raising=False)
        yield


@pytest.fixture(scope="session")
def ended_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM, as `timeout` and CI send it, end the session the way Ctrl-C does: with every fixture put away."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def make_home(nothing_given: None, ended_like_ctrl_c: None) -> Callable[[Path], Path]:
    """Prepares a folder as `VRT_HOME`, with ports that neither the user's services nor another session's may take at any moment."""

    def prepare(home: Path) -> Path:
        folder = home / "services"
        state.make_folder(folder)
        # Below the ports that the kernel hands out, spread by process so that sessions at the same time do not meet.
        first = 11000 + os.getpid() * 20 % 20000
        ports: dict[str, int] = {}
        for name in state.DEFAULT_PORTS:
            ports[name] = process.free_port(first, without=ports.values())
        state.save(folder, state.new_state(ports))
        return home

    return prepare


@pytest.fixture(scope="session")
def local_services(tmp_path_factory: pytest.TempPathFactory, make_home: Callable[[Path], Path]) -> Iterator[LocalServices]:
    """S3, MLflow and Prefect, started once for all processes of the session and ended with the last of them, also by Ctrl-C."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "session"
    folder.mkdir(exist_ok=True)
    home = folder / ".vrt"
    with (folder / "users").open("w") as users:
        with (folder / "making").open("w") as making:
            fcntl.flock(making, fcntl.LOCK_EX)
            if not home.exists():
                make_home(home)
        fcntl.flock(users, fcntl.LOCK_SH)
        try:
            local.up(home)
            running = state.load(home / "services")
            assert running is not None
            environment = {**os.environ, "VRT_HOME": str(home), **local.load_environment(home)}
            yield LocalServices(home, environment, running.endpoints)
        finally:
            fcntl.flock(users, fcntl.LOCK_UN)
            with suppress(BlockingIOError):
                # Refused while another process of the session has them.
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                local.down(home)


@pytest.fixture
def services(local_services, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, str]:
    """The session's real servers, also for this process: its environment leads to them during the test."""
    for variable, value in local_services.environment.items():
        if os.environ.get(variable) != value:
            monkeypatch.setenv(variable, value)
    # boto3 remembers the credentials of the environment it was first used in.
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    return local_services.environment


@dataclass(frozen=True)
class Workspace:
    """A project folder of its own, with the repository's dvc.yaml and flows, a tiny network and a tiny data set."""

    root: Path
    environment: Mapping[str, str]
    fork_server: ForkServer

    def vrt(self, *arguments: str, variables: Mapping[str, str] = {}) -> subprocess.CompletedProcess:  # noqa: B006
        """`vrt ARGUMENTS` in the workspace to its end, forked off where all is imported; `stdout` holds all it printed.

        It runs the repository's code, not the copy of it that is here.
        """
        return self.fork_server.run(arguments, self.root, {**self.environment, **variables})

    def start(self, *command: str, **options) -> subprocess.Popen:
        """`python -m COMMAND` in the workspace; its output goes to `log`, which is emptied first."""
        return self._launch("-m", *command, **options)

    def train_with(self, module: str, constant: str, value: float, variables: Mapping[str, str] = {}) -> subprocess.Popen:  # noqa: B006
        """`vrt train`, started as by `start`, with another value of a constant of the code, such as how long it is patient."""
        script = f"import sys, {module} as changed; changed.{constant} = {value}; from vrt.cli import program; sys.argv[1:] = ['train']; program()"
        return replace(self, environment={**self.environment, **variables})._launch("-c", script)

    def _launch(self, *words: str, **options) -> subprocess.Popen:
        self.log.write_text("")
        with self.log.open("a") as output:
            return subprocess.Popen([sys.executable, *words], cwd=self.root, env=self.environment, stdout=output, stderr=subprocess.STDOUT, **options)

    def run(self, *command: str, cwd: Path | None = None, variables: Mapping[str, str] = {}) -> subprocess.CompletedProcess:  # noqa: B006
        """`python -m COMMAND` to its end; `stdout` holds all it printed."""
        return subprocess.run(
            [sys.executable, "-m", *command],
            check=False,
            cwd=cwd or self.root,
            env={**self.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )

    @property
    def name(self) -> str:
        """What its training is called."""
        return YAML().load((self.root / "params.yaml").read_text())["name"]

    @property
    def log(self) -> Path:
        return self.root / "command.log"

    def wait_for(self, text: str, process: subprocess.Popen | psutil.Process) -> None:
        """Until the log of a started command says `text`."""
        for _ in range(12_000):
            if text in self.log.read_text():
                return
            assert psutil.pid_exists(process.pid) and psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE, (
                f"ended without saying {text!r}:\n{self.log.read_text()}"
            )
            time.sleep(0.05)
        raise AssertionError(f"did not say {text!r}:\n{self.log.read_text()}")

    def edit(self, **values: object) -> None:
        """Set params by dotted key, with `__` for the dot."""
        tree = YAML().load((self.root / "params.yaml").read_text())
        for key, value in values.items():
            *path, last = key.split("__")
            section = tree
            for part in path:
                section = section[part]
            section[last] = value
        YAML().dump(tree, self.root / "params.yaml")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw data set `tiny`, and what `vrt prepare` makes of it."""
    root = tmp_path_factory.mktemp("tiny")
    raw = root / "raw" / "tiny"
    raw.mkdir(parents=True)
    content = YAML(typ="safe").load((REPOSITORY / "data/raw/quickstart/dataset.yaml").read_text())
    for name, split in content["splits"].items():
        split |= {"clips": 2 if name == "train" else 1, "frames": 3, "height": 40, "width": 40}
    YAML().dump(content, raw / "dataset.yaml")
    prepare(raw, root / "prepared")
    return root


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    with ForkServer() as server:
        yield server


@pytest.fixture(scope="session")
def make_workspace(
    tmp_path_factory: pytest.TempPathFactory, local_services: LocalServices, tiny_data: Path, fork_server: ForkServer
) -> Callable[[str], Workspace]:
    """Makes workspaces against the session's services. Names are unique in the session, since a lineage is found by its name."""

    def make(name: str) -> Workspace:
        root = tmp_path_factory.mktemp(name)
        for path in ("vrt", "pipelines", "recipes"):
            shutil.copytree(REPOSITORY / path, root / path)
        (root / ".dvc").mkdir()
        for path in ("dvc.yaml", "prefect.yaml", ".dvcignore", ".gitignore", ".dvc/config"):
            shutil.copy2(REPOSITORY / path, root / path)
        shutil.copytree(tiny_data, root / "data")
        shutil.copy2(REPOSITORY / "recipes/quickstart.yaml", root / "params.yaml")
        subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
        project.configure(root, state.load(local_services.home / "services"), local_services.endpoints)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        workspace = Workspace(root, {**local_services.environment, "PATH": path, "PYTHONPATH": str(root)}, fork_server)
        workspace.edit(**TINY, name=f"{name}-{os.getpid()}-{time.monotonic_ns()}")
        return workspace

    return make


@pytest.fixture(scope="session")
def make_project(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Callable[..., Workspace]:
    """Makes folders with the params of a tiny recipe, some changed, for what needs neither data nor services."""

    def make(name: str, **values: object) -> Workspace:
        root = tmp_path_factory.mktemp(name)
        shutil.copy2(REPOSITORY / "recipes/quickstart.yaml", root / "params.yaml")
        project = Workspace(root, {**os.environ, "PYTHONPATH": str(REPOSITORY), "VRT_HOME": str(root / ".vrt")}, fork_server)
        project.edit(**{**TINY, **values})
        return project

    return make


@pytest.fixture(scope="session")
def uninterrupted(make_workspace: Callable[[str], Workspace]) -> Workspace:
    """The workspace of a training that nobody disturbed, for the others to be compared with."""
    workspace = make_workspace("uninterrupted")
    ended = workspace.run("vrt", "train")
    assert ended.returncode == 0, ended.stdout
    return workspace


def write_images(folder: Path, name: str, count: int, size: tuple[int, int], seed: int) -> None:
    """`count` small images of slowly moving texture; `name` has a place for the number, from 1."""
    height, width = size
    folder.mkdir(parents=True)
    texture = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1 + count, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    for number in range(count):
        Image.fromarray(texture[:height, number : number + width]).save(folder / name.format(number + 1))


@pytest.fixture
def published_copy(tmp_path: Path) -> Callable[..., Path]:
    """Makes a tiny copy of a published data set, as it unpacks: published_copy("gopro", frames=7, size=(24, 32))."""

    def make(layout: str, frames: int, size: tuple[int, int]) -> Path:
        root, seeds = tmp_path / f"copy-of-{layout}", itertools.count()

        def write(*folders: str) -> None:
            for folder in folders:
                write_images(root / folder, "im{}.png" if layout == "vimeo" else "{:08}.png", frames, size, next(seeds))

        def listed(path: str, *names: str) -> None:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text("".join(f"{name}\n" for name in names))

        match layout:
            case "reds" | "reds-blur":
                for kind in ("sharp", "blur") if layout == "reds-blur" else ("sharp",):
                    write(*(f"train/train_{kind}/{name}" for name in ("000", "001", "011", "015", "020")))
                    write(*(f"val/val_{kind}/{name}" for name in ("000", "001", "006", "017")))
            case "gopro":
                write(
                    *(
                        f"{clip}/{kind}"
                        for clip in ("train/GOPR0372_07_00", "train/GOPR0374_11_00", "test/GOPR0384_11_00")
                        for kind in ("sharp", "blur")
                    )
                )
            case "dvd":
                test = ["720p_240fps_2", "IMG_0003", "IMG_0021", "IMG_0030", "IMG_0031", "IMG_0032", "IMG_0033", "IMG_0037", "IMG_0039", "IMG_0049"]
                write(*(f"quantitative_datasets/{clip}/{kind}" for clip in ["IMG_0001", "GOPR9633", *test] for kind in ("GT", "input")))
            case "davis":
                write(*(f"JPEGImages/480p/{clip}" for clip in ("bear", "bmx-bumps", "blackswan", "aerobatics")))
                listed("ImageSets/2017/train.txt", "bear", "bmx-bumps")
                listed("ImageSets/2017/val.txt", "blackswan")
                listed("ImageSets/2017/test-dev.txt", "aerobatics")
            case "vimeo":
                write(*(f"sequences/{clip}" for clip in ("00001/0001", "00001/0002", "00002/0001")))
                listed("sep_trainlist.txt", "00001/0001", "00002/0001")
                listed("sep_testlist.txt", "00001/0002", "")
        return root

    return make
