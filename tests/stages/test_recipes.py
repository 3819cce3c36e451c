"""The nine published trainings: each recipe is the published network, and trains and is evaluated on its data set as that unpacks."""

import json
import logging
import lzma
import re
from pathlib import Path

import pytest
import torch

from vrt import cli
from vrt.data.importing import import_dataset
from vrt.data.loading import training_batches
from vrt.data.prepare import prepare
from vrt.data.sampler import window_frames
from vrt.evaluation.run import evaluate
from vrt.observe import log
from vrt.params import Params, flatten, load_params
from vrt.stages.recipes import RECIPES, find_recipe, outline
from vrt.training.loop import take_step
from vrt.training.session import build_state
from vrt.typed_yaml import parse, read_yaml

TASKS = [f"{number:03}" for number in range(1, 10)]
LAYOUTS = Path(__file__).parents[1] / "fixtures" / "layouts"


@pytest.fixture
def log_lines(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the commands say to their user, as it is said."""
    lines: list[str] = []
    caplog.set_level(logging.INFO, log.name)
    monkeypatch.setattr(log, "handle", lambda record: lines.append(record.getMessage()))
    return lines


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def published(task: str) -> dict:
    return json.loads(lzma.decompress((LAYOUTS / f"{task}.json.xz").read_bytes()))


def shrunk(recipe: Path) -> Params:
    """The recipe with the least widths, depths, crop and tiles; frames, windows in time, task, data set and training as they are."""
    tree = read_yaml(recipe)
    network, train = tree["network"], tree["train"]
    reach = network["pa_frames"] // 2
    crop = 8 * network["upscale"]
    network |= {"depths": [2, 1, 1, 1, 1, 1, 1, 1], "embed_dims": [12] * 8, "num_heads": [2] * 8, "deformable_groups": 2 * reach}
    network |= {"indep_reconsts": [7] if network["indep_reconsts"] else [], "img_size": [network["img_size"][0], 8, 8]}
    network["window_size"] = [network["window_size"][0], 4, 4]
    train |= {"total_steps": 2, "batch_size": 2, "crop": crop, "validate_every": 2, "checkpoint_every": 2, "threads": 1}
    tree["data"]["workers"] = 0
    tree["optimizer"]["flow_frozen_steps"] = min(1, tree["optimizer"]["flow_frozen_steps"])
    tree["evaluate"] |= {"tile": [tree["evaluate"]["tile"][0], 16, 16], "overlap": [tree["evaluate"]["overlap"][0], 4, 4]}
    return parse(Params, tree, recipe)


@pytest.mark.parametrize("task", TASKS)
def test_the_network_of_a_recipe_is_the_published_one(task: str):
    network, layout = outline(load_params(find_recipe(task)).network), published(task)
    found = [[key, list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in network.state_dict().items()]
    assert found == [row[:3] for row in layout["state_dict"]]
    assert sum(parameter.numel() for parameter in network.parameters()) == layout["total_parameters"]
    blocks = {name: [list(block.window), list(block.shift), block.mutual] for name, block in network.named_modules() if name in layout["blocks"]}
    assert blocks == layout["blocks"]
    assert {name: network.get_submodule(name).drop_path for name in layout["drop_path"]} == pytest.approx(layout["drop_path"], abs=1e-8)


@pytest.mark.parametrize("task", TASKS)
def test_the_training_of_a_recipe_is_the_published_one(task: str):
    params, arguments = load_params(find_recipe(task)), published(task)["constructor_args"]
    optimizer, train = params.optimizer, params.train
    assert (optimizer.lr, optimizer.lr_min, optimizer.lr_period, optimizer.betas) == (4e-4, 1e-7, 300_000, (0.9, 0.99))
    assert (train.total_steps, train.batch_size, train.ema_decay, optimizer.charbonnier_eps) == (300_000, 8, 0.999, 1e-9)
    assert train.crop == {4: 256, 1: 192}[params.network.upscale]
    assert (train.frames, train.crop // params.network.upscale) == (arguments["img_size"][0], arguments["img_size"][1])
    assert train.mirrored_frames == (1 if task in ("003", "004") else 0)
    if task == "009":
        assert optimizer.flow_names == ()
    else:
        assert (optimizer.flow_names, optimizer.flow_lr_scale, optimizer.flow_frozen_steps) == (("spynet", "deform"), 0.125, 20_000)


@pytest.mark.parametrize("task", TASKS)
def test_a_recipe_trains_and_is_evaluated_on_its_data_set_as_that_unpacks(task: str, published_copy, tmp_path: Path):
    recipe = find_recipe(task)
    params = shrunk(recipe)
    size = (36, 44) if params.network.upscale == 4 else (18, 22)
    command = re.search(r"vrt data import \S+ --name (\S+) --layout (\S+)", recipe.read_text())
    assert command and command[1] == params.data.dataset
    raw = import_dataset(published_copy(command[2], window_frames(params), size), command[1], tmp_path / "raw", command[2])
    data = prepare(raw, tmp_path / "prepared")

    state = build_state(params, torch.device("cpu"))
    with torch.no_grad():
        # The published initialisation is for a hundred channels; with twelve no gradient comes through.
        for module in state.network.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(10)
    for step, batch in training_batches(data, params, 1, 2):
        assert batch.degraded.shape[1] == params.train.frames
        loss, _ = take_step(params, state, step, batch)
        assert loss.isfinite()
    # Not every parameter: what is initialised to zero holds back the gradient of what comes before it.
    learning = {name.split(".")[0] for name, parameter in state.network.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert learning == {name.split(".")[0] for name, _ in state.network.named_parameters()}
    for split in ("val", "test"):
        evaluation = evaluate(state.released, data, params, split, limit=2)
        assert [row.name for row in evaluation.rows] == [clip.name for clip in data.clips(split)][:2]
        assert 0 < evaluation.means.restored.psnr < 60 and 0 < evaluation.means.input.psnr < 60


@pytest.mark.parametrize("task", TASKS)
def test_init_writes_a_recipe_by_its_number_or_name(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    name = next(path.stem for path in RECIPES.glob(f"{task}_*"))
    assert cli.main(["init", "--recipe", task]) == 0
    assert cli.main(["init", "--recipe", name, "--params", "again.yaml"]) == 0
    assert (tmp_path / "params.yaml").read_bytes() == (tmp_path / "again.yaml").read_bytes() == (RECIPES / f"{name}.yaml").read_bytes()


def test_init_tells_how_to_bring_in_the_data_set_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "--recipe", "006"]) == 0
    assert "next: `vrt data import YOUR_COPY --name gopro --layout gopro` (params.yaml says what that copy holds), then dvc repro" in log_lines[-1]
    (tmp_path / "data/raw/gopro").mkdir(parents=True)
    (tmp_path / "data/raw/gopro/dataset.yaml").touch()
    assert cli.main(["init", "--recipe", "006", "--params", "other.yaml"]) == 0
    assert log_lines[-1] == "other.yaml: recipe 006_videodeblurring_GoPro; next: dvc repro"


@pytest.mark.parametrize(
    "name, expected",
    [
        ("00", "recipe '00': could be any of: 001_videosr_bi_REDS_6frames, 002_"),
        ("010", "recipe '010': not found in "),
        ("", "recipe '': not found in "),
        ("../recipes/quickstart", "there are: 001_videosr_bi_REDS_6frames, "),
    ],
)
def test_a_recipe_that_is_none_or_several_is_refused_with_those_there_are(name: str, expected: str, tmp_path: Path, log_lines):
    assert cli.main(["init", "--recipe", name, "--params", str(tmp_path / "params.yaml")]) == 2
    assert expected in log_lines[-1]
    assert not (tmp_path / "params.yaml").exists()


def test_recipes_lists_every_recipe_and_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert re.search(r"006 .* Deblurring .* gopro .* 6x192x192 .* 18.3 M .* 300,000", shown)
    assert re.search(r"001 .* reds .* 6x64x64 .* 30.7 M", shown)
    assert re.search(r"gopro .* 006 .* \{train,test\}/CLIP/\{blur,sharp\}/... .* no", shown)


def test_recipes_as_json_for_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/raw/reds").mkdir(parents=True)
    (tmp_path / "data/raw/reds/dataset.yaml").touch()
    assert cli.main(["recipes", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == [path.stem for path in sorted(RECIPES.glob("*.yaml"))]
    assert {name[:3]: row["parameters"] for name, row in rows.items() if name[:3] in TASKS} == {
        task: published(task)["total_parameters"] for task in TASKS
    }
    nine = rows["009_videofi_Vimeo_4frames"]
    assert (nine["dataset"], nine["frames"], nine["side"], nine["batch_size"], nine["steps"]) == ("vimeo", 4, 192, 8, 300_000)
    assert (nine["dataset_here"], nine["data_import"]) == (False, "vrt data import YOUR_COPY --name vimeo --layout vimeo")
    assert (rows["001_videosr_bi_REDS_6frames"]["dataset_here"], rows["001_videosr_bi_REDS_6frames"]["data_import"]) == (True, None)
    assert "sep_trainlist.txt" in nine["data_folders"]


@pytest.mark.long
@pytest.mark.parametrize("task", ["006", "009"])
def test_the_commands_that_a_recipe_names_lead_to_its_results(task: str, make_workspace, published_copy):
    workspace = make_workspace(f"recipe{task}")
    params = shrunk(find_recipe(task))
    (workspace.root / "params.yaml").unlink()
    assert workspace.vrt("init", "--recipe", task).returncode == 0
    _, _, _, *importing = re.search(r"vrt data import \S+ --name \S+ --layout \S+", (workspace.root / "params.yaml").read_text())[0].split()
    copy = published_copy(params.data.dataset, window_frames(params), (18, 22))
    ended = workspace.vrt("data", "import", str(copy), *importing[1:])
    assert ended.returncode == 0 and f"set data.dataset: {params.data.dataset} in params.yaml" in ended.stdout, ended.stdout
    workspace.edit(**{key.replace(".", "__"): value for key, value in flatten(params.model_dump(mode="json")).items() if key != "name"})
    for command in ("prepare", "train", "evaluate"):
        ended = workspace.vrt(command)
        assert ended.returncode == 0, ended.stdout
    assert "dB PSNR" in ended.stdout and "Evaluation of split test" in ended.stdout
