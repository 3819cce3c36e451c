"""Back to a training: what is recorded of it, and a folder made from that."""

import json
import shutil
import subprocess

import pytest

from tests.same_training import lineages
from vrt.services import project, state
from vrt.stages import provenance
from vrt.stages.provenance import CODE, ENVIRONMENT, differences


def test_what_differs_is_told_by_key():
    def recorded(lr: float, torch: str, md5: str) -> dict[str, bytes]:
        lock = f"stages: {{train: {{outs: [{{path: model, md5: {md5}}}]}}}}"
        params = f"optimizer: {{lr: {lr}, betas: [0.9, 0.99]}}"
        return {
            CODE: json.dumps({"version": "abc"}).encode(),
            ENVIRONMENT: json.dumps({"packages": {"torch": torch}}).encode(),
            "params.yaml": params.encode(),
            "dvc.lock": lock.encode(),
        }

    assert differences(recorded(0.1, "2", "x"), recorded(0.1, "2", "x")) == []
    assert differences(recorded(0.1, "2", "x"), recorded(0.2, "3", "y")) == [
        ("packages.torch", "2", "3"),
        ("params.yaml: optimizer.lr", "0.1", "0.2"),
        ("dvc.lock: stages.train.outs.model.md5", "x", "y"),
    ]


def test_without_git_the_version_is_that_of_the_image_or_unknown(monkeypatch):
    monkeypatch.setattr(provenance, "_git", lambda *_, missing=None: missing)
    assert provenance.code_here() == {"version": "unknown: no git here"}
    monkeypatch.setenv("VRT_CODE_VERSION", "image 7")
    assert provenance.code_here() == {"version": "image 7"}


def test_changes_are_recorded_so_that_they_can_be_applied_whatever_the_users_settings(tmp_path, monkeypatch):
    repository, settings = tmp_path / "code", tmp_path / "gitconfig"
    (repository / "inner").mkdir(parents=True)
    (repository / ".dvc").mkdir()
    (repository / ".dvc/config").write_text("# of DVC\n")
    for name in ("inner/a.py", "b.py"):
        (repository / name).write_text("before\n")
    git(repository, "init", "--quiet")
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "--message", "one")
    settings.write_text("[diff]\n\tnoprefix = true\n\trelative = true\n\texternal = /bin/false\n[color]\n\tui = always\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    for name in ("inner/a.py", "b.py"):
        (repository / name).write_text("after\n")
    (repository / ".dvc/config").write_text("secret_access_key = secret\n")
    # As in a package below the repository.
    monkeypatch.setattr(provenance, "__file__", str(repository / "inner" / "provenance.py"))
    monkeypatch.chdir(tmp_path)
    changes = provenance.collect(tmp_path / "params.yaml")[provenance.CHANGES]
    assert b"secret" not in changes
    git(repository, "checkout", "--quiet", ".")
    subprocess.run(["git", "apply", "--index", "-"], cwd=repository, check=True, input=changes)
    assert [(repository / name).read_text() for name in ("inner/a.py", "b.py")] == ["after\n"] * 2
    git(repository, "commit", "--quiet", "--all", "--message", "two")
    (repository / ".dvc/config").write_text("secret_access_key = secret\n")
    assert not provenance.code_version().endswith("+changes")


def git(folder, *arguments: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.mark.long
def test_a_training_is_reproduced_with_its_code_params_and_data_and_an_experiment_is_another_one(make_workspace):
    workspace = make_workspace("provenance")
    workspace.edit(train__total_steps=2, train__checkpoint_every=2, train__validate_every=2)
    (workspace.root / ".gitignore").write_text("/checkpoints\n/model\n/data/prepared\n/.vrt\n__pycache__\n/command.log\n")
    git(workspace.root, "add", "-A")
    git(workspace.root, "commit", "-qm", "as it began")
    changed = workspace.root / "vrt/observe.py"
    changed.write_text(changed.read_text() + "# a change that nobody committed\n")
    ended = workspace.run("dvc", "repro")
    assert ended.returncode == 0, ended.stdout
    assert workspace.run("dvc", "push").returncode == 0
    ((lineage, _),) = lineages(workspace).items()
    git(workspace.root, "checkout", "--quiet", "vrt/observe.py")
    git(workspace.root, "add", "-A")
    git(workspace.root, "commit", "-qm", "later")
    # Another machine: what is here is not DVC's cache but the remote.
    shutil.rmtree(workspace.root / ".dvc/cache")
    workspace.edit(optimizer__lr=2e-3)

    reproduced = workspace.run("vrt", "reproduce", lineage, "--to", "there")

    assert reproduced.returncode == 0, reproduced.stdout
    there = workspace.root / "there"
    assert "params.yaml: optimizer.lr" in reproduced.stdout and "changes since the commit" in reproduced.stdout
    assert "not as it was" not in reproduced.stdout, reproduced.stdout
    assert "# a change that nobody committed" in (there / "vrt/observe.py").read_text()
    assert (there / "model/2_G.pth").exists() and (there / "data/prepared/index.json").exists()
    listed = workspace.run("vrt", "checkpoints", "list", "--json", cwd=there, variables={"PYTHONPATH": str(there)})
    assert json.loads(listed.stdout)["lineage"] == lineage
    assert workspace.run("vrt", "reproduce", lineage, "--to", "there").returncode == 2, "it writes over nothing"

    names = {variable: "a" for variable in ("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME")}
    mails = {variable: "a@b" for variable in ("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL")}
    experiment = workspace.run("dvc", "exp", "run", "-S", "optimizer.lr=1e-3", variables=names | mails)
    assert experiment.returncode == 0, experiment.stdout
    assert "this is a new training" in experiment.stdout and "optimizer.lr: 0.003 -> 0.001" in experiment.stdout, experiment.stdout
    assert len(lineages(workspace)) == 2


@pytest.mark.long
def test_without_git_everything_works_and_says_what_is_not_recorded(make_workspace, local_services):
    workspace = make_workspace("nogit")
    shutil.rmtree(workspace.root / ".git")
    project.configure(workspace.root, state.load(local_services.home / "services"), local_services.endpoints)
    workspace.edit(train__total_steps=2, train__checkpoint_every=2, train__validate_every=2)
    ended = workspace.run("dvc", "repro")
    assert ended.returncode == 0, ended.stdout
    assert "without git the run records params, environment and data, but not the commit" in ended.stdout
    assert workspace.run("dvc", "push").returncode == 0
    ((lineage, tags),) = lineages(workspace).items()
    assert tags["vrt.code_version"] == "unknown: no git here"

    reproduced = workspace.run("vrt", "reproduce", lineage)

    assert reproduced.returncode == 0, reproduced.stdout
    assert "not as it was: the code, of which only 'unknown: no git here' is recorded; this is the code here" in reproduced.stdout
    assert (workspace.root / f"reproduced-{lineage}/model/2_G.pth").exists()
