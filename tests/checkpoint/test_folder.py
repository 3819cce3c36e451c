"""The local folder: a checkpoint is there as a whole or not at all, whatever ends the writer."""

import errno
import json
import os
import subprocess
import threading
from pathlib import Path

import pytest

from vrt.checkpoint.errors import CheckpointError
from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.manifest import FileEntry, Manifest
from vrt.checkpoint.serialize import sha256_of


def test_a_commit_is_complete_and_verifies(folder, commit, names, lineage):
    manifest = commit(folder, 40)
    assert names(folder) == ["40_G.pth", "40_history.jsonl", "40_manifest.json"]
    assert folder.problems(40, lineage) == []
    # By another program than the one that wrote it.
    digests = subprocess.run(["sha256sum", *names(folder)[:2]], cwd=folder.path, capture_output=True, text=True, check=True).stdout
    assert digests == "".join(f"{file.sha256}  {file.name}\n" for file in manifest.files)
    assert folder.manifest(40) == manifest


def test_files_are_written_side_by_side_and_each_is_told_of_once_it_is_there(folder, lineage):
    meeting, told = threading.Barrier(2), []

    def write(file):
        # Written one after the other, they would never meet.
        meeting.wait(60)
        file.write(b"content")

    def written(file: FileEntry):
        assert sha256_of(folder.path / file.name) == file.sha256
        assert not (folder.path / "40_manifest.json").exists()
        told.append(file.name)

    manifest = folder.commit(40, {"G.pth": write, "E.pth": write}, lambda files: Manifest(lineage, 40, files, {}, {}, {}), written)
    assert sorted(told) == ["40_E.pth", "40_G.pth"]
    assert [file.name for file in manifest.files] == ["40_G.pth", "40_E.pth"]


def test_steps_are_listed_by_number_newest_first(folder, commit):
    for step in (9, 100, 20):
        commit(folder, step)
    (folder.path / "300_G.pth").write_bytes(b"no manifest, no checkpoint")
    (folder.path / "notes_manifest.json").write_text("a stranger's")
    assert folder.steps() == [100, 20, 9]


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), RuntimeError("a bug"), KeyboardInterrupt()], ids=lambda error: type(error).__name__
)
def test_a_writer_that_raises_leaves_nothing_of_its_step(folder, commit, names, lineage, error):
    commit(folder, 20)
    before = names(folder)

    def fail(file):
        file.write(b"half a fi")
        raise error

    expected = CheckpointError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        folder.commit(40, {"G.pth": lambda file: file.write(b"whole"), "E.pth": fail}, lambda files: pytest.fail("described what was not written"))
    assert names(folder) == before
    assert folder.problems(20, lineage) == []


# Fills whatever holds the folder with the second of two checkpoints, by way of the saver and torch.
FILL = """
import json, sys, torch
from pathlib import Path
from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.saver import Saver

class Published(list):
    publish = lambda self, manifest, started: self.append(manifest)
    ahead = send = lambda self, *_: None
    def note(self, key, text):
        self.noted = (key, text)

folder, published = CheckpointFolder(Path(sys.argv[1]) / "checkpoints"), Published()
folder.prepare()
saver = Saver(folder, published)
facts = {"lineage": "tiny-0123456789", "metrics": {}, "identity": {}, "origin": {}}

def save(step, first, second):
    saver.save(step, {"G.pth": {"a": torch.zeros(10), "b": torch.zeros(first)}, "E.pth": {"a": torch.zeros(second)}}, {}, facts)
    saver.wait()
    left = sorted(path.name for path in folder.path.iterdir())
    return {"left": left, "failure": str(saver.failure), "noted": getattr(published, "noted", None)}

# The second file does not fit, then not even the first: one fails in the middle of a tensor, the other in the middle of torch's own notes.
found = {step: save(step, *sizes) for step, sizes in {20: (1000, 1000), 40: (20_000, 300_000), 60: (2_000_000, 1000), 80: (1000, 1000)}.items()}
found |= {"healthy": folder.problems(20, "tiny-0123456789") == [], "published": [manifest.step for manifest in published]}
print(json.dumps(found))
"""
# A disk of 1 MiB in a mount namespace of its own: gone with the process.
OWN_DISK = ("unshare", "--mount", "sh", "-c", 'disk="$1"; shift; mount -t tmpfs -o size=1m none "$disk" && exec "$@"', "sh")


def can_mount(tmp_path: Path) -> bool:
    try:
        return subprocess.run([*OWN_DISK, tmp_path, "true"], check=False, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.parametrize("limit", ["disk", "file size"])
def test_a_full_disk_costs_the_saves_that_do_not_fit_and_nothing_else(tmp_path: Path, child, limit: str):
    if limit == "disk" and not can_mount(tmp_path):
        pytest.skip("needs the right to mount a small disk")
    before = (*OWN_DISK, str(tmp_path)) if limit == "disk" else ("sh", "-c", 'ulimit -f 512; exec "$@"', "sh")
    output, errors = child(FILL, tmp_path, before=before).communicate()
    assert output, errors
    found = json.loads(output)
    reason = os.strerror(errno.ENOSPC if limit == "disk" else errno.EFBIG)
    for step in (40, 60):
        failure = f"{tmp_path / 'checkpoints'}: step {step} could not be saved ({reason}); free space there"
        assert found[str(step)] == {"left": ["20_E.pth", "20_G.pth", "20_manifest.json"], "failure": failure, "noted": ["failed_save", failure]}
    assert found["healthy"]
    assert (found["80"]["failure"], found["published"]) == ("None", [20, 80])


# Saves, with the folder made read-only by a real mount in between.
REMOUNT = """
import json, subprocess, sys, torch
from pathlib import Path
from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.saver import Saver

class Published(list):
    publish = lambda self, manifest, started: self.append(manifest.step)
    ahead = send = note = lambda self, *_: None

folder, published = CheckpointFolder(Path(sys.argv[1])), Published()
folder.prepare()
saver, found = Saver(folder, published), {}
for step, mode in ((20, "rw"), (40, "ro"), (60, "rw")):
    subprocess.run(["mount", "-o", f"remount,{mode},bind", folder.path], check=True)
    saver.save(step, {"G.pth": {"a": torch.zeros(10)}}, {}, {"lineage": "tiny-0123456789", "metrics": {}, "identity": {}, "origin": {}})
    saver.wait()
    found[step] = [str(saver.failure), folder.problems(20, "tiny-0123456789"), saver.safe_step, str(saver.must_stop)]
print(json.dumps([found, published]))
"""
BOUND = ("unshare", "--mount", "sh", "-c", 'mount --bind "$1" "$1" && shift && exec "$@"', "sh")


def test_a_folder_that_turns_read_only_costs_the_saves_meanwhile_and_nothing_else(folder, child):
    if not can_mount(folder.path.parent):
        pytest.skip("needs the right to mount")
    output, errors = child(REMOUNT, folder.path, before=(*BOUND, str(folder.path))).communicate()
    assert output, errors
    found, published = json.loads(output)
    assert found["40"] == [f"{folder.path}: step 40 could not be saved (Read-only file system); make the folder writable", [], 20, "None"]
    assert (found["60"], published) == (["None", [], 60, "None"], [20, 60])


# Stops for ever at the point given, having said so.
HANG = """
import sys, time
from pathlib import Path
from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.manifest import Manifest

def hang(*_):
    print("there", flush=True)
    time.sleep(600)

def half(file):
    file.write(b"weights of step" * 1000)
    file._file.flush()
    hang()

where = sys.argv[2]
whole = lambda file: file.write(b"whole")
contents = {"G.pth": whole, "E.pth": half if where == "in a file" else whole}
manifest = lambda files: Manifest("tiny-0123456789", 40, files, {}, {}, {})
CheckpointFolder(Path(sys.argv[1])).commit(40, contents, hang if where == "before the manifest" else manifest)
"""


@pytest.mark.parametrize("where", ["in a file", "before the manifest"])
def test_a_writer_killed_in_mid_commit_leaves_no_checkpoint(folder, commit, names, lineage, child, where: str):
    commit(folder, 20)
    writer = child(HANG, folder.path, where)
    assert writer.stdout.readline() == "there\n"
    writer.kill()
    writer.wait()
    assert folder.steps() == [20]
    if where == "in a file":
        assert any(name.startswith(".unfinished-") for name in names(folder))
    folder.prepare()
    assert not any(name.startswith(".unfinished-") for name in names(folder))
    assert folder.problems(20, lineage) == []
    # The next trainer comes to the same step.
    commit(folder, 40)
    assert folder.problems(40, lineage) == []


def test_each_damaged_file_is_named_with_what_is_wrong(folder, lineage):
    contents = {name: lambda file: file.write(b"0123456789") for name in ("G.pth", "E.pth", "optimizerG.pth", "history.jsonl")}
    folder.commit(40, contents, lambda files: Manifest(lineage, 40, files, {}, {}, {}))
    (folder.path / "40_G.pth").unlink()
    (folder.path / "40_E.pth").write_bytes(b"01234")
    (folder.path / "40_optimizerG.pth").write_bytes(b"0123456780")
    assert folder.problems(40, lineage) == [
        "40_G.pth is missing",
        "40_E.pth has 5 bytes; the manifest says 10",
        "40_optimizerG.pth has other content than the manifest says (SHA-256 differs)",
    ]


def test_a_file_that_the_disk_cannot_read_is_a_problem_and_no_crash(folder, lineage):
    # /proc/self/mem is a file of no bytes whose reading fails with an I/O error, as a bad sector does.
    folder.commit(40, {"G.pth": lambda file: None}, lambda files: Manifest(lineage, 40, files, {}, {}, {}))
    (folder.path / "40_G.pth").unlink()
    (folder.path / "40_G.pth").symlink_to("/proc/self/mem")
    (problem,) = folder.problems(40, lineage)
    assert "40_G.pth" in problem and "Input/output error" in problem


def test_a_checkpoint_of_another_training_or_step_is_a_problem(folder, commit, lineage):
    commit(folder, 40, lineage="other-1")
    assert folder.problems(40, lineage) == ["its manifest is of other-1 step 40"]
    commit(folder, 20)
    (folder.path / "20_manifest.json").rename(folder.path / "60_manifest.json")
    assert folder.problems(60, lineage) == [f"its manifest is of {lineage} step 20"]
    (folder.path / "80_manifest.json").write_text("{")
    (problem,) = folder.problems(80, lineage)
    assert "80_manifest.json: no readable manifest" in problem


def test_a_damaged_step_is_set_aside_whole_and_each_time_apart(folder, commit, names, lineage):
    commit(folder, 4)
    for number in (1, 2):
        commit(folder, 40, text=f" number {number}")
        aside = folder.set_aside(40)
        assert aside == folder.path / "damaged" / f"40-{number}"
        assert sorted(path.name for path in aside.iterdir()) == ["40_G.pth", "40_history.jsonl", "40_manifest.json"]
        assert f"number {number}" in (aside / "40_G.pth").read_text()
    assert folder.steps() == [4]
    assert folder.problems(4, lineage) == []


def test_a_folder_that_cannot_be_written_says_so_before_training(tmp_path: Path):
    (tmp_path / "checkpoints").write_text("a file is in the way")
    with pytest.raises(CheckpointError, match="the checkpoint folder can't be written"):
        CheckpointFolder(tmp_path / "checkpoints").prepare()


READ_ONLY = (
    "unshare",
    "--mount",
    "sh",
    "-c",
    'folder="$1"; shift; mount --bind "$folder" "$folder" && mount -o remount,ro,bind "$folder" && exec "$@"',
    "sh",
)
PREPARE = """
import sys
from pathlib import Path
from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.errors import CheckpointError
try:
    CheckpointFolder(Path(sys.argv[1])).prepare()
except CheckpointError as error:
    print(error)
"""


def test_a_read_only_folder_says_so_before_training(folder, commit, child):
    if not can_mount(folder.path.parent):
        pytest.skip("needs the right to mount")
    commit(folder, 20)
    output, errors = child(PREPARE, folder.path, before=(*READ_ONLY, str(folder.path))).communicate()
    assert "the checkpoint folder can't be written (Read-only file system)" in output, errors


@pytest.fixture
def elsewhere(tmp_path: Path) -> CheckpointFolder:
    made = CheckpointFolder(tmp_path / "elsewhere")
    made.prepare()
    return made


def copying(source: CheckpointFolder, damage=lambda name, content: content):
    return lambda file, path: path.write_bytes(damage(file.name, (source.path / file.name).read_bytes()))


def test_a_received_checkpoint_is_the_one_that_was_sent(folder, elsewhere, commit, names, lineage):
    manifest = commit(elsewhere, 40)
    folder.receive(manifest, copying(elsewhere))
    assert names(folder) == names(elsewhere)
    assert folder.problems(40, lineage) == []
    assert folder.manifest(40) == manifest


def test_wrong_bytes_are_not_received_and_kept_for_a_look(folder, elsewhere, commit, lineage):
    commit(folder, 20)
    flip = lambda name, content: bytes([content[0] ^ 1]) + content[1:] if name == "40_G.pth" else content  # noqa: E731
    with pytest.raises(CheckpointError, match="40_G.pth has other content than the manifest says"):
        folder.receive(commit(elsewhere, 40), copying(elsewhere, flip))
    assert folder.steps() == [20]
    assert (folder.path / "damaged" / "40-1" / "40_G.pth").exists()
    assert folder.problems(20, lineage) == []


def test_a_fetch_that_breaks_off_leaves_no_checkpoint(folder, elsewhere, commit):
    def break_off(file: FileEntry, path: Path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"40_G.pth: could not be written \(No space left on device\)"):
        folder.receive(commit(elsewhere, 40), break_off)
    assert folder.steps() == []
