"""Evaluate a network: restore the clips of a split and measure them, and their input, against the truth.

Axes: B batch (1), D frames, C channels, H height, W width; lower-case h, w are those of the input.
"""

from dataclasses import asdict, astuple, dataclass

from torch import Tensor, nn

from vrt.data.clips import Clip, PreparedData
from vrt.data.sampler import evaluation_clip
from vrt.evaluation.baseline import baseline
from vrt.evaluation.metrics import Quality, quality
from vrt.evaluation.pictures import Place, Triple, worst_crop
from vrt.evaluation.tiling import AnySize, restore, tile_count
from vrt.observe import progress
from vrt.params import Noise, Params


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
    tiles = [tile_count((clip.frames, clip.height // upscale, clip.width // upscale), tile, overlap) for clip in clips]
    rows = []
    any_size = AnySize(network, upscale)
    with progress(f"evaluate {split}", sum(tiles), "tiles") as bar:
        for clip in clips:
            batch = evaluation_clip(data, params, clip)
            restored = restore(any_size, batch.degraded, tile, overlap, upscale, lambda name=clip.name: bar.advance(clip=name))
            rows.append(measure(clip.name, batch.degraded[0], restored[0], batch.truth[0], keep_middle=not rows))
    means = Scores(_mean([row.scores.input for row in rows]), _mean([row.scores.restored for row in rows]))
    label = "noisy input" if isinstance(params.degradation, Noise) else "bicubic input"
    return Evaluation(split, label, tuple(rows), means)


def validate(network: nn.Module, data: PreparedData, params: Params, limit: int | None = None) -> Evaluation:
    """`evaluate` on the validation split: what the trainer calls between steps."""
    return evaluate(network, data, params, "val", limit)


def measure(name: str, degraded: Tensor, restored: Tensor, truth: Tensor, keep_middle: bool) -> ClipResult:
    """Compare one clip, `degraded` (D, C, h, w) and `restored` (D, 3, H, W), with its `truth` (D, 3, H, W)."""
    if restored.shape != truth.shape:
        found = f"found {tuple(restored.shape)}"
        raise ValueError(f"restored clip {name!r}: expected the shape of the truth {tuple(truth.shape)}, {found}; prepare the data again")
    _check_finite(name, restored)
    before = baseline(degraded, *truth.shape[-2:])
    worst, middle = worst_crop(restored, truth), len(truth) // 2
    return ClipResult(
        name,
        frames=len(truth),
        scores=Scores(quality(before, truth), quality(restored, truth)),
        worst=worst,
        worst_crops=Triple(*(worst.cut(frames).clone() for frames in (before, restored, truth))),
        middle=Triple(*(frames[middle].clone() for frames in (before, restored, truth))) if keep_middle else None,
    )


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
