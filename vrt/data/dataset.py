"""What a data set is made from: `data/raw/NAME/dataset.yaml`, typed.

Four kinds: `synthetic` (simulated camera motion over the photographs that scikit-learn ships), `video` (one video
file), `frames` (a folder of images) and `clips` (many folders of images). Each says which part of its source belongs to
which split, and no part may belong to two: what is tested on was never trained on.
"""

import re
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from vrt.data.clips import NAME, SPLITS, DataError, Split
from vrt.data.decoding import VIDEO_SUFFIXES
from vrt.params import NotNegative, Positive
from vrt.typed_yaml import Section, parse, read_yaml

FileName = Annotated[str, Field(pattern=r"^[^/\\]+$")]
Magnitude = Annotated[float, Field(ge=0)]


class Motion(Section):
    """How the simulated camera moves. Pixels are those of the frame; each clip draws its own values up to these."""

    pan: Magnitude
    """Most pixels per frame."""
    zoom: Annotated[float, Field(ge=0, le=0.02)]
    """Most relative change of size per frame."""
    rotation: Magnitude
    """Most degrees per frame."""
    shake: Magnitude
    """Most pixels that a shaking hand adds in each direction."""


class Foreground(Section):
    """A cut-out of another part of the split that moves over the picture."""

    size: Annotated[float, Field(gt=0, le=1)]
    """Largest diameter as a part of the frame's smaller side."""
    speed: Magnitude
    """Most pixels per frame, on top of the camera's motion."""


class SyntheticSplit(Section):
    """How many clips of a split are made of which parts of the photographs; sizes in frames and pixels."""

    clips: Positive
    frames: Positive
    height: Positive
    width: Positive
    regions: Annotated[dict[str, tuple[NotNegative, NotNegative, Positive, Positive]], Field(min_length=1)]
    """{photograph: (top, left, height, width)}: the only pixels the clips of this split are made of."""


class SyntheticSplits(Section):
    """One of each kind; their regions should not overlap, or the test knows what was trained on."""

    train: SyntheticSplit
    val: SyntheticSplit
    test: SyntheticSplit


class Synthetic(Section):
    """Clips from photographs: real texture, simulated motion, no download."""

    kind: Literal["synthetic"]
    seed: NotNegative
    motion: Motion
    foreground: Foreground
    splits: SyntheticSplits

    @model_validator(mode="after")
    def _disjoint(self) -> "Synthetic":
        regions = [(split, *item) for split in SPLITS for item in getattr(self.splits, split).regions.items()]
        for (split, photograph, region), (other_split, other_photograph, other) in combinations(regions, 2):
            apart = any(a + size <= b or b + other_size <= a for a, size, b, other_size in zip(region[:2], region[2:], other[:2], other[2:]))
            if photograph == other_photograph and not apart:
                places = f"{split} {list(region)} and {other_split} {list(other)} share pixels of {photograph}"
                raise ValueError(f"splits: {places}; expected disjoint regions (top, left, height, width)")
        return self


FrameRange = tuple[NotNegative, Positive]
"""First frame and the frame after the last, counted from 0."""
FrameRanges = Annotated[tuple[FrameRange, ...], Field(min_length=1)]


class FrameSplits(Section):
    """Which frames of the source belong to which split."""

    train: FrameRanges
    val: FrameRanges
    test: FrameRanges

    @model_validator(mode="after")
    def _disjoint(self) -> "FrameSplits":
        ranges = self.ordered()
        for split, first, end in ranges:
            if first >= end:
                raise ValueError(f"{split} has the range [{first}, {end}]; expected [first frame, frame after the last]")
        for (split, first, end), (other_split, other_first, other_end) in zip(ranges, ranges[1:]):
            if other_first < end:
                found = f"{split} [{first}, {end}] and {other_split} [{other_first}, {other_end}] share frames"
                raise ValueError(f"{found}; expected disjoint ranges")
        return self

    def ordered(self) -> list[tuple[Split, int, int]]:
        """(split, first frame, frame after the last) of each range, in the order of the source."""
        return sorted(((split, *span) for split in SPLITS for span in getattr(self, split)), key=lambda span: span[1:])


class Video(Section):
    """Clips from one video file beside the dataset.yaml."""

    kind: Literal["video"]
    file: FileName
    splits: FrameSplits


class Frames(Section):
    """Clips from a folder of images beside the dataset.yaml, in natural order of their names."""

    kind: Literal["frames"]
    folder: FileName
    splits: FrameSplits


class Clips(Section):
    """Many clips. Beside the dataset.yaml lie

    sharp/CLIP/ or CLIP.mp4    the images of each clip, in natural order of their names, or a video file (VIDEO_SUFFIXES)
    recorded/CLIP/             with `recorded`, their degraded counterparts, of the same names up to the suffix; or a video file
    train.txt, val.txt, test.txt    which clips belong to which split, one name a line; a test set has the last one alone
    """

    kind: Literal["clips"]
    recorded: bool
    """Whether degraded frames were recorded beside the sharp ones."""


Dataset = Synthetic | Video | Frames | Clips
KINDS: dict[str, type[Dataset]] = {"synthetic": Synthetic, "video": Video, "frames": Frames, "clips": Clips}
SHARP, RECORDED = "sharp", "recorded"
"""The folders of a data set of kind `clips`."""


def load_dataset(raw: Path) -> Dataset:
    """Read `raw`/dataset.yaml.

    Raises DataError where there is none, ParamsError where it is wrong (it lists every wrong key).
    """
    path = raw / "dataset.yaml"
    if not path.is_file():
        there = sorted(found.parent.name for found in raw.parent.glob("*/dataset.yaml"))
        remedy = f"set data.dataset in params.yaml to one of: {', '.join(there)}; or import one" if there else "import one"
        raise DataError(f"{path}: expected a data set, found no such file; {remedy} with `vrt data import VIDEO_OR_FOLDER --name {raw.name}`")
    tree = read_yaml(path)
    kind = tree.get("kind") if isinstance(tree, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise DataError(f"{path}: kind: found {kind!r}; expected one of: {', '.join(KINDS)}")
    return parse(KINDS[kind], tree, path)


def listed_clips(raw: Path) -> list[tuple[Split, str]]:
    """(split, name) of each clip that the lists of a data set of kind `clips` name, in their order. A test set has a test.txt alone.

    Raises DataError where no list names a clip, or a name is odd or occurs twice.
    """
    found: dict[str, Split] = {}
    for split in SPLITS:
        path = raw / f"{split}.txt"
        names = path.read_text(encoding="utf-8").split() if path.is_file() else None
        if names == []:
            raise DataError(f"{path}: expected a clip name on each line, found none; enter at least one clip of {SHARP}/, or remove the list")
        for name in names or []:
            if not re.fullmatch(NAME, name):
                raise DataError(f"{path}: expected the name of a folder of {SHARP}/, found {name!r}; correct or remove that line")
            if name in found:
                raise DataError(f"{path}: clip {name} is listed in {found[name]}.txt already; expected each clip once: remove one of the lines")
            found[name] = split
    if not found:
        lists = ", ".join(f"{split}.txt" for split in SPLITS)
        raise DataError(f"{raw}: expected lists of its clips ({lists}), one name a line, found none; write or import them again")
    return [(split, name) for name, split in found.items()]


def clip_source(folder: Path, name: str) -> Path:
    """The folder of images or the video file of a clip, below a data set's `sharp` or `recorded`. Raises DataError where it has neither."""
    if (folder / name).is_dir():
        return folder / name
    videos = [path for suffix in VIDEO_SUFFIXES if (path := folder / f"{name}{suffix}").is_file()]
    if not videos:
        raise DataError(f"{folder / name}: expected a folder of frames or a video file of that name, found neither; import the data set again")
    return videos[0]
