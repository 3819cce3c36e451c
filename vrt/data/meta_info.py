"""Lists of training clips as KAIR and BasicSR have them: which clips of a data set are trained on, and what each holds."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from vrt.data.errors import DataError
from vrt.data.layouts import SourceClip
from vrt.observe import log

Listed = tuple[int, int, int]
"""Frames, height and width of a clip."""


def read_meta_info(path: Path) -> dict[str, Listed]:
    """{clip: what it holds} from lines `CLIP FRAMES (HEIGHT,WIDTH,CHANNELS)`, which the number of the first frame may follow.

    A clip 00001/0001 is called 00001_0001 here. Raises DataError, which names the line that is none.
    """
    if not path.is_file():
        raise DataError(f"{path}: expected a meta-info list, found no such file; check the path")
    clips: dict[str, Listed] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        found = re.fullmatch(r"(\S+)\s+(\d+)\s+\((\d+),\s*(\d+),\s*\d+\)(\s+\d+)?", line.strip())
        if not found:
            wanted = "CLIP FRAMES (HEIGHT,WIDTH,CHANNELS)"
            raise DataError(f"{path}, line {number}: expected {wanted}, found {line[:80]!r}; correct or remove that line")
        clips[found[1].replace("/", "_")] = int(found[2]), int(found[3]), int(found[4])
    return clips


def chosen_clips(clips: Sequence[SourceClip], listed: Mapping[str, Listed], path: Path) -> list[SourceClip]:
    """The clips without the training clips that are not listed. Clips that the layout keeps for validation or test stay so, listed or not.

    Raises DataError where a listed clip is not there.
    """
    kept_apart = [clip.name for clip in clips if clip.split != "train" and clip.name in listed]
    if kept_apart:
        log.info("%s: %s stay out of the training, as validation or test clips", path, ", ".join(kept_apart))
    missing = sorted(listed.keys() - {clip.name for clip in clips})
    if missing:
        raise DataError(f"{path}: expected {len(listed)} clips, found no {', '.join(missing[:5])} in your copy; complete it, or correct the list")
    chosen = [clip for clip in clips if clip.split != "train" or clip.name in listed]
    if not any(clip.split == "train" for clip in chosen):
        raise DataError(f"{path}: expected at least one clip to train on, found validation and test clips only; list some others")
    return chosen
