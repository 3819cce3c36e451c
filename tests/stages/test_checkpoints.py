"""`vrt checkpoints` against real servers: what it says of each side, and that each damage is mended."""

import json
from pathlib import Path

import pytest

from vrt.checkpoint.curator import Curator
from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.manifest import Manifest
from vrt.checkpoint.store import S3Store
from vrt.cli import parser
from vrt.data.clips import PreparedData
from vrt.lifecycle import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED
from vrt.params import load_params
from vrt.stages import CHECKPOINTS, PREPARED
from vrt.stages.lineage import lineage_of


class Trained:
    """A workspace with registered checkpoints, both places where they are, and the command line on top of it."""

    def __init__(self, workspace, home: Path, capsys, caplog):
        self.workspace, self._capsys, self._caplog = workspace, capsys, caplog
        self._lineage = lineage_of(load_params(Path("params.yaml")), PreparedData.open(PREPARED))
        self.local = CHECKPOINTS / self._lineage.id
        self.registry = Curator(self._lineage)
        self.registry.open({}, {})
        self.address = self.registry.checkpoints_address
        self.s3 = S3Store(self.address)
        self.store = home / "services/s3" / self.address.removeprefix("s3://")

    def register(self, step: int) -> None:
        folder = self.commit(step)
        manifest = folder.manifest(step)
        self.registry.register(manifest, self.s3.publish(manifest, folder.path), folder.path)

    def commit(self, step: int, word: str = "") -> CheckpointFolder:
        folder = CheckpointFolder(self.local)
        folder.prepare()
        contents = {
            part: lambda file, part=part: file.write(f"{part} of {step}{word}".encode() * 1000) for part in ("G.pth", "E.pth", "optimizerG.pth")
        }
        folder.commit(step, contents, lambda files: Manifest(self._lineage.id, step, files, {"val/psnr": 30.0}, {}, {"created": "today"}))
        return folder

    def run(self, *arguments: object, code: int = EXIT_DONE) -> str:
        """All that the command prints and logs."""
        self._capsys.readouterr()
        self._caplog.clear()
        args = parser().parse_args(["checkpoints", *map(str, arguments)])
        try:
            ended, error = args.run(args), ""
        except ValueError as raised:
            ended, error = EXIT_BAD_INPUT, str(raised)
        said = self._capsys.readouterr().out
        assert ended == code, said + error
        return said if "--json" in arguments else said + error + self._caplog.text

    def asked(self, *arguments: object, code: int = EXIT_DONE) -> list[dict]:
        return json.loads(self.run(*arguments, "--json", code=code))["checkpoints"]

    def sides(self, code: int) -> dict[int, tuple[str, str, str]]:
        return {row["step"]: (row["local"], row["store"], row["registry"]) for row in self.asked("verify", code=code)}


HEALTHY = ("healthy", "healthy", "registered")


@pytest.fixture
def trained(make_workspace, services, local_services, monkeypatch, capsys, caplog) -> Trained:
    workspace = make_workspace("desk")
    workspace.edit(checkpoints__keep_last=9)
    monkeypatch.chdir(workspace.root)
    caplog.set_level("INFO")
    trained = Trained(workspace, local_services.home, capsys, caplog)
    for step in (4, 8, 12):
        trained.register(step)
    return trained


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_is_damaged_or_missing_on_one_side_is_told_and_restored_from_the_other(trained):
    assert trained.sides(EXIT_DONE) == {12: HEALTHY, 8: HEALTHY, 4: HEALTHY}
    original = {path: path.read_bytes() for path in [*trained.local.glob("*_G.pth"), *trained.store.rglob("*_*.*")]}
    flip(trained.local / "12_G.pth")
    (trained.local / "8_G.pth").unlink()
    flip(trained.store / "00000004" / "4_E.pth")

    assert trained.sides(EXIT_FAILED) == {
        12: ("damaged", "healthy", "registered"),
        8: ("damaged", "healthy", "registered"),
        4: ("healthy", "damaged", "registered"),
    }
    told = trained.run("verify", code=EXIT_FAILED)
    assert "local: 12_G.pth has other content than the manifest says" in told and "local: 8_G.pth is missing" in told
    assert "store: 4_E.pth has other content" in told and "`vrt checkpoints repair` mends" in told
    assert "restore the local files from the store" in trained.run("repair", "--dry-run")
    assert trained.sides(EXIT_FAILED)[8] == ("damaged", "healthy", "registered"), "a dry run changes nothing"
    trained.run("repair")
    assert trained.sides(EXIT_DONE) == {12: HEALTHY, 8: HEALTHY, 4: HEALTHY}
    assert all(path.read_bytes() == content for path, content in original.items())

    for path in trained.local.glob("8_*"):
        path.unlink()
    trained.s3.delete(f"{trained.address}/00000004")
    flip(trained.local / "12_G.pth")
    flip(trained.store / "00000012" / "12_E.pth")
    sides = trained.sides(EXIT_FAILED)
    assert sides == {12: ("damaged", "damaged", "registered"), 8: ("missing", "healthy", "registered"), 4: ("healthy", "missing", "registered")}
    told = trained.run("repair", code=EXIT_FAILED)
    assert "step 12 is beyond repair: no side is healthy" in told and "`vrt checkpoints prune --step 12` deletes what is left" in " ".join(
        told.split()
    )
    trained.run("prune", "--step", 12)
    assert trained.sides(EXIT_DONE) == {8: HEALTHY, 4: HEALTHY}


def test_what_is_fetched_is_what_is_registered(trained):
    registered = (trained.local / "8_G.pth").read_bytes()
    # Trained here, but registered from elsewhere.
    folder = trained.commit(8, "other")
    assert not folder.problems(8, folder.path.name) and (trained.local / "8_G.pth").read_bytes() != registered
    trained.run("fetch", 8)
    assert (trained.local / "8_G.pth").read_bytes() == registered


def test_what_is_pinned_stays_and_what_the_params_do_not_keep_goes_on_every_side(trained):
    trained.run("pin", 4)
    trained.workspace.edit(checkpoints__keep_last=1, checkpoints__keep_best=0)
    dry = trained.asked("prune", "--dry-run")
    assert [(row["step"], row["what"], row["because"]) for row in dry] == [
        (12, "kept", "the last"),
        (8, "would be deleted", ""),
        (4, "kept", "pinned"),
    ]
    assert [row["step"] for row in trained.asked("list")] == [12, 8, 4]
    trained.run("prune")
    assert trained.sides(EXIT_DONE) == {12: HEALTHY, 4: HEALTHY}
    assert list(trained.local.glob("8_*")) == [] and not list((trained.store / "00000008").glob("*"))
    assert set(trained.s3.published()) == {4, 12}
    trained.run("unpin", 4)
    trained.run("prune")
    assert trained.sides(EXIT_DONE) == {12: HEALTHY}
    for arguments in (("--step", 12), ("--after", 12), ()):
        trained.run("prune", *arguments, code=EXIT_BAD_INPUT if "--step" in arguments else EXIT_DONE)
    assert trained.sides(EXIT_DONE) == {12: HEALTHY}


def test_what_an_interrupted_trainer_left_unregistered_is_told_and_registered(trained):
    trained.commit(16)
    folder = trained.commit(20)
    trained.s3.publish(folder.manifest(20), folder.path)
    folder.delete(20)
    assert trained.sides(EXIT_FAILED) == {
        20: ("missing", "healthy", "unregistered"),
        16: ("healthy", "missing", "unregistered"),
        **dict.fromkeys((12, 8, 4), HEALTHY),
    }
    trained.run("prune")
    assert [row["step"] for row in trained.asked("list")] == [20, 16, 12, 8, 4], "what is not registered may be the only copy"
    trained.run("repair")
    assert trained.sides(EXIT_DONE) == dict.fromkeys((20, 16, 12, 8, 4), HEALTHY)
    trained.run("prune", "--after", 12)
    assert trained.sides(EXIT_DONE) == dict.fromkeys((12, 8, 4), HEALTHY)


def test_an_empty_machine_has_no_problem_and_fetches_what_it_is_asked_for(trained, tmp_path):
    trained.local.rename(tmp_path / "elsewhere")
    lineage = trained.local.name
    (trained.workspace.root / "params.yaml").unlink()
    rows = trained.asked("verify", "--lineage", lineage)
    assert [(row["local"], row["store"], row["problems"]) for row in rows] == [("missing", "healthy", [])] * 3
    trained.run("fetch", "--lineage", lineage)
    trained.run("fetch", 4, "--lineage", lineage, "--to", tmp_path / "there")
    for path, step in ((trained.local, 12), (tmp_path / "there", 4)):
        assert {one.name: one.read_bytes() for one in path.glob(f"{step}_*")} == {
            one.name: one.read_bytes() for one in (tmp_path / "elsewhere").glob(f"{step}_*")
        }
    assert f"step 4 is complete in {tmp_path / 'there'} already" in trained.run("fetch", 4, "--lineage", lineage, "--to", tmp_path / "there")


def test_bad_input_names_what_there_is(trained):
    assert "there is no step 5; found: 12, 8, 4" in trained.run("show", 5, code=EXIT_BAD_INPUT)
    assert "step 5 is not registered" in trained.run("pin", 5, code=EXIT_BAD_INPUT)
    typo = trained.local.name[:-1] + "x"
    told = trained.run("list", "--lineage", typo, code=EXIT_BAD_INPUT)
    assert f"there is no lineage {typo} with checkpoints; did you mean {trained.local.name}?" in told
    shown = json.loads(trained.run("show", 12, "--json"))
    assert shown["step"] == 12 and [file["name"] for file in shown["files"]] == ["12_G.pth", "12_E.pth", "12_optimizerG.pth"]
    assert "12_optimizerG.pth" in trained.run("show", 12)
