"""The params file: what it must hold, and what its user is told where it does not."""

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from ruamel.yaml import YAML

import vrt.params
from vrt.params import Params, changes, fingerprint, flatten, load_params, same_training
from vrt.training.session import build_network
from vrt.typed_yaml import ParamsError, Section, read_yaml

PROJECT = Path(__file__).resolve().parents[1]
QUICKSTART = PROJECT / "recipes" / "quickstart.yaml"
RECIPES = sorted((PROJECT / "recipes").glob("*.yaml"))

# Apart from the recipes, whose values may be tuned.
VALID = """
name: small
seed: 1
degradation: {kind: noise, sigma_min: 30, sigma_max: 30, sigma_test: 30}
data: {dataset: small, workers: 0, damaged: stop}
network:
  upscale: 1
  img_size: [6, 48, 48]
  window_size: [6, 8, 8]
  depths: [2, 2, 2, 2, 2, 2, 2, 1, 1]
  indep_reconsts: [8]
  embed_dims: [16, 16, 16, 16, 16, 16, 16, 24, 24]
  num_heads: [2, 2, 2, 2, 2, 2, 2, 2, 2]
  pa_frames: 2
  deformable_groups: 4
  nonblind_denoising: false
  drop_path_rate: 0.1
optimizer:
  lr: 1e-3
  lr_min: 1e-7
  lr_period: 160
  betas: [0.9, 0.99]
  charbonnier_eps: 1e-9
  flow_names: [spynet, deform]
  flow_lr_scale: 0.125
  flow_frozen_steps: 20
train:
  total_steps: 160
  batch_size: 1
  frames: 6
  mirrored_frames: 0
  crop: 64
  ema_decay: 0.98
  deterministic: false
  processes: 1
  clips_at_once: auto
  precision: fp32
  compile: false
  activation_checkpointing: false
  threads: 2
  log_every: 1
  validate_every: 40
  checkpoint_every: 40
checkpoints: {resume: auto, keep_last: 3, keep_every: 0, keep_best: 1, most_failed_saves: 0}
evaluate: {tile: [6, 96, 96], overlap: [2, 16, 16], measured: all}
"""


@pytest.fixture
def written(tmp_path: Path):
    """Writes VALID with some values replaced, by dotted key; the value `None` removes the key."""

    def write(changes: dict[str, Any]) -> Path:
        tree = YAML(typ="safe", pure=True).load(VALID)
        for key, value in changes.items():
            *above, last = key.split(".")
            section = tree
            for name in above:
                section = section[name]
            if value is None:
                del section[last]
            else:
                section[last] = value
        path = tmp_path / "params.yaml"
        with path.open("w") as file:
            YAML(typ="safe", pure=True).dump(tree, file)
        return path

    return write


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(recipe: Path):
    assert load_params(recipe).name == recipe.stem


def test_the_projects_params_state_every_key_of_the_quickstart():
    assert flatten(read_yaml(PROJECT / "params.yaml")).keys() == flatten(read_yaml(QUICKSTART)).keys()


def test_every_key_has_its_sentence():
    sections = [section for section in vars(vrt.params).values() if isinstance(section, type) and issubclass(section, Section)]
    assert len(sections) > 12
    # A section and the kind of a degradation are explained by what their class says of itself.
    by_class = {"kind", *(name for name in Params.model_fields if name not in ("name", "seed"))}
    unexplained = [
        f"{section.__name__}.{name}"
        for section in sections
        for name, field in section.model_fields.items()
        if not field.description and name not in by_class
    ]
    assert unexplained == []


def test_numbers_in_exponent_form_are_numbers(tmp_path: Path):
    # In YAML 1.1, as most Python readers have it, 1e-4 is a string.
    path = tmp_path / "params.yaml"
    path.write_text(VALID.replace("lr: 1e-3", "lr: 1e-4"))
    assert load_params(path).optimizer.lr == 0.0001


def test_params_are_frozen(written):
    params = load_params(written({}))
    with pytest.raises(ValidationError, match="frozen"):
        params.seed = 2
    with pytest.raises(ValidationError, match="frozen"):
        params.train.total_steps = 2


BETWEEN = {
    "degradation": {"kind": "between"},
    **{"network.pa_frames": 0, "network.deformable_groups": 0, "network.img_size": [4, 48, 48]},
    **{"train.frames": 4, "evaluate.overlap": [0, 16, 16]},
}
"""What makes VALID a frame interpolation."""

# One entry per kind of mistake: what is changed in VALID, and all that the message must say.
MISTAKES = {
    "unknown key near a known one": ({"train.batchsize": 1}, ["train.batchsize: found an unknown key, did you mean 'batch_size'?", "total_steps,"]),
    "unknown key near none": ({"zzz": 1}, ["zzz: found an unknown key; allowed here: name, seed, degradation, data"]),
    "unknown key of a kind": ({"degradation.sigma": 1}, ["degradation.sigma: found an unknown key", "allowed here: kind, sigma_min"]),
    "missing key": ({"train.crop": None}, ["train.crop: found nothing; expected a value"]),
    "missing section": ({"evaluate": None}, ["evaluate: found nothing; expected a value"]),
    "missing kind": ({"degradation.kind": None}, ["degradation.kind: found nothing; expected one of the kinds"]),
    "wrong kind": ({"degradation.kind": "blur"}, ["degradation:", "'blur'", "'noise', 'bicubic', 'blur_down', 'motion_blur', 'recorded', 'between'"]),
    "an even exposure": (
        {"degradation": {"kind": "motion_blur", "frames": 4}},
        ["frames is 4; expected an odd number, such as 5"],
    ),
    "text for a number": ({"optimizer.lr": "fast"}, ['optimizer.lr: found "fast"; input should be a valid number']),
    "fraction for a count": ({"train.batch_size": 1.5}, ["train.batch_size: found 1.5; input should be a valid integer"]),
    "boolean for a count": ({"seed": True}, ["seed: found true; input should be a valid integer"]),
    "number for a section": ({"evaluate": 5}, ["evaluate: found 5; input should be an object"]),
    "wrong entry of a list": ({"network.depths": [2, 2, "x", 2, 2, 2, 2, 1, 1]}, ['network.depths.2: found "x"; input should be a valid integer']),
    "too small": ({"train.frames": 1}, ["train.frames: found 1; input should be greater than or equal to 2"]),
    "too large": ({"degradation.sigma_max": 256}, ["degradation.sigma_max: found 256; input should be less than or equal to 255"]),
    "infinite": ({"optimizer.lr": float("inf")}, ["optimizer.lr: found Infinity; input should be a finite number"]),
    "a name that leads elsewhere": ({"name": "../else"}, ['name: found "../else"; string should match pattern']),
    "a date": ({"seed": "DATE"}, ["seed: found", "2026-11-24", "integer"]),
    "sigmas crossed": ({"degradation.sigma_min": 31}, ["degradation: sigma_min 31 is above sigma_max 30"]),
    "learning rates crossed": ({"optimizer.lr_min": 0.1}, ["optimizer: lr_min 0.1 is above lr 0.001"]),
    "scale without reduction": ({"network.upscale": 4}, ["network.upscale is 4, but degradation.kind 'noise' reduces by 1; set network.upscale: 1"]),
    "reduction without scale": ({"degradation": {"kind": "bicubic", "scale": 4}}, ["set network.upscale: 4"]),
    "noise level without noise": (
        {"degradation": {"kind": "bicubic", "scale": 4}, "network.upscale": 4, "network.nonblind_denoising": True},
        ["network.nonblind_denoising needs a noise level; set it to false"],
    ),
    "crop and network": ({"train.crop": 60}, ["train.crop 60 is no multiple of 8 ", "such as 64"]),
    "too few stages": ({"network.depths": [2] * 7}, ["network: depths has 7 entries; expected 7 for the body and at least 1"]),
    "widths and stages": ({"network.embed_dims": [16] * 8}, ["embed_dims has 8 entries; expected 9, one per entry of depths"]),
    "heads and stages": ({"network.num_heads": [2] * 8}, ["num_heads has 8 entries; expected 9, one per entry of depths"]),
    "heads and width": ({"network.num_heads": [2, 3] + [2] * 7}, ["embed_dims[1] = 16 does not divide into num_heads[1] = 3"]),
    "groups and width": ({"network.deformable_groups": 5}, ["embed_dims[0] = 16 does not divide into deformable_groups = 5"]),
    "width and scales": (
        {"network.embed_dims": [18] * 7 + [24, 24], "network.deformable_groups": 2},
        ["embed_dims[0] = 18 is no multiple of 4"],
    ),
    "a body that is no mirror": (
        {"network.embed_dims": [16, 16, 32, 16, 16, 16, 16, 24, 24]},
        ["network: embed_dims[4] = 16 is not embed_dims[2] = 32, whose features are added to it; make them equal"],
    ),
    "an end of another width than the start": (
        {"network.embed_dims": [16, 16, 16, 16, 16, 16, 32, 24, 24]},
        ["network: embed_dims[6] = 32 is not embed_dims[0] = 16, whose features are added to it; make them equal"],
    ),
    "reconstruction groups of two widths": (
        {"network.embed_dims": [16] * 7 + [24, 32]},
        ["network: embed_dims[8] = 32 is not embed_dims[7] = 24, but all reconstruction groups are equally wide; make them equal"],
    ),
    "a noise level without alignment": (
        {**BETWEEN, "network.nonblind_denoising": True},
        ["network: nonblind_denoising is true, but pa_frames 0 takes RGB alone; set it to false"],
    ),
    "groups without alignment": (
        {"degradation": {"kind": "between"}, "network.pa_frames": 0},
        ["network: deformable_groups is 4, but pa_frames 0 aligns nothing; set deformable_groups: 0"],
    ),
    "alignment without groups": (
        {"network.deformable_groups": 0},
        ["deformable_groups 0 is no multiple of 1 (half of pa_frames 2); choose one, such as 4"],
    ),
    "groups and neighbours": (
        {"network.pa_frames": 4, "network.deformable_groups": 3},
        ["deformable_groups 3 is no multiple of 2 (half of pa_frames 4)"],
    ),
    "groups, neighbours and width": (
        {"network.pa_frames": 4, "network.deformable_groups": 6},
        ["embed_dims[0] = 16 x 2 frames on a side does not divide into deformable_groups = 6"],
    ),
    "width and neighbours": (
        {"network.pa_frames": 6, "network.deformable_groups": 6},
        ["embed_dims[0] = 16 is no multiple of 3 (half of pa_frames 6)"],
    ),
    "an odd number of neighbours": ({"network.pa_frames": 3}, ["network.pa_frames: found 3; input should be 0, 2, 4 or 6"]),
    "enlarging without alignment": (
        {**BETWEEN, "degradation": {"kind": "bicubic", "scale": 4}, "network.upscale": 4},
        ["network: upscale is 4, but pa_frames 0 makes frames of the input's size; set upscale: 1"],
    ),
    "interpolation by a network that aligns": (
        {"degradation": {"kind": "between"}},
        ["network.pa_frames is 2, but degradation.kind 'between' needs a network that makes frames; set network.pa_frames: 0"],
    ),
    "restoration by a network that interpolates": (
        {**BETWEEN, "degradation": {"kind": "recorded"}},
        ["network.pa_frames is 0, which makes frames in between, but degradation.kind is 'recorded'; set network.pa_frames to 2, 4 or 6"],
    ),
    "interpolation from an odd number": (
        {**BETWEEN, "train.frames": 5, "network.img_size": [5, 48, 48]},
        ["train.frames is 5 and network.img_size[0] 5"],
    ),
    "interpolation from another number": (
        {**BETWEEN, "train.frames": 6},
        ["train.frames is 6 and network.img_size[0] 4", "the same even number, such as 4"],
    ),
    "interpolation with overlap in time": (
        {**BETWEEN, "evaluate.overlap": [1, 16, 16]},
        ["train.mirrored_frames is 0 and evaluate.overlap[0] 1", "to 0"],
    ),
    "mostly mirrored": (
        {"train.mirrored_frames": 4},
        ["train: mirrored_frames 4 is more than half of frames 6, which leaves too few to mirror; lower it"],
    ),
    "blur down without scale": (
        {"degradation": {"kind": "blur_down", "scale": 4, "sigma": 1.6}},
        ["network.upscale is 1, but degradation.kind 'blur_down' reduces by 4; set network.upscale: 4"],
    ),
    "blur of nothing": ({"degradation": {"kind": "blur_down", "scale": 4, "sigma": 0}, "network.upscale": 4}, ["degradation.sigma: found 0; input"]),
    "single-frame stage in the body": ({"network.indep_reconsts": [6]}, ["indep_reconsts [6] must name stages 7 to 8"]),
    "overlap and tile": ({"evaluate.overlap": [6, 0, 0]}, ["evaluate: overlap [6, 0, 0] must be smaller than tile [6, 96, 96]"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_its_file_and_its_remedy(mistake: str, written):
    changes, told = MISTAKES[mistake]
    path = written(changes)
    # YAML reads an unquoted date as a date, which only this spelling can produce.
    path.write_text(path.read_text().replace("DATE", "2026-11-24"))
    with pytest.raises(ParamsError) as raised:
        load_params(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: 1 wrong value\n")
    assert [part for part in told if part not in message] == []


@pytest.mark.parametrize("crop", [1, 50, 52, 63, 100, 130])
@pytest.mark.parametrize("scale", [1, 4])
def test_the_crop_that_a_message_proposes_is_accepted(written, crop: int, scale: int):
    reduced = {"degradation": {"kind": "bicubic", "scale": 4}, "network.upscale": 4} if scale == 4 else {}
    with pytest.raises(ParamsError, match=f"train.crop {crop} ") as raised:
        load_params(written(reduced | {"train.crop": crop}))
    proposed = int(re.findall(r"\d+", str(raised.value).splitlines()[-1])[-1])
    assert load_params(written(reduced | {"train.crop": proposed})).train.crop == proposed


def test_all_mistakes_are_told_at_once(written):
    with pytest.raises(ParamsError, match="3 wrong values\n") as raised:
        load_params(written({"seed": -1, "train.crop": None, "evaluate.tiles": 1}))
    assert [line.split(":")[0].strip() for line in str(raised.value).splitlines()[1:]] == ["seed", "train.crop", "evaluate.tiles"]


@pytest.mark.parametrize(
    "content, told",
    [
        (b"seed: {", "not readable as YAML"),
        (b"\xff\xfe\x00", "not readable as YAML"),
        (b"seed: 1\nseed: 2\n", "duplicate key"),
        (b"seed: !!python/object/apply:os.system [exit]", "not readable as YAML"),
        (b"", "found null at the top; expected keys: name, seed"),
        (b"- name\n- seed\n", r'found \["name", "seed"\] at the top; expected keys: name, seed'),
    ],
    ids=["broken", "binary", "key twice", "code", "empty", "list"],
)
def test_what_is_no_params_file_is_refused_by_name(tmp_path: Path, content: bytes, told: str):
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(ParamsError, match=told) as raised:
        load_params(path)
    assert str(path) in str(raised.value)


def test_a_missing_file_is_told_with_the_command_that_writes_one(tmp_path: Path):
    with pytest.raises(ParamsError, match="no such params file; write one with `vrt init --recipe quickstart`"):
        load_params(tmp_path / "params.yaml")


def test_a_folder_is_no_params_file(tmp_path: Path):
    with pytest.raises(ParamsError, match=str(tmp_path)):
        load_params(tmp_path)


# What may change while a training goes on. It is spelled out here again on purpose: a new knob has to be put on one side.
FREE = {
    *("name", "data.workers", "data.damaged", "train.total_steps", "train.deterministic", "train.activation_checkpointing", "train.threads"),
    *("train.log_every", "train.validate_every", "train.checkpoint_every"),
    *("train.processes", "train.clips_at_once", "train.precision", "train.compile"),
    *("checkpoints.resume", "checkpoints.keep_last", "checkpoints.keep_every", "checkpoints.keep_best", "checkpoints.most_failed_saves"),
    *("evaluate.tile", "evaluate.overlap", "evaluate.measured"),
}
# A second legal value for each knob, where adding 1 to a number does not make one.
OTHERS = {
    "name": "another",
    "train.deterministic": True,
    "train.clips_at_once": 1,
    "train.precision": "bf16",
    "train.compile": True,
    "train.activation_checkpointing": True,
    "checkpoints.resume": "must",
    "degradation.sigma_min": 29,
    "data.dataset": "another",
    "data.damaged": "skip",
    "evaluate.measured": "centre",
    "network.depths": [3, 2, 2, 2, 2, 2, 2, 1, 1],
    "network.indep_reconsts": [],
    "network.embed_dims": [32] * 7 + [24, 24],
    "network.num_heads": [4] * 9,
    "network.deformable_groups": 8,
    "network.nonblind_denoising": True,
    "network.drop_path_rate": 0.2,
    "optimizer.lr_min": 1e-6,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.flow_names": ["spynet"],
    "train.crop": 72,
    "train.ema_decay": 0.9,
}
# These can't be changed on their own: the checks across fields, or their one allowed value, forbid it.
COUPLED = {"degradation.kind", "network.upscale", "network.pa_frames"}


def test_what_a_file_says_otherwise_by_now_is_named(tmp_path: Path, written):
    path = tmp_path / "params.yaml"
    shutil.copy2(QUICKSTART, path)
    before = load_params(path)
    assert changes(path, before, Params.model_fields) == []
    path.write_text(path.read_text().replace("total_steps: 160", "total_steps: 400").replace("name: quickstart", "name: mine"))
    assert changes(path, before, Params.model_fields) == ["name: quickstart -> mine", "train.total_steps: 160 -> 400"]
    assert changes(path, before, ["name", "network"]) == ["name: quickstart -> mine"]
    assert not same_training(path, before)
    path.write_text(path.read_text().replace("name: mine", "name: quickstart"))
    assert same_training(path, before)
    path.write_text(path.read_text().replace("dataset: quickstart", "dataset: mine"))
    assert not same_training(path, before)
    path.write_text("name: [")
    assert not same_training(path, before)
    (found,) = changes(path, before, ["network"])
    assert found.startswith(str(path))


def test_each_knob_either_defines_the_training_or_is_free(written):
    params = load_params(written({}))
    tree, before = params.model_dump(mode="json"), fingerprint(params.identity())
    for key, value in flatten(tree).items():
        if key in COUPLED:
            continue
        changed = copy.deepcopy(tree)
        *above, last = key.split(".")
        section = changed
        for name in above:
            section = section[name]
        section[last] = OTHERS[key] if key in OTHERS else [entry + 1 for entry in value] if isinstance(value, list) else value + 1
        assert section[last] != value, key
        after = fingerprint(Params.model_validate_json(json.dumps(changed)).identity())
        assert (after == before) == (key in FREE), key


@pytest.mark.parametrize(
    "changes",
    [
        BETWEEN,
        {"network.pa_frames": 4, "network.deformable_groups": 8},
        {"network.pa_frames": 6, "network.embed_dims": [24] * 9, "network.deformable_groups": 6},
    ],
    ids=["none", "4", "6"],
)
def test_every_number_of_neighbours_that_passes_builds_a_network(written, changes: dict):
    params = load_params(written(changes))
    frames = params.network.img_size[0]
    restored = build_network(params.network)(torch.rand(1, frames, 3, 16, 16))
    assert restored.shape == (1, 1 if changes is BETWEEN else frames, 3, 16, 16)


def test_another_task_is_another_training(written):
    both = load_params(written({"degradation": {"kind": "bicubic", "scale": 4}, "network.upscale": 4})).identity()
    assert {"degradation.kind", "network.upscale", "network.pa_frames"} <= both.keys()
    assert fingerprint(both) != fingerprint(load_params(written({})).identity())


def test_the_fingerprint_depends_on_neither_the_order_of_keys_nor_the_spelling_of_numbers(tmp_path: Path, written):
    tree = YAML(typ="safe", pure=True).load(VALID)
    tree["optimizer"] = dict(reversed(tree["optimizer"].items())) | {"lr": 0.001}
    path = tmp_path / "reordered.yaml"
    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump(dict(reversed(tree.items())), file)
    assert fingerprint(load_params(path).identity()) == fingerprint(load_params(written({})).identity())
