"""Every parameter of a run, typed and frozen: the one reading of `params.yaml` and of the recipes.

No field has a default: a params file states every knob, so what a run did can be read off one page.
"""

import difflib
import hashlib
import json
import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

Positive = Annotated[int, Field(gt=0)]
FREE = {
    *("name", "data.workers", "train.total_steps", "train.deterministic", "train.activation_checkpointing", "train.threads"),
    *("train.log_every", "train.validate_every", "train.checkpoint_every"),
}
"""What may change under a training without making it another one, beside the sections `checkpoints` and `evaluate`."""
SIDE = 8
"""The network halves its input three times: sides are multiples of this."""
NotNegative = Annotated[int, Field(ge=0)]


class ParamsError(ValueError):
    """The params file can't be used; the message names each key, what was found and what is allowed."""


class Section(BaseModel):
    """One level of the params file: immutable, no unknown keys, no silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


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
    """Bicubic reduction with anti-aliasing: the x4 super-resolution task."""

    kind: Literal["bicubic"]
    scale: Literal[4]


SectionType = TypeVar("SectionType", bound=Section)
Degradation = Annotated[Noise | Bicubic, Field(discriminator="kind")]


class Data(Section):
    dataset: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The folder below `data/raw/`, made by `vrt data import` or shipped (`quickstart`)."""
    workers: NotNegative
    """Processes that load samples beside the trainer; 0 loads in the trainer itself. Changes no result."""


class Network(Section):
    """Keyword arguments of `vrt.model.network.VRT`, under the names the published training files use."""

    upscale: Literal[1, 4]
    img_size: tuple[Positive, Positive, Positive]
    """Frames, height and width of the input the windows are laid out for (training input, not a limit)."""
    window_size: tuple[Positive, Positive, Positive]
    depths: tuple[Positive, ...]
    """Blocks per stage: seven for the U-shaped body, the rest for the reconstruction groups."""
    indep_reconsts: tuple[NotNegative, ...]
    """Stages (counted over all of `depths`) whose windows span a single frame."""
    embed_dims: tuple[Positive, ...]
    num_heads: tuple[Positive, ...]
    pa_frames: Literal[2]
    """Neighbour frames aligned to each frame."""
    deformable_groups: Positive
    nonblind_denoising: bool
    """Take the noise level as a fourth input channel."""
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
            if i < 7 and dim % self.deformable_groups:
                raise ValueError(f"embed_dims[{i}] = {dim} does not divide into deformable_groups = {self.deformable_groups}; choose a divisor")
            if i < 7 and dim % 4:
                raise ValueError(f"embed_dims[{i}] = {dim} is no multiple of 4; the position encoding and the scale changes need one")
        if any(not 7 <= i < stages for i in self.indep_reconsts):
            raise ValueError(f"indep_reconsts {list(self.indep_reconsts)} must name stages 7 to {stages - 1}")
        return self


class Optimizer(Section):
    """Adam with a cosine learning rate, both functions of the step alone."""

    lr: Annotated[float, Field(gt=0)]
    lr_min: Annotated[float, Field(ge=0)]
    """The learning rate at and after the end of the cosine."""
    lr_period: Positive
    """Steps from `lr` to `lr_min`."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
    charbonnier_eps: Annotated[float, Field(gt=0)]
    """Added to the squared error under the root of the loss."""
    flow_names: tuple[str, ...]
    """Parameters whose name contains one of these train at `flow_lr_scale` and start frozen."""
    flow_lr_scale: Annotated[float, Field(gt=0)]
    flow_frozen_steps: NotNegative
    """Steps for which those parameters stay frozen."""

    @model_validator(mode="after")
    def _ordered(self) -> "Optimizer":
        if self.lr_min > self.lr:
            raise ValueError(f"lr_min {self.lr_min:g} is above lr {self.lr:g}; lower it")
        return self


class Train(Section):
    total_steps: Positive
    batch_size: Positive
    """Clips per step, over all processes together."""
    frames: Annotated[int, Field(ge=2)]
    """Frames of a training clip."""
    crop: Positive
    """Side of the ground-truth crop in pixels."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    """Decay of the averaged weights E; 0 keeps none."""
    deterministic: bool
    """Refuse operators whose result varies from run to run. On CPUs every step is bit-identical without it; on CUDA it costs speed."""
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


def _resume(value: Any) -> Any:
    """YAML reads a step as a number. Raises ValueError where the value is no policy."""
    text = str(value) if type(value) is int else value
    if not isinstance(text, str) or not re.fullmatch(r"auto|must|never|[0-9]+|fork [A-Za-z0-9][A-Za-z0-9._-]*@[0-9]+", text):
        raise ValueError(f"found {_show(value)}; expected auto, must, never, a step such as 2000, or `fork LINEAGE@STEP`")
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
    tile: tuple[Positive, Positive, Positive]
    """Frames, height and width of the input that is restored at once."""
    overlap: tuple[NotNegative, NotNegative, NotNegative]
    """Frames and pixels that neighbouring tiles share."""

    @model_validator(mode="after")
    def _smaller(self) -> "Evaluate":
        if any(o >= t for o, t in zip(self.overlap, self.tile)):
            raise ValueError(f"overlap {list(self.overlap)} must be smaller than tile {list(self.tile)} in every dimension")
        return self


class Params(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """What the training is called: its MLflow runs and its registered model `vrt-NAME`."""
    seed: NotNegative
    degradation: Degradation
    data: Data
    network: Network
    optimizer: Optimizer
    train: Train
    checkpoints: Checkpoints
    evaluate: Evaluate

    @model_validator(mode="after")
    def _possible(self) -> "Params":
        scale = self.degradation.scale if isinstance(self.degradation, Bicubic) else 1
        if scale != self.network.upscale:
            found = f"network.upscale is {self.network.upscale}, but degradation.kind {self.degradation.kind!r} reduces by {scale}"
            raise ValueError(f"{found}; set network.upscale: {scale}")
        if self.network.nonblind_denoising and not isinstance(self.degradation, Noise):
            raise ValueError("network.nonblind_denoising needs a noise level; set it to false or degradation.kind to noise")
        unit = SIDE * scale
        if self.train.crop % unit:
            nearest = self.train.crop // unit * unit + unit
            raise ValueError(f"train.crop {self.train.crop} is no multiple of {unit} ({SIDE} times the scale {scale}); choose one, such as {nearest}")
        return self

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


def read_yaml(path: Path) -> Any:
    """The content of a YAML 1.2 file (as DVC reads it: 1e-4 is a number). Raises ParamsError where it is not YAML."""
    try:
        return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path}: not readable as YAML: {error}") from None


def parse(model: type[SectionType], tree: Any, source: Path) -> SectionType:
    """`tree` as a `model`; ParamsError names `source` and every wrong key."""
    if not isinstance(tree, dict):
        raise ParamsError(f"{source}: found {_show(tree)} at the top; expected keys: {', '.join(model.model_fields)}")
    try:
        return model.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        lines = [_explain(model, problem) for problem in error.errors()]
        raise ParamsError("\n".join([f"{source}: {len(lines)} wrong value{'s' * (len(lines) > 1)}", *(f"  {line}" for line in lines)])) from None


def _explain(model: type[Section], problem: dict[str, Any]) -> str:
    path, allowed = _locate(model, problem["loc"])
    key = ".".join(path) or "the file as a whole"
    match problem["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(path[-1], allowed, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ";"
            return f"{key}: found an unknown key{hint} allowed here: {', '.join(allowed)}"
        case "missing":
            return f"{key}: found nothing; expected a value (no knob has a hidden default)"
        case "union_tag_not_found":
            return f"{key}.kind: found nothing; expected one of the kinds of {key}"
        case "value_error":
            return f"{key}: {problem['ctx']['error']}"
        case _:
            return f"{key}: found {_show(problem['input'])}; {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _locate(model: type[Section], location: tuple) -> tuple[list[str], list[str]]:
    """The key path of a pydantic error location, and the keys allowed beside its last part.

    A tagged union puts the tag of the chosen kind into the location ("degradation", "noise", "sigma"): it is no key of the file.
    """
    path: list[str] = []
    here: Any = model
    allowed: list[str] = []
    for part in location:
        if get_origin(here) is UnionType:
            here = next(kind for kind in get_args(here) if part in get_args(kind.model_fields["kind"].annotation))
            continue
        path.append(str(part))
        if isinstance(here, type) and issubclass(here, Section):
            allowed = list(here.model_fields)
            here = here.model_fields[part].annotation if part in here.model_fields else None
    return path, allowed


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
