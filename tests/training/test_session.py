"""From files to a state that trains on: our own checkpoints, and those that KAIR wrote."""

import inspect
import json
from pathlib import Path

import pytest
import torch

from vrt.checkpoint.errors import CheckpointError
from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.manifest import Manifest
from vrt.checkpoint.saver import Saver
from vrt.checkpoint.serialize import load, load_network
from vrt.data.sampler import Batch
from vrt.model.network import VRT
from vrt.params import Optimizer, Params
from vrt.training.ema import copy_for_ema
from vrt.training.history import History
from vrt.training.loop import TrainingState, take_step
from vrt.training.optim import make_optimizer
from vrt.training.session import SnapshotSink, load_fitting, restore

# Written by KAIR's own code at step 20 of a small training (lr 4e-4, one group at an eighth); reference.pt tells what step 21 then does.
KAIR = Path(__file__).resolve().parents[1] / "fixtures" / "kair_checkpoints"


@pytest.fixture(scope="module")
def reference() -> dict:
    return torch.load(KAIR / "reference.pt", weights_only=True)


@pytest.fixture
def kair_params(params: Params, reference: dict) -> Params:
    theirs = json.loads(reference["opt_json"])["train"]
    optimizer = Optimizer(
        lr=theirs["G_optimizer_lr"],
        lr_min=theirs["G_scheduler_eta_min"],
        lr_period=theirs["G_scheduler_periods"],
        betas=tuple(theirs["G_optimizer_betas"]),
        charbonnier_eps=theirs["G_charbonnier_eps"],
        # Their other name, "deform", matches nothing in this network; KAIR does not mind.
        flow_names=("stage8",),
        flow_lr_scale=theirs["fix_lr_mul"],
        # KAIR's groups start to train at this step, not after it.
        flow_frozen_steps=theirs["fix_iter"] - 1,
    )
    return params.model_copy(update={"optimizer": optimizer, "train": params.train.model_copy(update={"ema_decay": theirs["E_decay"]})})


@pytest.fixture
def kair_state(reference: dict, kair_params: Params) -> TrainingState:
    """A network of KAIR's configuration before step 1."""
    theirs = json.loads(reference["opt_json"])["netG"]
    ours = {key: value for key, value in theirs.items() if key in inspect.signature(VRT).parameters}
    network = VRT(**ours, drop_path_rate=0.0)
    return TrainingState(network, copy_for_ema(network), make_optimizer(network, kair_params.optimizer), History(), 0)


@pytest.mark.parametrize("file, expected", [("20_G.pth", "out_G20"), ("20_E.pth", "out_E20")])
def test_kairs_weights_restore_what_they_restored_there(kair_state, reference, file, expected):
    kair_state.network.load_state_dict(load_fitting(KAIR / file, kair_state.network))
    with torch.no_grad():
        torch.testing.assert_close(kair_state.network.eval()(reference["input"]), reference[expected], rtol=0, atol=5e-5)


def digest(values: torch.Tensor) -> dict[str, float]:
    """As the fixture has it; the probe tells the order of the values."""
    flat = values.detach().double().flatten()
    probe = flat @ torch.sin(0.37 * torch.arange(len(flat), dtype=torch.float64) + 1)
    return {"sum": flat.sum().item(), "abs_sum": flat.abs().sum().item(), "l2": flat.norm().item(), "probe": probe.item()}


def test_a_training_that_kair_began_goes_on_as_it_did_there(kair_state, kair_params, reference, tmp_path):
    # KAIR keeps no history and no manifest; with them its three files are a checkpoint of ours.
    contents = {name: (KAIR / f"20_{name}").read_bytes() for name in ("G.pth", "E.pth", "optimizerG.pth")} | {"history.jsonl": b""}
    folder = CheckpointFolder(tmp_path / "checkpoints")
    folder.prepare()
    writers = {name: lambda file, content=content: file.write(content) for name, content in contents.items()}
    manifest = folder.commit(20, writers, lambda files: Manifest("kair-1", 20, files, {}, {}, {}))
    restore(kair_state, manifest, folder.path)
    assert kair_state.step == 20
    assert [len(group["params"]) for group in kair_state.optimizer.param_groups] == reference["param_group_sizes"]

    before = {name: value.clone() for name, value in kair_state.ema.named_parameters()}
    loss, lr = take_step(kair_params, kair_state, 21, Batch(reference["batch_L"][21], reference["batch_H"][21]))
    assert loss.item() == pytest.approx(reference["losses"][21], rel=1e-6)
    assert [group["lr"] for group in kair_state.optimizer.param_groups] == pytest.approx(reference["lrs"][21], rel=1e-12)
    assert lr == kair_state.optimizer.param_groups[0]["lr"]
    for name, value in kair_state.network.named_parameters():
        expected = dict(reference["params_after_step21"][name])
        assert list(value.shape) == expected.pop("shape")
        # One step moves a weight by about 1e-3 of its size: this is float rounding in another order of operations.
        assert digest(value) == pytest.approx(expected, abs=1e-5 * expected["abs_sum"]), name
        average = dict(kair_state.ema.named_parameters())[name]
        torch.testing.assert_close(average, 0.999 * before[name] + 0.001 * value, rtol=0, atol=1e-6)
    counts = {int(state["step"]) for state in kair_state.optimizer.state.values()}
    assert counts == {count + 1 for count in reference["adam_step_values"]}


class Published:
    """Stands for the publisher."""

    def publish(self, manifest, started): ...
    def ahead(self, step, file): ...
    def send(self, row): ...


def save(state: TrainingState, path: Path) -> CheckpointFolder:
    """The state as a training saves it."""
    folder, published = CheckpointFolder(path), Published()
    folder.prepare()
    saver = Saver(folder, published)
    SnapshotSink(saver, published, {"lineage": "kair-1", "identity": {}, "origin": {}}).save(state, None)
    saver.wait()
    assert folder.problems(state.step, "kair-1") == []
    return folder


def test_what_is_saved_has_the_form_that_kair_writes_and_reads(kair_state, tmp_path):
    # KAIR's own files in, ours out: the same keys in the same order, the same tensors on the CPU, nothing else.
    for network, name in ((kair_state.network, "20_G.pth"), (kair_state.ema, "20_E.pth")):
        network.load_state_dict(load(KAIR / name))
    kair_state.optimizer.load_state_dict(load(KAIR / "20_optimizerG.pth"))
    kair_state.step = 20
    folder = save(kair_state, tmp_path / "checkpoints")
    for name in ("20_G.pth", "20_E.pth"):
        ours, theirs = load(folder.path / name), load(KAIR / name)
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in theirs)
    ours, theirs = load(folder.path / "20_optimizerG.pth"), load(KAIR / "20_optimizerG.pth")
    assert ours.keys() == theirs.keys() == {"state", "param_groups"}
    assert ours["state"].keys() == theirs["state"].keys()
    for index, moments in theirs["state"].items():
        assert all(torch.equal(ours["state"][index][key], torch.as_tensor(value)) for key, value in moments.items())
    for our_group, their_group in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert {key: our_group[key] for key in their_group} == their_group
    # As KAIR does it: no argument but the file.
    plain = torch.load(folder.path / "20_G.pth")
    assert {tensor.device.type for tensor in plain.values()} == {"cpu"}


def test_without_an_average_there_is_no_file_of_it(fresh, tmp_path):
    state = fresh()
    state.ema, state.step = None, 1
    folder = save(state, tmp_path / "checkpoints")
    assert sorted(path.name for path in folder.path.iterdir()) == ["1_G.pth", "1_history.jsonl", "1_manifest.json", "1_optimizerG.pth"]


def test_kairs_optimizer_is_plain_data():
    optimizer = load(KAIR / "20_optimizerG.pth")
    assert [group["lr"] for group in optimizer["param_groups"]] == pytest.approx([4e-4, 5e-5], rel=1e-6)
    assert len(load_network(KAIR / "20_G.pth")) == 349


def test_weights_of_another_network_are_refused_with_every_key(tmp_path, fresh):
    state = fresh()
    weights = state.network.state_dict()
    weights["flow.weight"] = torch.zeros(3, 3)
    weights["head.bias"] = weights.pop("flow.bias")
    torch.save(weights, tmp_path / "G.pth")
    told = (
        rf"{tmp_path / 'G.pth'}: 3 keys don't fit the network of the params file:\n"
        r"  missing: flow.bias\n  unexpected: head.bias\n  misshapen: flow.weight is \[3, 3\], the network has \[3, 3, 1, 1\]\n"
        "use the params it was trained with"
    )
    with pytest.raises(CheckpointError, match=told):
        load_fitting(tmp_path / "G.pth", state.network)


@pytest.fixture
def trained(params, fresh, attempt, tmp_path):
    return attempt(params, tmp_path / "checkpoints", fresh())


@pytest.mark.parametrize("gone", ["G.pth", "optimizerG.pth", "history.jsonl"])
def test_a_checkpoint_without_a_part_that_is_needed_is_named(trained, fresh, gone):
    manifest = trained.folder.manifest(6)
    without = Manifest(**{**vars(manifest), "files": tuple(file for file in manifest.files if file.name != f"6_{gone}")})
    with pytest.raises(CheckpointError, match=f"step 6: the checkpoint has no {gone}; a training can't continue from it"):
        restore(fresh(), without, trained.folder.path)


def test_an_optimizer_of_another_network_is_refused(trained, fresh, tmp_path):
    torch.save(torch.optim.Adam([torch.zeros(2)]).state_dict(), trained.folder.path / "6_optimizerG.pth")
    with pytest.raises(CheckpointError, match=r"6_optimizerG.pth: no optimizer state of this network \("):
        restore(fresh(), trained.folder.manifest(6), trained.folder.path)
