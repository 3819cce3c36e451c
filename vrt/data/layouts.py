"""How the published data sets lie on disk, and which of their clips are trained on: pure functions of a user's copy.

Each layout finds the clips below a folder; `vrt.data.importing` brings them in. Validation clips are never trained on and never tested
on: where the publishers set none apart, a tenth of the training clips is, evenly over the list.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from vrt.data.clips import SPLITS, DataError, Split
from vrt.data.decoding import is_video
from vrt.data.sources import ClipFrames, Quintuplet, lmdb_clips

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
TEST_ONLY: tuple[Split, ...] = ("test",)
Found = tuple[str, ClipFrames, ClipFrames | None]
"""Name, sharp frames and degraded frames of a clip whose split is still to be told."""


@dataclass(frozen=True)
class SourceClip:
    """A clip of a user's copy: its sharp frames, and maybe the degraded frames recorded beside them."""

    split: Split
    name: str
    sharp: ClipFrames
    recorded: ClipFrames | None


@dataclass(frozen=True)
class Layout:
    """How a published data set, or clips of one's own, lie in a folder."""

    title: str
    folders: str
    """What the folder to import holds."""
    find: Callable[[Path], list[SourceClip]]
    splits: tuple[Split, ...] = SPLITS
    """Which it has clips for."""


def source_clips(layout: str, root: Path) -> list[SourceClip]:
    """The clips of a data set of that layout below `root`, each split in natural order.

    Raises DataError where a folder or list is missing, a split would be empty, or a clip is in two of them.
    """
    # Clips may be named after the folder itself.
    clips = LAYOUTS[layout].find(root.resolve())
    seen: dict[str, Split] = {}
    for clip in clips:
        if clip.name in seen:
            raise DataError(f"{root}: clip {clip.name} is both in {seen[clip.name]} and in {clip.split}; expected each once: rename or remove one")
        seen[clip.name] = clip.split
    for split in LAYOUTS[layout].splits:
        if split not in seen.values():
            raise DataError(f"{root}: expected clips for {split} in the layout {layout} ({LAYOUTS[layout].folders}), found none; add some")
    return clips


def _reds(root: Path) -> list[SourceClip]:
    return _reds_pairs(root, ("sharp",))


def _reds_blur(root: Path) -> list[SourceClip]:
    return _reds_pairs(root, ("sharp", "blur"))


def _reds_pairs(root: Path, kinds: tuple[str, ...]) -> list[SourceClip]:
    """The official validation clips are numbered on from the training clips, and all but eight of both are trained on."""
    packed = [root / f"train_{kind}_with_val.lmdb" for kind in kinds]
    found: dict[str, list[ClipFrames]] = {}
    if all(path.is_dir() for path in packed):
        of_kind = [lmdb_clips(path) for path in packed]
        for path, clips in zip(packed[1:], of_kind[1:]):
            _expect(path, of_kind[0], clips, f"those of {packed[0].name}")
        found = {name: [clips[name] for clips in of_kind] for name in of_kind[0]}
    else:
        for part, first in (("train", 0), ("val", REDS_TRAINING_CLIPS)):
            folders = [_either(root / part / f"{part}_{kind}", root / f"{part}_{kind}") for kind in kinds]
            for clip in [_subfolders(folder) for folder in folders][0]:
                if not clip.name.isdecimal():
                    raise DataError(f"{clip}: expected a clip named by its number, such as 000, found {clip.name!r}; move it away")
                found[f"{int(clip.name) + first:03}"] = [folder / clip.name for folder in folders]
    _expect(root, (*REDS_TEST, *REDS_VALIDATION), found, f"validation clips count from {REDS_TRAINING_CLIPS}")
    splits = dict.fromkeys(REDS_TEST, "test") | dict.fromkeys(REDS_VALIDATION, "val")
    return [SourceClip(splits.get(name, "train"), name, frames[0], frames[1] if frames[1:] else None) for name, frames in sorted(found.items())]


def _gopro(root: Path) -> list[SourceClip]:
    def clips(part: str) -> list[Found]:
        if (root / f"{part}_GT.lmdb").is_dir() or (root / f"{part}_GT").is_dir():
            return _paired(root, f"{part}_GT", f"{part}_GT_blurred")
        return [(clip.name, clip / "sharp", clip / "blur") for clip in _subfolders(root / part)]

    return _with_validation(clips("train"), clips("test"))


def _dvd(root: Path) -> list[SourceClip]:
    if (root / "train_GT.lmdb").is_dir() or (root / "train_GT").is_dir():
        return _with_validation(_paired(root, "train_GT", "train_GT_blurred"), _paired(root, "test_GT", "test_GT_blurred"))
    found = {clip.name: (clip.name, clip / "GT", clip / "input") for clip in _subfolders(_either(root / "quantitative_datasets", root))}
    _expect(root, DVD_TEST, found, "the test clips its authors named")
    return _with_validation([found[name] for name in found if name not in DVD_TEST], [found[name] for name in DVD_TEST])


def _davis(root: Path) -> list[SourceClip]:
    def clips(*lists: str) -> list[Found]:
        names = [name for part in lists for name in _listed(root / "ImageSets" / "2017" / f"{part}.txt")]
        return [(name, root / "JPEGImages" / "480p" / name, None) for name in names]

    return _with_validation(clips("train", "val"), clips("test-dev"))


def _vimeo(root: Path) -> list[SourceClip]:
    packed = root / "vimeo90k_train_GT_all.lmdb"
    stored = lmdb_clips(packed) if packed.is_dir() else {}

    def clips(part: str) -> list[Found]:
        return [(name.replace("/", "_"), stored.get(name, root / "sequences" / name), None) for name in _listed(root / f"sep_{part}list.txt")]

    # Septuplets are short: 64 have about as many frames as 8 clips of other sets.
    return _with_validation(clips("train"), clips("test"), most=64)


def _own(root: Path) -> list[SourceClip]:
    found = []
    for split in SPLITS:
        for name, frames in _clips_below(root / split).items():
            pair = _pair_within(frames)
            found.append(SourceClip(split, name, *pair) if pair else SourceClip(split, name, frames, None))
    alone = [clip.sharp for clip in found if clip.recorded is None]
    if 0 < len(alone) < len(found):
        raise DataError(f"{alone[0]}: expected the folders sharp and degraded as in other clips, found one folder of frames; add the other, or none")
    return found


def _pair_within(frames: ClipFrames) -> tuple[Path, Path] | None:
    """Sharp and degraded, as folders or video files within a clip's folder."""
    if not isinstance(frames, Path) or not frames.is_dir():
        return None
    there = {path.stem if is_video(path) else path.name: path for path in frames.iterdir()}
    return (there["sharp"], there["degraded"]) if {"sharp", "degraded"} <= there.keys() else None


def _test_set(sharp: str, recorded: str | None, names: tuple[str, ...] = ()) -> Callable[[Path], list[SourceClip]]:
    def find(root: Path) -> list[SourceClip]:
        if recorded and (root / recorded).is_dir():
            clips = _paired(root, sharp, recorded)
        else:
            # Without degraded frames it is still a test of what can be computed.
            clips = [(name, frames, None) for name, frames in _clips_below(root / sharp).items()]
        _expect(root, names, [name for name, _, _ in clips], "all clips of this test set")
        return [SourceClip("test", *clip) for clip in clips]

    return find


def _quintuplets(root: Path) -> list[SourceClip]:
    return [SourceClip("test", clip.name, Quintuplet(clip), None) for clip in _subfolders(root)]


LAYOUTS: dict[str, Layout] = {
    "reds": Layout("REDS, sharp frames", "train/train_sharp/000/..., val/val_sharp/000/...", _reds),
    "reds-blur": Layout("REDS, pairs of blurred and sharp frames", "as reds, and train/train_blur/..., val/val_blur/...", _reds_blur),
    "vimeo": Layout("Vimeo-90K septuplets", "sequences/00001/0001/im1.png..., sep_trainlist.txt, sep_testlist.txt", _vimeo),
    "dvd": Layout("DVD, pairs of blurred and sharp frames", "quantitative_datasets/CLIP/{input,GT}", _dvd),
    "gopro": Layout("GoPro, pairs of blurred and sharp frames", "{train,test}/CLIP/{blur,sharp}/...", _gopro),
    "davis": Layout("DAVIS 2017 at 480p, with test-dev", "JPEGImages/480p/CLIP/..., ImageSets/2017/{train,val,test-dev}.txt", _davis),
    "clips": Layout("clips of your own", "{train,val,test}/CLIP/... or CLIP.mp4, or CLIP/{sharp,degraded}[.mp4] for pairs", _own),
    "reds4": Layout("test set REDS4", "GT/000/..., and blur/000/... for deblurring", _test_set("GT", "blur", REDS_TEST), TEST_ONLY),
    "vid4": Layout("test set Vid4", "GT/calendar/...", _test_set("GT", None, ("calendar", "city", "foliage", "walk")), TEST_ONLY),
    "udm10": Layout("test set UDM10", "GT/CLIP/...", _test_set("GT", None), TEST_ONLY),
    "dvd10": Layout("test set DVD10", "test_GT/CLIP/..., test_GT_blurred/CLIP/...", _test_set("test_GT", "test_GT_blurred"), TEST_ONLY),
    "gopro11": Layout("test set GoPro11", "test_GT/CLIP/..., test_GT_blurred/CLIP/...", _test_set("test_GT", "test_GT_blurred"), TEST_ONLY),
    "set8": Layout("test set Set8, or any other of sharp clips", "CLIP/...", _test_set(".", None), TEST_ONLY),
    "quintuplets": Layout("test sets UCF101 and DAVIS for frames in between", "CLIP/frame{0,1,t,2,3}.png", _quintuplets, TEST_ONLY),
}


def _with_validation(training: list[Found], test: list[Found], most: int = MOST_HELD_OUT) -> list[SourceClip]:
    """A tenth of the training clips, at least one and at most `most`, evenly over the list, becomes the validation split."""
    count = min(most, -(-len(training) // 10))
    held = {len(training) * (2 * k + 1) // (2 * count) for k in range(count)}
    split = {True: "val", False: "train"}
    return [SourceClip(split[i in held], *clip) for i, clip in enumerate(training)] + [SourceClip("test", *clip) for clip in test]


def _paired(root: Path, sharp: str, recorded: str) -> list[Found]:
    """Clips of two folders or LMDBs of the same clip names."""
    ours, theirs = (_clips_below(root / kind) for kind in (sharp, recorded))
    _expect(root / recorded, ours, theirs, f"those of {sharp}")
    return [(name, frames, theirs[name]) for name, frames in ours.items()]


def _clips_below(folder: Path) -> dict[str, ClipFrames]:
    """The clips in a folder, each a folder of images or a video file, or those of the LMDB of that name."""
    packed = folder.with_name(f"{folder.name}.lmdb")
    if packed.is_dir() and not folder.is_dir():
        return lmdb_clips(packed)
    named = [(path.name, path) for path in _subfolders(folder)] + [(path.stem, path) for path in folder.iterdir() if is_video(path)]
    clips: dict[str, Path] = {}
    for name, path in sorted(named):
        if name in clips:
            raise DataError(f"{folder}: {clips[name].name} and {path.name} are both the clip {name}; expected each once: rename or remove one")
        clips[name] = path
    return clips


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
