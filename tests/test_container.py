"""The image: its Dockerfile is sound, and its steps, run in a fresh Debian, give a place where everything works."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from dockerfile_parse import DockerfileParser

from tests.chroot import Image, build, copy_context, pip_here

PROJECT = Path(__file__).parents[1]
DOCKERFILE = PROJECT / "Dockerfile"
DEBIAN = "bookworm"
can_chroot = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("debootstrap", "unshare", "ip"))), reason="needs root, debootstrap, unshare and ip"
)


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, str]]:
    """(instruction, value) of the Dockerfile."""
    return [(step["instruction"], step["value"]) for step in DockerfileParser(str(DOCKERFILE)).structure if step["instruction"] != "COMMENT"]


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    """What is under version control."""
    return set(subprocess.run(["git", "ls-files"], cwd=PROJECT, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines())


def test_a_linter_has_nothing_to_say():
    ended = subprocess.run([Path(sys.executable).parent / "hadolint", str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout


def test_it_runs_as_nobody_special_and_hears_signals_itself(steps):
    last = dict(steps)
    assert last["USER"].isdecimal() and int(last["USER"]) > 0
    for kind in ("ENTRYPOINT", "CMD"):
        assert last[kind].startswith("["), f"{kind} would be a shell's child"
    assert last["STOPSIGNAL"] == "SIGTERM"


def test_no_secret_is_asked_for_and_nothing_comes_from_the_web_unchecked(steps):
    assert not [value for kind, value in steps if kind in ("ARG", "ENV") and re.search("SECRET|PASSWORD|TOKEN|KEY", value)]
    assert not [value for kind, value in steps if kind == "ADD" or "curl" in value or "wget" in value]


def test_the_layer_of_the_packages_is_made_of_the_lock_file_alone(steps):
    begins = steps.index(("FROM", "base AS packages"))
    stage = list(itertools.takewhile(lambda step: step[0] != "FROM", steps[begins + 1 :]))
    assert [value for kind, value in stage if kind in ("COPY", "ADD")] == ["requirements.lock /tmp/"]
    from_stages = [value for kind, value in steps if kind == "COPY" and "--from=" in value]
    assert from_stages == ["--from=packages /opt/vrt /opt/vrt"]


def test_what_is_copied_is_under_version_control(steps, tracked):
    for kind, value in steps:
        if kind == "COPY" and "--from=" not in value:
            *sources, _ = (word for word in value.split() if not word.startswith("--"))
            for source in sources:
                assert source in tracked or any(path.startswith(f"{source}/") for path in tracked), source


def test_the_build_sees_all_of_the_program_and_nothing_that_git_does_not_have(tracked, tmp_path: Path):
    copy_context(PROJECT, tmp_path)
    seen = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert seen <= tracked
    assert {path for path in tracked if path.startswith(("vrt/", "pipelines/", "recipes/")) or path.endswith("-pool.json")} <= seen


def test_all_that_the_build_sees_gets_into_the_image(steps, tmp_path: Path):
    copy_context(PROJECT, tmp_path)
    copied = {word for kind, value in steps if kind == "COPY" and "--from=" not in value for word in value.split()[:-1]}
    seen = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    # What an engine gets for itself.
    left_out = {".dockerignore", "Dockerfile"}
    assert {str(path) for path in seen if not copied & {str(path), *map(str, path.parents)}} == left_out


def test_of_data_that_dvc_keeps_an_image_knows_what_to_fetch_and_has_none_of_it(tmp_path: Path):
    checkout, context = tmp_path / "checkout", tmp_path / "context"
    for name in ("mine.dvc", "mine/dataset.yaml", "mine/train/clip/00000001.png"):
        (checkout / "data/raw" / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / "data/raw" / name).touch()
    shutil.copy2(PROJECT / ".dockerignore", checkout)
    copy_context(checkout, context)
    assert [path.name for path in (context / "data").rglob("*") if path.is_file()] == ["mine.dvc"]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """Built once, by the steps of the Dockerfile, from nothing but Debian's packages and pip's."""
    folder = tmp_path_factory.mktemp("image")
    subprocess.run(["debootstrap", "--variant=minbase", DEBIAN, str(folder / "debian")], check=True, stdout=subprocess.DEVNULL)
    outside = pip_here()
    wheels = outside.variables.get("PIP_FIND_LINKS", "")
    (folder / "stages").mkdir()
    built = build(
        DOCKERFILE, {f"debian:{DEBIAN}-slim": folder / "debian"}, folder / "stages", {"TORCH_WHEELS": wheels, "REVISION": "abc123"}, outside
    )
    # The user of the image has to reach it.
    for parent in (folder, folder.parent, folder.parent.parent):
        parent.chmod(0o711)
    return built


def told(image: Image, script: str, log: Path, until: str) -> subprocess.Popen:
    """A container that runs a shell's `script`, once it has said `until`."""
    with log.open("w") as output:
        container = image.start("sh", "-c", script, stdout=output, stderr=subprocess.STDOUT)
    while until not in log.read_text():
        assert container.poll() is None, log.read_text()
        time.sleep(0.2)
    return container


def stop(container: subprocess.Popen, image: Image) -> int:
    """As `docker stop` does; returns the exit code of the container."""
    (first,) = psutil.Process(container.pid).children()
    assert first.cmdline()[0] == "tini"
    first.send_signal(image.stop_signal)
    return container.wait(120)


@pytest.mark.long
@can_chroot
def test_in_the_image_the_quickstart_runs_as_its_user_without_git_and_without_network(image: Image, tmp_path: Path):
    log = tmp_path / "log"
    demo = told(image, "id -u && vrt demo", log, "restored clips gain")
    assert demo.wait(60) == 0, log.read_text()
    assert log.read_text().startswith("1000\n")
    assert not (image.root / "srv/vrt/.git").exists()
    assert re.search(r"restored clips gain \d\.\d+ dB", log.read_text())


@pytest.mark.long
@can_chroot
def test_told_to_stop_a_container_saves_what_it_trains_and_asks_to_be_continued(image: Image, tmp_path: Path):
    log, params = tmp_path / "log", image.root / "srv/vrt/params.yaml"
    params.write_text(params.read_text().replace("name: quickstart", "name: stopped").replace("total_steps: 160", "total_steps: 100000"))
    health = " ".join(image.health)
    script = f"vrt services up && {health} && vrt prepare && exec vrt train"
    container = told(image, script, log, "checkpoint 1 registered")
    assert stop(container, image) == 75, log.read_text()
    assert "received SIGTERM" in log.read_text()
    saved = re.search(r"stopping after step (\d+)", log.read_text())[1]

    again = told(image, script, log, f"continuing after step {saved} of")
    assert stop(again, image) == 75, log.read_text()


@pytest.mark.long
@can_chroot
def test_the_images_own_command_serves_the_deployments_and_ends_when_told(image: Image, tmp_path: Path):
    log = tmp_path / "log"
    container = told(image, f"vrt services up && exec {' '.join(image.command)}", log, "this works for them until Ctrl-C")
    assert stop(container, image) == 0, log.read_text()
