"""Evaluate a network: restore the clips of a split and measure them, and their input, against the truth.

Axes: B batch (1), D frames, C channels, H height, W width; lower-case h, w are those of the input.
"""

from dataclasses import asdict, astuple, dataclass

from torch import Tensor, nn

from vrt.data.clips import Clip, PreparedData
from vrt.data.degradations import continue_backwards
from vrt.data.sampler import Batch, evaluation_clip
from vrt.evaluation.baseline import baseline, neighbours_mean
from vrt.evaluation.between import Interpolating, group
from vrt.evaluation.metrics import Quality, quality
from vrt.evaluation.pictures import Place, Triple, worst_crop
from vrt.evaluation.tiling import AnySize, Size, restore, tile_count
from vrt.observe import progress
from vrt.params import Between, MotionBlur, Params

INPUT_LABELS = {
    "noise": "noisy input",
    "bicubic": "bicubic input",
    "blur_down": "enlarged input",
    "motion_blur": "blurred input",
    "recorded": "recorded input",
    "between": "mean of the two neighbours",
}
"""What one has without the network, by the kind of degradation, in a sentence that goes "... over the noisy input"."""


@dataclass(frozen=True)
class Scores:
    """How good the input is and how good what the network makes of it, each against the truth."""

    input: Quality
    restored: Quality

    @property
    def gain_db(self) -> float:
        """PSNR of the restored less that of the input."""
        return self.restored.psnr - self.input.psnr

    def metrics(self) -> dict[str, float]:
        """A flat mapping: psnr, ssim, psnr_y, ssim_y of the restored, each again as input_..., and gain_db."""
        of_input = {f"input_{name}": value for name, value in asdict(self.input).items()}
        return asdict(self.restored) | of_input | {"gain_db": self.gain_db}


@dataclass(frozen=True)
class ClipResult:
    """One clip: its scores and what to show of it."""

    name: str
    frames: int
    """That were measured."""
    scores: Scores
    worst: Place
    """Where the restoration is furthest from the truth."""
    worst_crops: Triple
    middle: Triple | None
    """The frame in the middle of the clip; kept of the first clip only, since frames are large."""


@dataclass(frozen=True)
class Evaluation:
    """The clips of a split, in its order, and their means: every clip counts the same, however long."""

    split: str
    input_label: str
    """What the input is called in a sentence, such as "noisy input"."""
    rows: tuple[ClipResult, ...]
    means: Scores

    @property
    def preview_frames(self) -> Triple:
        """The middle frame of the first clip, for `pictures.preview(*evaluation.preview_frames)`; the same at every validation."""
        return self.rows[0].middle

    def metrics(self) -> dict[str, float]:
        """The means under the names of `Scores.metrics`."""
        return self.means.metrics()


def evaluate(network: nn.Module, data: PreparedData, params: Params, split: str, limit: int | None = None) -> Evaluation:
    """Restore and measure the first `limit` clips of a split (None: all), on whatever device the network is.

    Uses `params.evaluate` for tiles and `params.network.upscale`. Draws nothing at random and leaves the network as it was.

    Raises ValueError if there is no clip, or the network returns NaN, infinity or another size than the truth.
    """
    clips = _chosen_clips(data, split, limit)
    tile, overlap, upscale = params.evaluate.tile, params.evaluate.overlap, params.network.upscale
    rows = []
    applied = AnySize(Interpolating(network, params.network.img_size[0]) if _interpolates(params) else network, upscale)
    with progress(f"evaluate {split}", sum(tile_count(_input_size(clip, params), tile, overlap) for clip in clips), "tiles") as bar:
        for clip in clips:
            batch = evaluation_clip(data, params, clip)
            given, shown = _network_input(batch, params)
            restored = restore(applied, given, tile, overlap, upscale, lambda name=clip.name: bar.advance(clip=name))
            pairs = shown, restored[0, : batch.truth.shape[1]], batch.truth[0]
            rows.append(measure(clip.name, *pairs, keep_middle=not rows, centre_only=params.evaluate.measured == "centre"))
    means = Scores(_mean([row.scores.input for row in rows]), _mean([row.scores.restored for row in rows]))
    return Evaluation(split, INPUT_LABELS[params.degradation.kind], tuple(rows), means)


def validate(network: nn.Module, data: PreparedData, params: Params, limit: int | None = None) -> Evaluation:
    """`evaluate` on the validation split: what the trainer calls between steps."""
    return evaluate(network, data, params, "val", limit)


def measure(name: str, degraded: Tensor, restored: Tensor, truth: Tensor, keep_middle: bool, centre_only: bool) -> ClipResult:
    """Compare one clip, `degraded` (D, C, h, w) and `restored` (D, 3, H, W), with its `truth` (D, 3, H, W), or the frame in the middle alone."""
    if restored.shape != truth.shape:
        found = f"found {tuple(restored.shape)}"
        raise ValueError(f"restored clip {name!r}: expected the shape of the truth {tuple(truth.shape)}, {found}; prepare the data again")
    _check_finite(name, restored)
    first = len(truth) // 2 if centre_only else 0
    if centre_only:
        degraded, restored, truth = (frames[first : first + 1] for frames in (degraded, restored, truth))
    before = baseline(degraded, *truth.shape[-2:])
    worst, middle = worst_crop(restored, truth), len(truth) // 2
    return ClipResult(
        name,
        frames=len(truth),
        scores=Scores(quality(before, truth), quality(restored, truth)),
        worst=worst._replace(frame=first + worst.frame),
        worst_crops=Triple(*(worst.cut(frames).clone() for frames in (before, restored, truth))),
        middle=Triple(*(frames[middle].clone() for frames in (before, restored, truth))) if keep_middle else None,
    )


def _interpolates(params: Params) -> bool:
    return isinstance(params.degradation, Between)


def _network_input(batch: Batch, params: Params) -> tuple[Tensor, Tensor]:
    """What the network gets, (1, D, C, h, w), and what one has without it, (D, C, h, w), of a clip.

    A clip shorter than the network's windows is continued backwards, as in training; what is made of those frames is not measured.
    """
    frames = params.network.img_size[0]
    if _interpolates(params):
        groups = group(batch.degraded, frames)
        return groups, neighbours_mean(groups[0], frames)
    return continue_backwards(batch.degraded, frames), batch.degraded[0]


def _input_size(clip: Clip, params: Params) -> Size:
    """Frames, height and width of what `_network_input` gives for a clip."""
    frames, upscale = params.network.img_size[0], params.network.upscale
    match params.degradation:
        case Between():
            count = (clip.frames + 1) // 2 - frames + 1
        case MotionBlur() as blur:
            count = max(clip.frames // blur.frames, frames)
        case _:
            count = max(clip.frames, frames)
    return count, clip.height // upscale, clip.width // upscale


def _chosen_clips(data: PreparedData, split: str, limit: int | None) -> tuple[Clip, ...]:
    if limit is not None and limit < 1:
        raise ValueError(f"limit of clips: expected 1 or more, or None for all, found {limit}; raise it")
    clips = data.clips(split)[:limit]
    if not clips:
        raise ValueError(f"split {split!r}: expected at least one clip to evaluate, found none; add clips to it and prepare the data again")
    return clips


def _check_finite(name: str, restored: Tensor) -> None:
    bad = (~restored.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        found = f"found NaN or infinity in {len(bad)} of {len(restored)} frames, first in frame {bad[0]}"
        remedy = "the weights are damaged or the training diverged: go back to an earlier checkpoint, or lower optimizer.lr"
        raise ValueError(f"restored clip {name!r}: expected finite values, {found}; {remedy}")


def _mean(qualities: list[Quality]) -> Quality:
    return Quality(*(sum(values) / len(values) for values in zip(*map(astuple, qualities))))
