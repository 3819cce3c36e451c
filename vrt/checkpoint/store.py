"""The store: an S3 bucket that holds what is published. What was put there is read back before it counts."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vrt.checkpoint.answers import as_ours, seconds_ahead, status
from vrt.checkpoint.errors import CheckpointError, StoreUnavailable
from vrt.checkpoint.manifest import FileEntry, Manifest, manifest_name
from vrt.checkpoint.phases import Phase, reached
from vrt.checkpoint.ranges import in_order
from vrt.observe import log, progress

if TYPE_CHECKING:
    import boto3

MB = 1_000_000

FILES_AT_ONCE = 2


class Store(Protocol):
    """Where published checkpoints are, one folder per step."""

    def publish(self, manifest: Manifest, folder: Path) -> str:
        """Upload a committed checkpoint from `folder`, verify it there, and return its address. Safe to repeat."""

    def put_beside(self, address: str, files: Mapping[str, bytes]) -> None:
        """Put small files beside a published checkpoint. They are no part of it, and go with it."""

    def upload(self, step: int, file: FileEntry, folder: Path) -> None:
        """Upload one file of a step that is still being committed, so that less is left for `publish`, which verifies it."""

    def manifest(self, address: str) -> Manifest:
        """The manifest of a published checkpoint."""

    def fetch(self, address: str, file: FileEntry, path: Path) -> None:
        """Download one file to `path`, a new one. Raises CheckpointError where what arrives is not what `file` says; then nothing is left there."""


class S3Store:
    """A `Store` below `prefix` (s3://bucket/key) of the S3 server that the AWS environment variables describe."""

    CHUNK = 1 << 20
    PIECE = 1 << 20
    TRIES = 4
    SECONDS_BEFORE_ANOTHER_TRY = 0.1

    def __init__(self, prefix: str, session: "boto3.Session | None" = None):
        """`session`: whose key to use; None: that of the environment."""
        self._prefix = prefix.rstrip("/")
        self._session = session
        self._client = None

    def publish(self, manifest: Manifest, folder: Path) -> str:
        """Upload what is not there yet, read every byte back, and write the manifest last: a step that has one is whole.

        Raises StoreUnavailable where other bytes come back than were sent, or none.
        """
        address = self._address(manifest.step)
        with self.guarded(address) as client:
            bucket, key = split(address)

            def put(file: FileEntry) -> None:
                if self._sha256(client, bucket, f"{key}/{file.name}", file.size) != file.sha256:
                    client.upload_file(str(folder / file.name), bucket, f"{key}/{file.name}", Callback=lambda _: reached(Phase.UPLOAD))
                    reached(Phase.READ_BACK)
                    # Not every store checks a checksum that is sent along, so the bytes themselves are read back.
                    if self._sha256(client, bucket, f"{key}/{file.name}", file.size) != file.sha256:
                        raise StoreUnavailable(f"{address}/{file.name}: read back other bytes than were uploaded; uploading again")

            # One file is read back while another is uploaded.
            with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="upload") as pool:
                list(pool.map(put, manifest.files))
            reached(Phase.UPLOAD)
            name, content = manifest_name(manifest.step), manifest.to_bytes()
            client.put_object(Bucket=bucket, Key=f"{key}/{name}", Body=content)
            # The last to be written, and the first to be read: spoiled, it would make the whole checkpoint unreadable.
            if self._sha256(client, bucket, f"{key}/{name}", len(content)) != hashlib.sha256(content).hexdigest():
                raise StoreUnavailable(f"{address}/{name}: read back other bytes than were uploaded; uploading again")
        return address

    def upload(self, step: int, file: FileEntry, folder: Path) -> None:
        """Upload without reading back, which is left to `publish`. Raises StoreUnavailable."""
        address = self._address(step)
        with self.guarded(address) as client:
            bucket, key = split(address)
            client.upload_file(str(folder / file.name), bucket, f"{key}/{file.name}", Callback=lambda _: reached(Phase.UPLOAD))
            reached(Phase.READ_BACK)

    def put_beside(self, address: str, files: Mapping[str, bytes]) -> None:
        """Objects of their own at the same address, written over where they exist. Raises StoreUnavailable."""
        with self.guarded(address) as client:
            bucket, key = split(address)
            for name, content in files.items():
                client.put_object(Bucket=bucket, Key=f"{key}/{name}", Body=content)

    def beside(self, address: str) -> dict[str, bytes]:
        """The small files that were put at an address, by name."""
        keys = self._keys(f"{address}/")
        with self.guarded(address) as client:
            bucket, above = split(f"{address}/")
            return {key.removeprefix(above): client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}

    def _address(self, step: int) -> str:
        return f"{self._prefix}/{step:08d}"

    def manifest(self, address: str) -> Manifest:
        """Read once more where it arrives damaged. Raises CheckpointError where it is so the second time, Missing where there is none."""
        step = int(address.rsplit("/", 1)[1])
        with self.guarded(address) as client:
            bucket, key = split(address)

            def read() -> Manifest:
                return Manifest.from_bytes(client.get_object(Bucket=bucket, Key=f"{key}/{manifest_name(step)}")["Body"].read(), address)

            try:
                return read()
            except CheckpointError as error:
                log.warning("%s; reading it once more", error)
                return read()

    def published(self) -> dict[int, str]:
        """The address of each step that has a manifest here: all that was published, registered or not."""
        return {step: f"{self._prefix}/{step:08d}" for step, names in self._listed().items() if manifest_name(step) in names}

    def _listed(self) -> dict[int, dict[str, datetime]]:
        """When each object was written, by step and file name."""
        found: dict[int, dict[str, datetime]] = {}
        _, above = split(f"{self._prefix}/")
        for key, written in self._keys(f"{self._prefix}/").items():
            folder, _, name = key.removeprefix(above).partition("/")
            if folder.isdecimal() and name:
                found.setdefault(int(folder), {})[name] = written
        return found

    def _keys(self, below: str) -> dict[str, datetime]:
        """When each object whose address begins with `below` was written, by key."""
        with self.guarded(below) as client:
            bucket, prefix = split(below)
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            return {entry["Key"]: entry["LastModified"] for page in pages for entry in page.get("Contents", [])}

    def fetch(self, address: str, file: FileEntry, path: Path) -> None:
        """Download in parallel ranges, hashed as they arrive, twice at most. Raises CheckpointError where both times it is not what `file` says."""
        log.info("fetching %s/%s (%.1f MB)", address, file.name, file.size / 1e6)
        if not self._arrives(address, file, lambda: self._download(address, file, path)):
            raise CheckpointError(f"{address}: {file.name} has other content than the manifest says (SHA-256 differs)")

    def _download(self, address: str, file: FileEntry, path: Path) -> str:
        """Write the object to `path`, a new file, and return the digest of what arrived; where that is not `file`'s, nothing is left."""
        digest, arrived = hashlib.sha256(), 0
        try:
            with path.open("xb") as target, progress(f"fetch {file.name}", max(1, file.size // MB), "MB") as bar:
                for data in self._ranges(address, file):
                    digest.update(data)
                    target.write(data)
                    bar.advance((arrived + len(data)) // MB - arrived // MB)
                    arrived += len(data)
            # Not synced, which would take as long again: what a power cut takes is found by its digest, and fetched again.
        except FileExistsError:
            raise
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        if digest.hexdigest() != file.sha256:
            path.unlink()
        return digest.hexdigest()

    def _arrives(self, address: str, file: FileEntry, read: Callable[[], str]) -> bool:
        """Whether `read` returns `file`'s digest, at the second try at the latest: a bit may be lost on the way alone."""
        if read() == file.sha256:
            return True
        log.warning("%s/%s: other bytes arrived than the manifest says; reading it once more", address, file.name)
        return read() == file.sha256

    def problems(self, address: str, manifest: Manifest, advance: Callable[[int], None] = lambda size: None) -> list[str]:
        """What is wrong with a checkpoint's objects, each by name, after reading every byte. Empty: all are as the manifest says.

        `advance` is told the bytes read so far, piece by piece.
        """
        found = []
        for file in manifest.files:
            try:
                if not self._arrives(address, file, lambda file=file: self._digest(address, file, advance)):
                    found.append(f"{file.name} has other content than the manifest says (SHA-256 differs)")
            except CheckpointError as error:
                found.append(str(error))
        return found

    def _digest(self, address: str, file: FileEntry, advance: Callable[[int], None]) -> str:
        digest = hashlib.sha256()
        for data in self._ranges(address, file):
            digest.update(data)
            advance(len(data))
        return digest.hexdigest()

    def _ranges(self, address: str, file: FileEntry) -> Iterator[memoryview]:
        """The object's bytes in order, in pieces that stay in the processor's cache while they are hashed and written.

        Raises CheckpointError where the object is missing or not of that size.
        """
        with self.guarded(address) as client:
            bucket, key = split(f"{address}/{file.name}")
            try:
                size = client.head_object(Bucket=bucket, Key=key)["ContentLength"]
            except client.exceptions.ClientError as error:
                if status(error) == 404:
                    raise CheckpointError(f"{file.name} is missing") from error
                raise
            if size != file.size:
                raise CheckpointError(f"{file.name} has {size} bytes; the manifest says {file.size}")

            for data in in_order(lambda start, into: self._fill(client, bucket, key, start, into, size), size):
                yield from (data[position : position + self.PIECE] for position in range(0, len(data), self.PIECE))

    def _fill(self, client, bucket: str, key: str, start: int, into: memoryview, size: int) -> None:
        """Fill `into` with the object's bytes from `start` on. What breaks goes on where it broke, a few times, before its error leaves."""
        from botocore.exceptions import BotoCoreError, ClientError

        done = 0
        for attempt in range(1, self.TRIES + 1):
            try:
                asked = {} if len(into) == size and not done else {"Range": f"bytes={start + done}-{start + len(into) - 1}"}
                answer = client.get_object(Bucket=bucket, Key=key, **asked)
                # By its length, not by its status: some servers answer a range, rightly, with 200.
                if answer["ContentLength"] != len(into) - done:
                    raise StoreUnavailable(f"{key}: asked for {asked}, the store sends {answer['ContentLength']} bytes")
                while data := answer["Body"].read(min(self.PIECE, len(into) - done)):
                    into[done : done + len(data)] = data
                    done += len(data)
                if done == len(into):
                    return
                raise StoreUnavailable(f"{key}: the answer ended after {done} of {len(into)} bytes")
            except (BotoCoreError, ClientError, StoreUnavailable) as error:
                # What is refused is refused again; a connection may hold the next time.
                refused = isinstance(error, ClientError) and status(error) < 500
                if refused or attempt == self.TRIES:
                    raise
                log.info("%s: %d bytes from %d on did not arrive (%s); asking again", key, len(into) - done, start + done, error)
                time.sleep(self.SECONDS_BEFORE_ANOTHER_TRY * 2**attempt)

    def delete(self, address: str) -> None:
        """Delete a step, its manifest first: where this is cut off, what is left is no checkpoint. Deleting what is gone does nothing."""
        manifest = manifest_name(int(address.rsplit("/", 1)[1]))
        with self.guarded(address) as client:
            bucket, _ = split(address)
            for key in sorted(self._keys(f"{address}/"), key=lambda key: not key.endswith(f"/{manifest}")):
                client.delete_object(Bucket=bucket, Key=key)

    def sweep(self, older_than: timedelta, registered: Set[int]) -> list[int]:
        """Delete what cut-off uploads and deletes left: objects of steps without a manifest, all of them older than that. Returns the steps.

        An upload that is going on has no manifest yet either, which is why age counts. What is `registered` stays: its manifest was lost, or
        the list of objects is not whole.
        """
        now = datetime.now(UTC)
        left = [
            step
            for step, names in self._listed().items()
            if manifest_name(step) not in names and all(now - written > older_than for written in names.values())
        ]
        for step in sorted(registered & set(left)):
            log.warning("checkpoint %d is registered, and the store lists no manifest of it; see `vrt checkpoints verify`", step)
        going = [step for step in left if step not in registered]
        for step in going:
            self.delete(f"{self._prefix}/{step:08d}")
        return going

    def clear(self) -> int:
        """Delete every object below the prefix; returns how many there were."""
        keys = self._keys(f"{self._prefix}/")
        with self.guarded(self._prefix) as client:
            bucket, _ = split(self._prefix)
            for key in keys:
                client.delete_object(Bucket=bucket, Key=key)
        return len(keys)

    def seconds_ahead(self) -> float | None:
        """How far this machine's clock is ahead of the store's, which a refusal tells too; None: this store does not tell its time."""
        from botocore.exceptions import ClientError

        with self.guarded(self._prefix) as client:
            try:
                return seconds_ahead(client.head_bucket(Bucket=split(f"{self._prefix}/")[0]))
            except ClientError as error:
                return seconds_ahead(error.response)

    def _sha256(self, client, bucket: str, key: str, size: int) -> str | None:
        """Digest of the object's bytes; None where there is no such object of that size, or not with the bytes that were sent."""
        from botocore.exceptions import ClientError, FlexibleChecksumError

        try:
            if client.head_object(Bucket=bucket, Key=key)["ContentLength"] != size:
                return None
        except ClientError as error:
            if status(error) == 404:
                return None
            raise
        digest = hashlib.sha256()
        try:
            for chunk in client.get_object(Bucket=bucket, Key=key)["Body"].iter_chunks(self.CHUNK):
                digest.update(chunk)
        except FlexibleChecksumError:
            # A lenient store keeps the checksum that came with an upload beside the wrong bytes that arrived: reading them fails for ever.
            return None
        return digest.hexdigest()

    @contextmanager
    def guarded(self, address: str) -> Iterator:
        """Yield the S3 client; its errors leave as ours: Missing for an object that is not there, StoreRefuses for a no, else StoreUnavailable."""
        import boto3
        from boto3.exceptions import Boto3Error
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

        try:
            if self._client is None:
                config = Config(
                    connect_timeout=5,
                    read_timeout=60,
                    retries={"max_attempts": 2},
                    s3={"addressing_style": "path"},
                    # All that is read is hashed here. Where it checks too, botocore fails over a 503 with an AttributeError.
                    response_checksum_validation="when_required",
                )
                self._client = (self._session or boto3).client("s3", config=config)
            yield self._client
        except NoCredentialsError as error:
            raise StoreUnavailable(f"{address}: no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
        except (BotoCoreError, Boto3Error, ClientError) as error:
            # An upload hides the store's answer in an error of its own.
            answer = next((e for e in (error, error.__cause__, error.__context__) if isinstance(e, ClientError)), None)
            if answer is None:
                raise StoreUnavailable(f"{address}: the store does not answer ({error})") from error
            raise as_ours(address, answer) from error


def split(address: str) -> tuple[str, str]:
    """s3://bucket/key -> (bucket, key). Raises CheckpointError where it is no S3 address."""
    if not address.startswith("s3://") or "/" not in address[5:]:
        raise CheckpointError(
            f"{address}: expected an s3://bucket/... address; checkpoints are kept in S3: create the experiment with an S3 artifact location"
        )
    bucket, key = address[5:].split("/", 1)
    return bucket, key
