"""Fetching big files: in ranges that arrive in any order, over connections that break, never over what is there."""

import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import boto3
import pytest
from botocore.config import Config

from vrt.checkpoint.errors import CheckpointError, StoreUnavailable
from vrt.checkpoint.manifest import FileEntry
from vrt.checkpoint.ranges import RANGE, in_order
from vrt.checkpoint.store import S3Store

# Three ranges and a piece.
CONTENT = os.urandom(1 << 20) * 25 + b"the end"


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 100, 101])
def test_ranges_come_in_order_whatever_arrives_first(size: int):
    content = os.urandom(size)

    def fill(start: int, into: memoryview) -> None:
        time.sleep(0.002 * (start % 30 == 0))
        into[:] = content[start : start + len(into)]

    assert b"".join(bytes(one) for one in in_order(fill, size, length=10, at_once=3)) == content


def test_a_range_that_fails_ends_it_and_no_more_are_asked_for():
    asked = []

    def fill(start: int, into: memoryview) -> None:
        asked.append(start)
        if start == 20:
            raise StoreUnavailable("down")

    arrived = []
    with pytest.raises(StoreUnavailable, match="down"):
        arrived += in_order(fill, 10_000, length=10, at_once=3)
    assert len(arrived) == 2 and len(asked) < 10


class Proxy:
    """Between client and server; cuts the first `cuts` answers that are longer than `after` bytes. The servers at hand don't do that on demand."""

    def __init__(self, endpoint: str, cuts: int, after: int = 1 << 20):
        self._to, self._after = (urlsplit(endpoint).hostname, urlsplit(endpoint).port), after
        self._lock, self.left = threading.Lock(), cuts
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            server = socket.create_connection(self._to)
            threading.Thread(target=self._pass_on, args=(client, server, None), daemon=True).start()
            threading.Thread(target=self._pass_on, args=(server, client, self._after), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, after: int | None) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
                passed += len(data)
                with self._lock:
                    cut = after is not None and passed > after and self.left > 0
                    self.left -= cut
                if cut:
                    break
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def behind(services, tmp_path: Path, monkeypatch):
    """Makes a store behind a proxy, with CONTENT as its only object; returns its address and a `FileEntry`."""
    client = boto3.client("s3", config=Config(s3={"addressing_style": "path"}))
    key = f"fetch-{os.getpid()}/{tmp_path.name}/00000040"
    client.put_object(Bucket="mlflow", Key=f"{key}/40_G.pth", Body=CONTENT)
    proxies = []

    def make(cuts: int) -> tuple[S3Store, str, Proxy]:
        proxies.append(Proxy(services["AWS_ENDPOINT_URL"], cuts))
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxies[-1].address)
        monkeypatch.setattr(S3Store, "SECONDS_BEFORE_ANOTHER_TRY", 0.001)
        address = f"s3://mlflow/{key}"
        return S3Store(address.rsplit("/", 1)[0]), address, proxies[-1]

    yield make
    for proxy in proxies:
        proxy.close()


@pytest.fixture
def entry() -> Callable[..., FileEntry]:
    return lambda **changes: FileEntry(**{"name": "40_G.pth", "size": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()} | changes)


def test_connections_that_break_cost_their_range_only(behind, entry, tmp_path):
    assert len(CONTENT) > 3 * RANGE
    store, address, proxy = behind(cuts=3)
    store.fetch(address, entry(), tmp_path / "G")
    assert proxy.left == 0
    assert (tmp_path / "G").read_bytes() == CONTENT


def test_a_connection_that_always_breaks_is_an_outage_and_leaves_nothing(behind, entry, tmp_path):
    store, address, proxy = behind(cuts=10**6)
    with pytest.raises(StoreUnavailable, match=f"{address}: the store does not answer"):
        store.fetch(address, entry(), tmp_path / "G")
    assert not (tmp_path / "G").exists()


@pytest.mark.parametrize(
    "expected, told",
    [
        ({"sha256": "0" * 64}, r"40_G.pth has other content than the manifest says \(SHA-256 differs\)"),
        ({"size": len(CONTENT) - 1}, f"40_G.pth has {len(CONTENT)} bytes; the manifest says {len(CONTENT) - 1}"),
        ({"name": "40_E.pth"}, "40_E.pth is missing"),
    ],
    ids=["altered", "longer", "missing"],
)
def test_what_is_not_what_the_manifest_says_is_named_and_leaves_nothing(behind, entry, tmp_path, expected, told):
    store, address, _ = behind(cuts=0)
    with pytest.raises(CheckpointError, match=told):
        store.fetch(address, entry(**expected), tmp_path / "G")
    assert not (tmp_path / "G").exists()


def test_what_is_there_already_is_not_touched(behind, entry, tmp_path):
    store, address, _ = behind(cuts=0)
    (tmp_path / "G").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        store.fetch(address, entry(), tmp_path / "G")
    assert (tmp_path / "G").read_bytes() == b"precious"
