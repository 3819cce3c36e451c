"""What joins restored segments keeps is what a player needs."""

from pathlib import Path

import av
import pytest

from tests.footage import moving, write_video
from vrt.data.video import join


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_in_the_file_sound_stays_beside_the_picture_however_long_the_video_is(suffix: str, tmp_path: Path):
    source, target = tmp_path / "in.mp4", tmp_path / f"out{suffix}"
    write_video(source, moving(300), sound=30)
    join([source], source, target)
    places: dict[str, list[tuple[int, float]]] = {"video": [], "audio": []}
    with av.open(str(target)) as container:
        for packet in container.demux():
            if packet.dts is not None:
                places[packet.stream.type].append((packet.pos, float(packet.dts * packet.time_base)))
    assert len(places["video"]) > 290 and len(places["audio"]) > 200
    reached, furthest = {"video": 0.0, "audio": 0.0}, 0.0
    for _, seconds, kind in sorted((pos, seconds, kind) for kind, found in places.items() for pos, seconds in found):
        reached[kind] = seconds
        furthest = max(furthest, abs(reached["video"] - reached["audio"]))
    assert furthest < 2, "a player that reads on would have to wait"
