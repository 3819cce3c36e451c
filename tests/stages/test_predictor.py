"""A registered checkpoint as people use it who know MLflow and nothing of this project."""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from vrt.checkpoint.manifest import FileEntry, Manifest
from vrt.evaluation.tiling import AnySize, restore
from vrt.params import Bicubic, load_params
from vrt.serving import _load_pyfunc
from vrt.stages.evaluate import load_model
from vrt.stages.predictor import predictor_files
from vrt.stages.recipes import RECIPES
from vrt.training.session import build_network

# -I: neither the folder it is started in nor PYTHONPATH, and so nothing of the project, can be imported.
STRANGER = """
import sys, numpy
sys.path = [path for path in sys.path if not path.endswith("main")]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
import vrt
assert "code.zip" in vrt.__file__, vrt.__file__
print(model.metadata.signature)
numpy.save(sys.argv[4], model.predict(numpy.load(sys.argv[3])))
"""


def test_a_version_restores_a_clip_where_nothing_of_this_project_is_installed(make_workspace, tmp_path, monkeypatch):
    workspace = make_workspace("predict")
    workspace.edit(train__total_steps=1)
    trained = workspace.vrt("train")
    assert trained.returncode == 0, trained.stdout
    clip = np.random.default_rng(1).random((3, 21, 24, 3), np.float32)
    np.save(tmp_path / "clip.npy", clip)
    arguments = [workspace.environment["MLFLOW_TRACKING_URI"], f"models:/vrt-{workspace.name}@latest-step", "clip.npy", "restored.npy"]
    environment = {key: value for key, value in workspace.environment.items() if key != "PYTHONPATH"}
    ended = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "Tensor('float32', (-1, -1, -1, 3))" in ended.stdout

    monkeypatch.chdir(workspace.root)
    params = load_params(Path("params.yaml"))
    network, _ = load_model(params)
    given = torch.from_numpy(clip).permute(0, 3, 1, 2)[None]
    expected = restore(AnySize(network, 1), given, params.evaluate.tile, params.evaluate.overlap, 1)[0].clamp(0, 1).permute(0, 2, 3, 1)
    assert np.allclose(np.load(tmp_path / "restored.npy"), expected.numpy(), atol=1e-6)


@pytest.fixture
def published(tmp_path, tiny_network):
    """Writes what a checkpoint of a tiny network has in the store, as far as a predictor needs it."""

    def write(**network):
        params = load_params(RECIPES / "quickstart.yaml")
        settings = params.network.model_copy(update=tiny_network | network)
        degradation = Bicubic(kind="bicubic", scale=4) if settings.upscale == 4 else params.degradation
        params = params.model_copy(update={"network": settings, "degradation": degradation})
        torch.manual_seed(0)
        torch.save(build_network(params.network).state_dict(), tmp_path / "1_G.pth")
        content = (tmp_path / "1_G.pth").read_bytes()
        entry = FileEntry("1_G.pth", len(content), hashlib.sha256(content).hexdigest())
        for name, data in predictor_files(params)(Manifest("tiny-1", 1, (entry,), {}, {}, {})).items():
            (tmp_path / name).write_bytes(data)
        return tmp_path

    return write


@pytest.fixture
def tiny_network():
    return {
        "img_size": (2, 16, 16),
        "window_size": (2, 4, 4),
        "depths": (1,) * 8,
        "indep_reconsts": (7,),
        "embed_dims": (8,) * 8,
        "num_heads": (2,) * 8,
        "deformable_groups": 2,
    }


def test_super_resolution_gives_four_times_the_size_and_values_from_0_to_1(published):
    predictor = _load_pyfunc(str(published(upscale=4)))
    restored = predictor.predict(np.random.default_rng(0).random((1, 16, 20, 3), np.float32))
    assert restored.shape == (1, 64, 80, 3) and restored.dtype == np.float32
    assert restored.min() >= 0 and restored.max() <= 1


def test_a_network_that_wants_to_know_the_noise_is_told(published):
    folder = published(nonblind_denoising=True)
    (told,) = json.loads(json.loads((folder / "MLmodel").read_text())["signature"]["params"])
    assert (told["name"], told["default"]) == ("sigma", 30.0)
    predictor, clip = _load_pyfunc(str(folder)), np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
    assert np.array_equal(predictor.predict(clip), predictor.predict(clip, {"sigma": 30.0}))
    assert not np.array_equal(predictor.predict(clip), predictor.predict(clip, {"sigma": 5.0}))


def test_the_frames_in_between_are_made(published):
    predictor = _load_pyfunc(str(published(pa_frames=0, deformable_groups=0)))
    assert predictor.predict(np.zeros((4, 16, 16, 3), np.float32)).shape == (3, 16, 16, 3)
    with pytest.raises(ValueError, match=r"clip: expected frames x height x width x 3 with at least 2 frames, .* found shape \(1, 16, 16, 3\)"):
        predictor.predict(np.zeros((1, 16, 16, 3), np.float32))


def test_weights_that_are_not_those_registered_are_refused(published):
    folder = published()
    with (folder / "1_G.pth").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="1_G.pth: expected SHA-256 .* it was changed or cut; download it again"):
        _load_pyfunc(str(folder))


def test_the_shipped_code_is_the_same_every_time(published):
    first = (published() / "code.zip").read_bytes()
    assert (published() / "code.zip").read_bytes() == first
    with zipfile.ZipFile(published() / "code.zip") as archive:
        assert "vrt/params.py" not in archive.namelist()
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}, "a date would make it differ from second to second"
