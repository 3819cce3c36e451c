"""The history of metrics: part of the state, so it has to survive to the bit."""

import csv
import io
import struct

from hypothesis import given
from hypothesis import strategies as st

from vrt.training.history import History

values = st.floats(allow_nan=False) | st.floats(width=32, allow_nan=False)
rows = st.dictionaries(st.integers(1, 10**9), st.dictionaries(st.sampled_from(["train/loss", "train/lr", "val/psnr"]), values), max_size=5)


@given(rows)
def test_it_reads_back_to_the_same_bits(content):
    history = History()
    for step, metrics in content.items():
        history.add(step, metrics)
    written = history.to_bytes()
    read = History.from_bytes(written)
    bits = [[(key, struct.pack("d", value)) for key, value in row.items()] for row in history.rows]
    assert [[(key, struct.pack("d", value)) for key, value in row.items()] for row in read.rows] == bits
    assert read.to_bytes() == written


def test_metrics_of_one_step_share_its_row_and_the_newest_value_counts():
    history = History([{"step": 1, "train/loss": 0.5}])
    assert history.add(2, {"train/loss": 0.25}) == {"step": 2, "train/loss": 0.25}
    assert history.add(2, {"val/psnr": 30.0}) == {"step": 2, "train/loss": 0.25, "val/psnr": 30.0}
    history.add(3, {"train/loss": 0.125})
    assert history.rows == [{"step": 1, "train/loss": 0.5}, {"step": 2, "train/loss": 0.25, "val/psnr": 30.0}, {"step": 3, "train/loss": 0.125}]
    assert history.newest() == {"train/loss": 0.125, "val/psnr": 30.0}
    assert [row["train/loss"] for row in History.from_bytes(history.to_bytes()).rows] == [0.5, 0.25, 0.125]


def test_a_restored_history_goes_on():
    history = History.from_bytes(b'{"step": 1, "train/loss": 0.5}\n')
    history.add(1, {"val/psnr": 30.0})
    history.add(2, {"train/loss": 0.25})
    assert history.to_bytes() == b'{"step": 1, "train/loss": 0.5, "val/psnr": 30.0}\n{"step": 2, "train/loss": 0.25}\n'


def test_the_table_has_the_steps_at_which_all_its_columns_were_logged():
    history = History([{"step": 1, "a": 0.1}, {"step": 2, "a": 1 / 3, "b": 2.0, "c": 9.0}, {"step": 3, "b": 1.0}])
    table = history.to_csv(["a", "b"])
    assert table.splitlines()[0] == "step,a,b"
    assert [{key: float(value) for key, value in row.items()} for row in csv.DictReader(io.StringIO(table))] == [{"step": 2, "a": 1 / 3, "b": 2.0}]


def test_a_checkpoint_says_of_validations_only_its_own():
    history = History([{"step": 4, "train/loss": 0.5, "val/psnr": 30.0}, {"step": 8, "train/loss": 0.25}])
    assert history.metrics_of(4) == {"train/loss": 0.25, "val/psnr": 30.0}
    assert history.metrics_of(8) == history.metrics_of(9) == {"train/loss": 0.25}
    assert history.scores() == {4: {"val/psnr": 30.0}}
