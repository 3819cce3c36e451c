"""Every parameter of a run, typed and frozen: the one reading of `params.yaml` and of the recipes.

No field has a default: a params file states every knob, so what a run did can be read off one page.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, model_validator

from vrt.typed_yaml import ParamsError, Section, parse, read_yaml

Positive = Annotated[int, Field(gt=0)]
FREE = {
    *("name", "data.workers", "data.damaged", "train.total_steps", "train.deterministic", "train.activation_checkpointing", "train.threads"),
    *("train.log_every", "train.validate_every", "train.checkpoint_every"),
    *("train.processes", "train.clips_at_once", "train.precision", "train.compile"),
}
"""What may change under a training without making it another one, beside the sections `checkpoints` and `evaluate`."""
SIDE = 8
"""The network halves its input three times: sides are multiples of this."""
NotNegative = Annotated[int, Field(ge=0)]


class Noise(Section):
    """Additive white Gaussian noise; sigma in grey levels of 0 to 255."""

    kind: Literal["noise"]
    sigma_min: Annotated[float, Field(ge=0, le=255)]
    """Least noise of a training sample."""
    sigma_max: Annotated[float, Field(ge=0, le=255)]
    """Most noise of a training sample; each sample draws its own level evenly in between."""
    sigma_test: Annotated[float, Field(ge=0, le=255)]
    """Noise of the validation and test clips."""

    @model_validator(mode="after")
    def _ordered(self) -> "Noise":
        if self.sigma_min > self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min:g} is above sigma_max {self.sigma_max:g}; lower the one or raise the other")
        return self


class Bicubic(Section):
    """Bicubic reduction with anti-aliasing: x4 super-resolution ("BI" in the papers)."""

    kind: Literal["bicubic"]
    scale: Literal[4]
    """How many times shorter the sides of the input are than those of the ground truth."""


class BlurDown(Section):
    """Gaussian blur, then one pixel of each block: x4 super-resolution ("BD" in the papers)."""

    kind: Literal["blur_down"]
    scale: Literal[4]
    """How many times shorter the sides of the input are than those of the ground truth."""
    sigma: Annotated[float, Field(gt=0, le=8)]
    """Standard deviation of the blur in pixels of the ground truth; 1.6 in the papers."""


class MotionBlur(Section):
    """Deblurring from sharp frames alone: the mean of consecutive frames of a fast camera, to be restored to the middle one."""

    kind: Literal["motion_blur"]
    frames: Annotated[int, Field(ge=3)]
    """Sharp frames that one blurred frame is the mean of; odd, so that one is in the middle. 7 to 13 in the published sets, at 240 per second."""

    @model_validator(mode="after")
    def _odd(self) -> "MotionBlur":
        if self.frames % 2 == 0:
            raise ValueError(f"frames is {self.frames}; expected an odd number, such as {self.frames + 1}: the truth is the frame in the middle")
        return self


class Recorded(Section):
    """The degraded frames are part of the data set, beside the sharp ones: deblurring, and whatever else a camera did."""

    kind: Literal["recorded"]


class Between(Section):
    """Frame interpolation: of consecutive frames the network gets every second one and makes the one in the middle, which it never saw."""

    kind: Literal["between"]


Degradation = Annotated[Noise | Bicubic | BlurDown | MotionBlur | Recorded | Between, Field(discriminator="kind")]


class Data(Section):
    """Which clips, and how they come to the trainer."""

    dataset: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The folder below `data/raw/`, made by `vrt data import` or shipped (`quickstart`)."""
    workers: NotNegative
    """Processes that load samples beside the trainer; 0 loads in the trainer itself. Changes no result."""
    damaged: Literal["stop", "skip"]
    """What happens where a clip can't be read: `stop` the training, or `skip` it, draw another in its place, and count them in the
    metric `data/skipped`."""


class Network(Section):
    """Keyword arguments of `vrt.model.network.VRT`, under the names the published training files use."""

    upscale: Literal[1, 4]
    """How many times longer the sides of the output are than those of the input: 4 for super-resolution, else 1."""
    img_size: tuple[Positive, Positive, Positive]
    """Frames, height and width of the published training's input, no limit to what is restored. Height and width change no result.
    A clip of fewer frames is continued by its own, backwards, when it is evaluated; with pa_frames 0 a frame is made of that many."""
    window_size: tuple[Positive, Positive, Positive]
    """Frames, height and width, in pixels of each stage's own scale, of the windows within which tokens attend to one another.
    Mutual attention looks at pairs of frames, whatever the first number."""
    depths: tuple[Positive, ...]
    """Blocks per stage: seven for the U-shaped body, the rest for the reconstruction groups."""
    indep_reconsts: tuple[NotNegative, ...]
    """Stages (counted over all of `depths`) whose windows span a single frame."""
    embed_dims: tuple[Positive, ...]
    """Channels per stage, one entry per entry of `depths`: multiples of the stage's heads, in the body also of 4 and of `pa_frames` / 2.
    Stages of the body that have one scale are equally wide, and so are all reconstruction groups."""
    num_heads: tuple[Positive, ...]
    """Attention heads per stage, one entry per entry of `depths`; they share the channels evenly."""
    pa_frames: Literal[0, 2, 4, 6]
    """Neighbour frames aligned to each frame, on both sides together; 0: none, as for frame interpolation."""
    deformable_groups: NotNegative
    """Groups of channels that the alignment moves apart from one another; 0 with pa_frames 0, which aligns nothing."""
    nonblind_denoising: bool
    """Take the noise level as a fourth input channel; not with pa_frames 0."""
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)]
    """Stochastic depth of the last block; it rises linearly from 0."""

    @model_validator(mode="after")
    def _consistent(self) -> "Network":
        stages = len(self.depths)
        if stages < 8:
            raise ValueError(f"depths has {stages} entries; expected 7 for the body and at least 1 for the reconstruction")
        for key in ("embed_dims", "num_heads"):
            if len(getattr(self, key)) != stages:
                raise ValueError(f"{key} has {len(getattr(self, key))} entries; expected {stages}, one per entry of depths")
        for i, (dim, heads) in enumerate(zip(self.embed_dims, self.num_heads)):
            if dim % heads:
                raise ValueError(f"embed_dims[{i}] = {dim} does not divide into num_heads[{i}] = {heads}; choose a multiple")
            if i < 7 and dim % 4:
                raise ValueError(f"embed_dims[{i}] = {dim} is no multiple of 4; the position encoding and the scale changes need one")
            # 0 1 2 3 2 1 0: what goes down to the lowest scale is added where the same scale is reached again.
            same, why = (min(i, 6 - i), "whose features are added to it") if i < 7 else (7, "but all reconstruction groups are equally wide")
            if dim != self.embed_dims[same]:
                raise ValueError(f"embed_dims[{i}] = {dim} is not embed_dims[{same}] = {self.embed_dims[same]}, {why}; make them equal")
        if any(not 7 <= i < stages for i in self.indep_reconsts):
            raise ValueError(f"indep_reconsts {list(self.indep_reconsts)} must name stages 7 to {stages - 1}")
        self._check_alignment()
        return self

    def _check_alignment(self) -> None:
        groups, reach = self.deformable_groups, self.pa_frames // 2
        if reach == 0:
            if groups:
                raise ValueError(f"deformable_groups is {groups}, but pa_frames 0 aligns nothing; set deformable_groups: 0")
            if self.nonblind_denoising:
                raise ValueError("nonblind_denoising is true, but pa_frames 0 takes RGB alone; set it to false")
            if self.upscale != 1:
                raise ValueError(f"upscale is {self.upscale}, but pa_frames 0 makes frames of the input's size; set upscale: 1, or pa_frames to 2")
            return
        if groups == 0 or groups % reach:
            found = f"deformable_groups {groups} is no multiple of {reach} (half of pa_frames {self.pa_frames})"
            raise ValueError(f"{found}; choose one, such as {4 * reach}")
        for i, dim in enumerate(self.embed_dims[:7]):
            if dim % reach:
                raise ValueError(f"embed_dims[{i}] = {dim} is no multiple of {reach} (half of pa_frames {self.pa_frames}); choose one")
            if dim * reach % groups:
                together = f" x {reach} frames on a side" if reach > 1 else ""
                raise ValueError(f"embed_dims[{i}] = {dim}{together} does not divide into deformable_groups = {groups}; choose a divisor")


class Optimizer(Section):
    """Adam with a cosine learning rate, both functions of the step alone."""

    lr: Annotated[float, Field(gt=0)]
    """The learning rate that the cosine begins at, without a warm-up."""
    lr_min: Annotated[float, Field(ge=0)]
    """The learning rate at and after the end of the cosine."""
    lr_period: Positive
    """Steps from `lr` to `lr_min`."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
    """How much of Adam's running means of the gradient, and of its square, stays from one step to the next."""
    charbonnier_eps: Annotated[float, Field(gt=0)]
    """Added to the squared error under the root of the loss."""
    flow_names: tuple[str, ...]
    """Parameters whose name contains one of these train at `flow_lr_scale` and start frozen."""
    flow_lr_scale: Annotated[float, Field(gt=0)]
    """What `lr` is multiplied by for those parameters; `lr_min` is the same for all."""
    flow_frozen_steps: NotNegative
    """Steps for which those parameters stay frozen."""

    @model_validator(mode="after")
    def _ordered(self) -> "Optimizer":
        if self.lr_min > self.lr:
            raise ValueError(f"lr_min {self.lr_min:g} is above lr {self.lr:g}; lower it")
        return self


class Train(Section):
    """How long, on what and how a training computes."""

    total_steps: Positive
    """The step, counted from 1, after which the training is done; a higher number continues it."""
    batch_size: Positive
    """Clips per step, over all processes together."""
    frames: Annotated[int, Field(ge=2)]
    """Frames of a training clip, as the network gets them."""
    mirrored_frames: NotNegative
    """How many of these are the clip's last frames once more, backwards, where its windows want more frames than clips have; 0: none."""
    crop: Positive
    """Side of the ground-truth crop in pixels."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    """Decay of the averaged weights E; 0 keeps none."""
    deterministic: bool
    """Refuse operators whose result varies from run to run. On CPUs every step is bit-identical without it; on CUDA it costs a third of the speed."""
    processes: Positive | Literal["auto"]
    """Processes on each machine that share every batch, one per GPU; auto: as many as there are GPUs and the batch can be shared by."""
    clips_at_once: Positive | Literal["auto"]
    """Clips of its share that a process puts through the network together; the rest follow, and their gradients are added.
    auto: all, or on a GPU as many as its memory holds, which is tried out before the first step; but 1 with `deterministic`, whose bits must not
    depend on what is free."""
    precision: Literal["fp32", "tf32", "bf16"]
    """What a GPU computes in: fp32; its matrix products in tf32, which GPUs from Ampere on have and which is what the published trainings
    got from PyTorch's convolutions; or bf16, with flows, sampling points, weights and the loss in fp32. tf32 is fp32 on a CPU."""
    compile: bool
    """Compile the blocks of the network by torch.compile: minutes at the start. Changes results in their last bits."""
    activation_checkpointing: bool
    """Keep only each block's input and compute the rest again for its gradient: less memory, more time, the same result."""
    threads: Positive
    """CPU threads of the trainer. The same number gives the same bits on CPUs of the same kind."""
    log_every: Positive
    """Steps between two points of the loss curve."""
    validate_every: Positive
    """Steps between two validations (and previews)."""
    checkpoint_every: Positive
    """Steps between two checkpoints; the last step is always saved."""

    @model_validator(mode="after")
    def _mostly_real(self) -> "Train":
        if 2 * self.mirrored_frames > self.frames:
            found = f"mirrored_frames {self.mirrored_frames} is more than half of frames {self.frames}"
            raise ValueError(f"{found}, which leaves too few to mirror; lower it")
        return self


def _resume(value: Any) -> Any:
    """YAML reads a step as a number. Raises ValueError where the value is no policy."""
    text = str(value) if type(value) is int else value
    if not isinstance(text, str) or not re.fullmatch(r"auto|must|never|[0-9]+|fork [A-Za-z0-9][A-Za-z0-9._-]*@[0-9]+", text):
        raise ValueError(f"found {json.dumps(value, default=str)}; expected auto, must, never, a step such as 2000, or `fork LINEAGE@STEP`")
    return text


class Checkpoints(Section):
    """What a training continues from, what is kept of it, and what happens where it can't be saved."""

    resume: Annotated[str, BeforeValidator(_resume)]
    """auto (the newest healthy checkpoint, else step 1), must (never start at step 1), never (only start at step 1),
    a step to go back to, or `fork LINEAGE@STEP`: branch a lineage of its own off a checkpoint of another.
    `vrt.checkpoint.policy` has the details."""
    keep_last: Positive
    """The newest registered checkpoints that are kept."""
    keep_every: NotNegative
    """Checkpoints whose step is a multiple of this are kept for ever; 0: none."""
    keep_best: NotNegative
    """Checkpoints with the highest validation PSNR that are kept."""
    most_failed_saves: NotNegative
    """Saves that may fail one after another before the training stops; 0: it goes on however many do."""


class Evaluate(Section):
    """How test clips go through the network, and what of the result counts."""

    tile: tuple[Positive, Positive, Positive]
    """Frames, height and width of the input that is restored at once; with `between`, the frames that are made at once."""
    overlap: tuple[NotNegative, NotNegative, NotNegative]
    """Frames and pixels that neighbouring tiles share; with `between` no frames, since each is made on its own."""
    measured: Literal["all", "centre"]
    """Which frames of a clip are compared with the truth: all, or the one in the middle, as results on Vimeo-90K are published."""

    @model_validator(mode="after")
    def _smaller(self) -> "Evaluate":
        if any(o >= t for o, t in zip(self.overlap, self.tile)):
            raise ValueError(f"overlap {list(self.overlap)} must be smaller than tile {list(self.tile)} in every dimension")
        return self


class Params(Section):
    """A whole params file, every key given."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """What the training is called: its MLflow runs and its registered model `vrt-NAME`."""
    seed: NotNegative
    """Decides the initial weights and, together with the step, all that is drawn: clips, crops, turns, degradation, dropped branches."""
    degradation: Degradation
    data: Data
    network: Network
    optimizer: Optimizer
    train: Train
    checkpoints: Checkpoints
    evaluate: Evaluate

    @model_validator(mode="after")
    def _possible(self) -> "Params":
        scale = self.degradation.scale if isinstance(self.degradation, (Bicubic, BlurDown)) else 1
        if scale != self.network.upscale:
            found = f"network.upscale is {self.network.upscale}, but degradation.kind {self.degradation.kind!r} reduces by {scale}"
            raise ValueError(f"{found}; set network.upscale: {scale}")
        if self.network.nonblind_denoising and not isinstance(self.degradation, Noise):
            raise ValueError("network.nonblind_denoising needs a noise level; set it to false or degradation.kind to noise")
        self._check_interpolation()
        unit = SIDE * scale
        if self.train.crop % unit:
            nearest = self.train.crop // unit * unit + unit
            raise ValueError(f"train.crop {self.train.crop} is no multiple of {unit} ({SIDE} times the scale {scale}); choose one, such as {nearest}")
        return self

    def _check_interpolation(self) -> None:
        between, aligned = isinstance(self.degradation, Between), self.network.pa_frames > 0
        if between and aligned:
            found = f"network.pa_frames is {self.network.pa_frames}, but degradation.kind 'between' needs a network that makes frames"
            raise ValueError(f"{found}; set network.pa_frames: 0")
        if not between and not aligned:
            found = f"network.pa_frames is 0, which makes frames in between, but degradation.kind is {self.degradation.kind!r}"
            raise ValueError(f"{found}; set network.pa_frames to 2, 4 or 6, or degradation.kind to between")
        if not between:
            return
        given = self.train.frames
        if given % 2 or given != self.network.img_size[0]:
            found = f"train.frames is {given} and network.img_size[0] {self.network.img_size[0]}"
            raise ValueError(f"{found}; degradation.kind 'between' needs the same even number, such as 4: the frame to make lies in the middle")
        if self.train.mirrored_frames or self.evaluate.overlap[0]:
            found = f"train.mirrored_frames is {self.train.mirrored_frames} and evaluate.overlap[0] {self.evaluate.overlap[0]}"
            raise ValueError(f"{found}; with degradation.kind 'between' each frame is made on its own: set both to 0")

    def identity(self) -> dict[str, Any]:
        """What must not change under a lineage, as {dotted key: value}: changing any of it starts another training.

        Not in it (FREE): how long to train, how often to log, validate and save, with how many workers and threads, and what is kept.
        """
        return {key: value for key, value in flatten(self.model_dump(mode="json")).items() if defines_the_training(key)}


def defines_the_training(key: str) -> bool:
    """Whether another value under this dotted key makes it another training."""
    return key not in FREE and not key.startswith(("evaluate.", "checkpoints."))


def with_resume(params: Params, value: str) -> Params:
    """`params` with another `checkpoints.resume`. Raises ParamsError where it is none."""
    try:
        checkpoints = params.checkpoints.model_copy(update={"resume": _resume(value)})
    except ValueError as error:
        raise ParamsError(f"--resume: {error}") from None
    return params.model_copy(update={"checkpoints": checkpoints})


def fingerprint(identity: dict[str, Any]) -> str:
    """SHA-256 (hex) of an identity, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def trained_as(params: Params, identity: Mapping[str, Any]) -> Params:
    """`params`, with the network and the degradation that a checkpoint's identity (`Params.identity`) names in place of its own.

    Raises ParamsError where they are none that this version knows.
    """
    parts: dict[str, dict[str, Any]] = {"network": {}, "degradation": {}}
    for key, value in identity.items():
        section, _, name = key.partition(".")
        if section in parts:
            parts[section][name] = value
    try:
        trained = TypeAdapter(Degradation).validate_json(json.dumps(parts["degradation"]), strict=True)
        network = Network.model_validate_json(json.dumps(parts["network"]))
    except ValidationError as error:
        raise ParamsError(f"the checkpoint was trained by params that this version does not know: {error}") from None
    # Not checked together: the crop, and what else was trained with, is another training's.
    return params.model_copy(update={"network": network, "degradation": trained})


def changes(path: Path, since: Params, parts: Iterable[str]) -> list[str]:
    """What a params file says otherwise than when it was read, in some of its sections and top-level keys, as "KEY: BEFORE -> NOW".

    Where it can't be read any more, what is wrong with it.
    """

    def flat(params: Params) -> dict[str, Any]:
        values = {part: getattr(params, part) for part in parts}
        return flatten({part: value.model_dump(mode="json") if isinstance(value, Section) else value for part, value in values.items()})

    parts = list(parts)
    try:
        before, now = flat(since), flat(load_params(path))
    except ParamsError as error:
        return [str(error)]
    return [f"{key}: {before.get(key)} -> {now.get(key)}" for key in {**before, **now} if before.get(key) != now.get(key)]


def same_training(path: Path, since: Params) -> bool:
    """Whether a params file is still that of the training that it was of when it was read."""
    try:
        now = load_params(path)
    except ParamsError:
        return False
    return (now.name, now.data.dataset, now.identity()) == (since.name, since.data.dataset, since.identity())


def load_params(path: Path) -> Params:
    """Read a params file.

    Raises ParamsError, which lists every wrong key with what was found and what is allowed.
    """
    try:
        tree = read_yaml(path)
    except FileNotFoundError:
        raise ParamsError(f"{path}: no such params file; write one with `vrt init --recipe quickstart`") from None
    except OSError as error:
        raise ParamsError(f"{path}: {error.strerror}; expected a readable params file") from None
    return parse(Params, tree, path)
