"""How the published data sets lie on disk, and which of their clips are trained on: pure functions of a user's copy.

Each layout finds the clips below a folder; `vrt.data.importing` brings them in. Validation clips are never trained on and never tested
on: where the publishers set none apart, a tenth of the training clips is, evenly over the list.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from vrt.data.clips import SPLITS, DataError, Split

REDS_TEST = ("000", "011", "015", "020")
"""REDS4, the four training clips that papers on video restoration test on (Wang et al., EDVR, 2019)."""
REDS_VALIDATION = ("240", "241", "246", "257")
"""REDSval4, four of the official validation clips (Chan et al., BasicVSR, 2021)."""
REDS_TRAINING_CLIPS = 240
DVD_TEST = (
    *("720p_240fps_2", "IMG_0003", "IMG_0021", "IMG_0030", "IMG_0031"),
    *("IMG_0032", "IMG_0033", "IMG_0037", "IMG_0039", "IMG_0049"),
)
"""As named by its author: issue 2 of shuochsu/DeepVideoDeblurring."""
MOST_HELD_OUT = 8


@dataclass(frozen=True)
class SourceClip:
    """A clip of a user's copy: a folder of sharp frames, and maybe one of the degraded frames recorded beside them."""

    split: Split
    name: str
    sharp: Path
    recorded: Path | None


@dataclass(frozen=True)
class Layout:
    title: str
    folders: str
    """What the folder to import holds."""
    find: Callable[[Path], list[SourceClip]]


def source_clips(layout: str, root: Path) -> list[SourceClip]:
    """The clips of a data set of that layout below `root`, each split in natural order.

    Raises DataError where a folder or list is missing, a split would be empty, or a clip is in two of them.
    """
    clips = LAYOUTS[layout].find(root)
    seen: dict[str, Split] = {}
    for clip in clips:
        if clip.name in seen:
            raise DataError(f"{root}: clip {clip.name} is both in {seen[clip.name]} and in {clip.split}; expected each once: rename or remove one")
        seen[clip.name] = clip.split
    for split in SPLITS:
        if split not in seen.values():
            raise DataError(f"{root}: expected clips for {split} in the layout {layout} ({LAYOUTS[layout].folders}), found none; add some")
    return clips


def _reds(root: Path) -> list[SourceClip]:
    return _reds_pairs(root, ("sharp",))


def _reds_blur(root: Path) -> list[SourceClip]:
    return _reds_pairs(root, ("sharp", "blur"))


def _reds_pairs(root: Path, kinds: tuple[str, ...]) -> list[SourceClip]:
    """The official validation clips are numbered on from the training clips, and all but eight of both are trained on."""
    found: dict[str, list[Path]] = {}
    for part, first in (("train", 0), ("val", REDS_TRAINING_CLIPS)):
        folders = [_either(root / part / f"{part}_{kind}", root / f"{part}_{kind}") for kind in kinds]
        for clip in [_subfolders(folder) for folder in folders][0]:
            if not clip.name.isdecimal():
                raise DataError(f"{clip}: expected a clip named by its number, such as 000, found {clip.name!r}; move it away")
            found[f"{int(clip.name) + first:03}"] = [folder / clip.name for folder in folders]
    _expect(root, (*REDS_TEST, *REDS_VALIDATION), found, f"validation clips count from {REDS_TRAINING_CLIPS}")
    splits = dict.fromkeys(REDS_TEST, "test") | dict.fromkeys(REDS_VALIDATION, "val")
    return [SourceClip(splits.get(name, "train"), name, folders[0], folders[1] if folders[1:] else None) for name, folders in sorted(found.items())]


def _gopro(root: Path) -> list[SourceClip]:
    def clips(part: str) -> list[tuple[str, Path, Path]]:
        return [(clip.name, clip / "sharp", clip / "blur") for clip in _subfolders(root / part)]

    return _with_validation(clips("train"), clips("test"))


def _dvd(root: Path) -> list[SourceClip]:
    found = {clip.name: (clip.name, clip / "GT", clip / "input") for clip in _subfolders(_either(root / "quantitative_datasets", root))}
    _expect(root, DVD_TEST, found, "the test clips its authors named")
    return _with_validation([found[name] for name in found if name not in DVD_TEST], [found[name] for name in DVD_TEST])


def _davis(root: Path) -> list[SourceClip]:
    def clips(*lists: str) -> list[tuple[str, Path, None]]:
        names = [name for part in lists for name in _listed(root / "ImageSets" / "2017" / f"{part}.txt")]
        return [(name, root / "JPEGImages" / "480p" / name, None) for name in names]

    return _with_validation(clips("train", "val"), clips("test-dev"))


def _vimeo(root: Path) -> list[SourceClip]:
    def clips(part: str) -> list[tuple[str, Path, None]]:
        return [(name.replace("/", "_"), root / "sequences" / name, None) for name in _listed(root / f"sep_{part}list.txt")]

    # Septuplets are short: 64 have about as many frames as 8 clips of other sets.
    return _with_validation(clips("train"), clips("test"), most=64)


def _own(root: Path) -> list[SourceClip]:
    found = []
    for split in SPLITS:
        for clip in _subfolders(root / split):
            paired = (clip / "sharp").is_dir() and (clip / "degraded").is_dir()
            found.append(SourceClip(split, clip.name, clip / "sharp", clip / "degraded") if paired else SourceClip(split, clip.name, clip, None))
    alone = [clip.sharp for clip in found if clip.recorded is None]
    if 0 < len(alone) < len(found):
        raise DataError(f"{alone[0]}: expected the folders sharp and degraded as in other clips, found one folder of frames; add the other, or none")
    return found


LAYOUTS: dict[str, Layout] = {
    "reds": Layout("REDS, sharp frames", "train/train_sharp/000/..., val/val_sharp/000/...", _reds),
    "reds-blur": Layout("REDS, pairs of blurred and sharp frames", "as reds, and train/train_blur/..., val/val_blur/...", _reds_blur),
    "vimeo": Layout("Vimeo-90K septuplets", "sequences/00001/0001/im1.png..., sep_trainlist.txt, sep_testlist.txt", _vimeo),
    "dvd": Layout("DVD, pairs of blurred and sharp frames", "quantitative_datasets/CLIP/{input,GT}", _dvd),
    "gopro": Layout("GoPro, pairs of blurred and sharp frames", "{train,test}/CLIP/{blur,sharp}/...", _gopro),
    "davis": Layout("DAVIS 2017 at 480p, with test-dev", "JPEGImages/480p/CLIP/..., ImageSets/2017/{train,val,test-dev}.txt", _davis),
    "clips": Layout("clips of your own", "{train,val,test}/CLIP/..., or {train,val,test}/CLIP/{sharp,degraded}/... for pairs", _own),
}


def _with_validation(
    training: list[tuple[str, Path, Path | None]], test: list[tuple[str, Path, Path | None]], most: int = MOST_HELD_OUT
) -> list[SourceClip]:
    """A tenth of the training clips, at least one and at most `most`, evenly over the list, becomes the validation split."""
    count = min(most, -(-len(training) // 10))
    held = {len(training) * (2 * k + 1) // (2 * count) for k in range(count)}
    split = {True: "val", False: "train"}
    return [SourceClip(split[i in held], *clip) for i, clip in enumerate(training)] + [SourceClip("test", *clip) for clip in test]


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: expected this folder of the chosen layout, found none; check the path and --layout (`vrt data import --help`)")
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _either(first: Path, second: Path) -> Path:
    """The archives unpack to the one or the other, depending on the tool; `first` where there is neither."""
    return second if second.is_dir() and not first.is_dir() else first


def _listed(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(f"{path}: expected this list of the chosen layout, found none; check the path and --layout (`vrt data import --help`)")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _expect(root: Path, names: Iterable[str], found: Iterable[str], why: str) -> None:
    missing = sorted(set(names) - set(found))
    if missing:
        raise DataError(f"{root}: expected the clips {', '.join(names)} ({why}), found none of {', '.join(missing)}; complete your copy")
