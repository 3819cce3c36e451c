"""How quickly a checkpoint comes back from the store: `S3Store.fetch`, which hashes what it writes, beside boto3's bare `download_file`.

`python -m benchmarks.fetch` starts local services of its own (or uses those of MLFLOW_TRACKING_URI and AWS_ENDPOINT_URL), fetches the same
objects in turns, prints a table, and writes benchmarks/results/fetch-MACHINE.json and .md. Takes about two minutes and 3 GB of disk.
"""

import argparse
import hashlib
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from benchmarks.local import local_services
from benchmarks.machine import describe
from benchmarks.report import show, write
from vrt.checkpoint.manifest import FileEntry
from vrt.checkpoint.store import MB, S3Store

# Recipe 001 in KAIR's form: G and E with their constant buffers, and the optimizer.
SIZES = {"1_G.pth": 166 * MB, "1_E.pth": 166 * MB, "1_optimizerG.pth": 246 * MB}
AIM = 0.8


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(rounds: int, scratch: Path) -> dict[str, Any]:
    """Rates in MB/s: every round's, and the median of the rounds' ratios."""
    # By default boto3 checks each range against the checksum of the whole object where a server sends that with status 200, as rclone does.
    client = boto3.client("s3", config=Config(s3={"addressing_style": "path"}, response_checksum_validation="when_required"))
    bucket, key = "mlflow", f"benchmark-fetch-{time.time_ns()}/00000001"
    address = f"s3://{bucket}/{key}"
    entries = []
    for name, size in SIZES.items():
        content = os.urandom(size)
        client.put_object(Bucket=bucket, Key=f"{key}/{name}", Body=content)
        entries.append(FileEntry(name, size, hashlib.sha256(content).hexdigest()))
    store, target = S3Store(address.rsplit("/", 1)[0]), scratch / "arrived"

    def bare(entry: FileEntry) -> None:
        client.download_file(bucket, f"{key}/{entry.name}", str(target))

    def ours(entry: FileEntry) -> None:
        store.fetch(address, entry, target)

    def rate(fetch: Callable[[FileEntry], None]) -> float:
        taken = 0.0
        for entry in entries:
            taken += seconds(lambda entry=entry: fetch(entry))
            target.unlink()
        return sum(SIZES.values()) / MB / taken

    # Opens the connections, and brings the objects into the server's cache, for both alike.
    rate(bare), rate(ours)
    found: dict[str, list[float]] = {"download_file": [], "fetch": []}
    for turn in range(rounds):
        for name, fetch in (("download_file", bare), ("fetch", ours))[:: 1 if turn % 2 else -1]:
            found[name].append(rate(fetch))
    store.delete(address)
    for entry in entries:
        client.delete_object(Bucket=bucket, Key=f"{key}/{entry.name}")
    return found | {"ratio": statistics.median(ours / bare for ours, bare in zip(found["fetch"], found["download_file"]))}


def rows_of(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, measured, judged) for the table."""

    def spread(name: str) -> str:
        return f"{statistics.median(found[name]):.0f} MB/s ({min(found[name]):.0f} to {max(found[name]):.0f})"

    return [
        (f"G, E and optimizer of recipe 001: {sum(SIZES.values()) / MB:.0f} MB", "", ""),
        ("boto3 download_file", spread("download_file"), ""),
        ("fetch, hashed on the way", spread("fetch"), f"{found['ratio']:.2f} of it (aim: {AIM})"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fetch", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="how often everything is fetched each way (default: 7)")
    rounds = parser.parse_args().rounds
    with local_services() as scratch:
        found = measure(rounds, scratch)
    tables = {"fetching": [("", "measured", "judged"), *rows_of(found)]}
    show(tables)
    print(f"written to {write('fetch', 'A checkpoint of recipe 001: fetching it from the store', describe(), found, tables)}")


if __name__ == "__main__":
    main()
