"""What a training says of itself, and who may read it when."""

import pytest

from vrt.status import StatusFile, TrainingStatus, read_status

STATUS = TrainingStatus("tiny-1", "http://page", attempt=2, started=50.0, total_steps=24, registered=4)


def test_what_is_registered_is_in_the_file_at_once_and_never_goes_back(tmp_path):
    path = tmp_path / "status.json"
    file = StatusFile(path, STATUS)
    file.registered(8)
    file.registered(6)
    assert read_status(path, since=50.0).registered == 8


def test_an_error_and_the_step_it_came_at_are_in_the_file(tmp_path):
    path = tmp_path / "status.json"
    file = StatusFile(path, STATUS)
    file.seen({"step": 7, "train/loss": 0.5})
    with pytest.raises(OSError), file.reporting(lambda: 9):
        raise OSError("no such clip")
    status = read_status(path, since=0.0)
    assert (status.step, status.error, status.metrics) == (9, "OSError: no such clip", {"train/loss": 0.5})


@pytest.mark.parametrize("content", ["", "{", "[]", '{"lineage": "tiny-1"}', '{"future": 1}'])
def test_a_file_that_can_not_be_read_is_no_status(tmp_path, content):
    (tmp_path / "status.json").write_text(content)
    assert read_status(tmp_path / "status.json", since=0.0) is None


def test_an_earlier_attempt_is_not_taken_for_this_one(tmp_path):
    StatusFile(tmp_path / "status.json", STATUS)
    assert read_status(tmp_path / "status.json", since=51.0) is None


def test_a_folder_that_takes_no_file_stops_nothing(tmp_path):
    StatusFile(tmp_path / "nowhere" / "status.json", STATUS).registered(8)
