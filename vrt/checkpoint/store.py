"""The store: an S3 bucket that holds what is published. What was put there is read back before it counts."""

import hashlib
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

from vrt.checkpoint.errors import CheckpointError, Missing, StoreUnavailable
from vrt.checkpoint.manifest import FileEntry, Manifest, manifest_name
from vrt.checkpoint.phases import Phase, reached
from vrt.checkpoint.ranges import in_order
from vrt.observe import log, progress

MB = 1_000_000

FILES_AT_ONCE = 2


class Store(Protocol):
    """Where published checkpoints are, one folder per step."""

    def publish(self, manifest: Manifest, folder: Path) -> str:
        """Upload a committed checkpoint from `folder`, verify it there, and return its address. Safe to repeat."""

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

    def __init__(self, prefix: str):
        self._prefix = prefix.rstrip("/")
        self._client = None

    def publish(self, manifest: Manifest, folder: Path) -> str:
        address = self._address(manifest.step)
        with self._guarded(address) as client:
            bucket, key = _split(address)

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
        address = self._address(step)
        with self._guarded(address) as client:
            bucket, key = _split(address)
            client.upload_file(str(folder / file.name), bucket, f"{key}/{file.name}", Callback=lambda _: reached(Phase.UPLOAD))
            reached(Phase.READ_BACK)

    def _address(self, step: int) -> str:
        return f"{self._prefix}/{step:08d}"

    def manifest(self, address: str) -> Manifest:
        step = int(address.rsplit("/", 1)[1])
        with self._guarded(address) as client:
            bucket, key = _split(address)
            body = client.get_object(Bucket=bucket, Key=f"{key}/{manifest_name(step)}")["Body"].read()
        return Manifest.from_bytes(body, address)

    def published(self) -> dict[int, str]:
        """The address of each step that has a manifest here: all that was published, registered or not."""
        return {step: f"{self._prefix}/{step:08d}" for step, names in self._listed().items() if manifest_name(step) in names}

    def _listed(self) -> dict[int, dict[str, datetime]]:
        """When each object was written, by step and file name."""
        found: dict[int, dict[str, datetime]] = {}
        with self._guarded(self._prefix) as client:
            bucket, key = _split(f"{self._prefix}/")
            for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key):
                for entry in page.get("Contents", []):
                    folder, _, name = entry["Key"].removeprefix(key).partition("/")
                    if folder.isdecimal() and name:
                        found.setdefault(int(folder), {})[name] = entry["LastModified"]
        return found

    def fetch(self, address: str, file: FileEntry, path: Path) -> None:
        log.info("fetching %s/%s (%.1f MB)", address, file.name, file.size / 1e6)
        digest, arrived = hashlib.sha256(), 0
        try:
            with path.open("xb") as target, progress(f"fetch {file.name}", max(1, file.size // MB), "MB") as bar:
                for data in self._ranges(address, file):
                    digest.update(data)
                    target.write(data)
                    bar.advance((arrived + len(data)) // MB - arrived // MB)
                    arrived += len(data)
            # Not synced, which would take as long again: what a power cut takes is found by its digest, and fetched again.
            if digest.hexdigest() != file.sha256:
                raise CheckpointError(f"{address}: {file.name} has other content than the manifest says (SHA-256 differs)")
        except FileExistsError:
            raise
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def problems(self, address: str, manifest: Manifest, advance: Callable[[int], None] = lambda size: None) -> list[str]:
        """What is wrong with a checkpoint's objects, each by name, after reading every byte. Empty: all are as the manifest says.

        `advance` is told the bytes read so far, piece by piece.
        """
        found = []
        for file in manifest.files:
            digest = hashlib.sha256()
            try:
                for data in self._ranges(address, file):
                    digest.update(data)
                    advance(len(data))
                if digest.hexdigest() != file.sha256:
                    found.append(f"{file.name} has other content than the manifest says (SHA-256 differs)")
            except CheckpointError as error:
                found.append(str(error))
        return found

    def _ranges(self, address: str, file: FileEntry) -> Iterator[memoryview]:
        """The object's bytes in order, in pieces that stay in the processor's cache while they are hashed and written.

        Raises CheckpointError where the object is missing or not of that size.
        """
        with self._guarded(address) as client:
            bucket, key = _split(f"{address}/{file.name}")
            try:
                size = client.head_object(Bucket=bucket, Key=key)["ContentLength"]
            except client.exceptions.ClientError as error:
                if _status(error) == 404:
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
                refused = isinstance(error, ClientError) and _status(error) < 500
                if refused or attempt == self.TRIES:
                    raise
                log.info("%s: %d bytes from %d on did not arrive (%s); asking again", key, len(into) - done, start + done, error)
                time.sleep(self.SECONDS_BEFORE_ANOTHER_TRY * 2**attempt)

    def delete(self, address: str) -> None:
        """Delete a step, its manifest first: where this is cut off, what is left is no checkpoint. Deleting what is gone does nothing."""
        step = int(address.rsplit("/", 1)[1])
        names = sorted(self._listed().get(step, {}), key=lambda name: name != manifest_name(step))
        with self._guarded(address) as client:
            bucket, key = _split(address)
            for name in names:
                client.delete_object(Bucket=bucket, Key=f"{key}/{name}")

    def sweep(self, older_than: timedelta) -> list[int]:
        """Delete what cut-off uploads and deletes left: objects of steps without a manifest, all of them older than that. Returns the steps.

        An upload that is going on has no manifest yet either, which is why age counts.
        """
        now = datetime.now(UTC)
        left = [
            step
            for step, names in self._listed().items()
            if manifest_name(step) not in names and all(now - written > older_than for written in names.values())
        ]
        for step in left:
            self.delete(f"{self._prefix}/{step:08d}")
        return left

    def clear(self) -> int:
        """Delete every object below the prefix; returns how many there were."""
        deleted = 0
        with self._guarded(self._prefix) as client:
            bucket, key = _split(self._prefix)
            for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{key}/"):
                for entry in page.get("Contents", []):
                    client.delete_object(Bucket=bucket, Key=entry["Key"])
                    deleted += 1
        return deleted

    def _sha256(self, client, bucket: str, key: str, size: int) -> str | None:
        """Digest of the object's bytes; None where there is no such object of that size, or not with the bytes that were sent."""
        from botocore.exceptions import ClientError, FlexibleChecksumError

        try:
            if client.head_object(Bucket=bucket, Key=key)["ContentLength"] != size:
                return None
        except ClientError as error:
            if _status(error) == 404:
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
    def _guarded(self, address: str) -> Iterator:
        """Yield the S3 client; its errors leave as ours, told apart by whether trying again can help."""
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
                self._client = boto3.client("s3", config=config)
            yield self._client
        except NoCredentialsError as error:
            raise StoreUnavailable(f"{address}: no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
        except (BotoCoreError, Boto3Error, ClientError) as error:
            # An upload hides the store's answer in an error of its own.
            answer = next((e for e in (error, error.__cause__, error.__context__) if isinstance(e, ClientError)), None)
            if answer is None:
                raise StoreUnavailable(f"{address}: the store does not answer ({error})") from error
            if answer.response.get("Error", {}).get("Code") in ("NoSuchKey", "404"):
                raise Missing(f"{address}: there is no such object in the store ({answer})") from error
            # Rights can be mended while the training goes on, so this is no verdict on the checkpoint.
            raise StoreUnavailable(f"{address}: the store refused ({answer}); check the credentials, the bucket and its policy") from error


class S3Notes:
    """Small texts below `prefix` of the same server, one object each: where trainers claim a lineage (`vrt.checkpoint.lease.Notes`)."""

    def __init__(self, prefix: str):
        self._store, self._prefix = S3Store(prefix), prefix.rstrip("/")

    def all(self) -> dict[str, str]:
        with self._store._guarded(self._prefix) as client:
            bucket, key = _split(self._prefix)
            names = [each["Key"].rsplit("/", 1)[1] for each in client.list_objects_v2(Bucket=bucket, Prefix=f"{key}/").get("Contents", [])]
            found = {}
            for name in names:
                # Another trainer may clear away old claims meanwhile.
                with suppress(client.exceptions.NoSuchKey):
                    found[name] = client.get_object(Bucket=bucket, Key=f"{key}/{name}")["Body"].read().decode()
            return found

    def create(self, name: str, text: str) -> bool:
        from botocore.exceptions import ClientError

        with self._store._guarded(self._prefix) as client:
            bucket, key = _split(self._prefix)
            try:
                client.put_object(Bucket=bucket, Key=f"{key}/{name}", Body=text.encode(), IfNoneMatch="*")
            except ClientError as error:
                # 409: someone else is creating it at this moment.
                if _status(error) in (409, 412):
                    return False
                raise
        return True

    def write(self, name: str, text: str) -> None:
        with self._store._guarded(self._prefix) as client:
            bucket, key = _split(self._prefix)
            client.put_object(Bucket=bucket, Key=f"{key}/{name}", Body=text.encode())

    def remove(self, name: str) -> None:
        with self._store._guarded(self._prefix) as client:
            bucket, key = _split(self._prefix)
            client.delete_object(Bucket=bucket, Key=f"{key}/{name}")

    def are_exclusive(self) -> bool:
        """Whether `create` refuses what exists, tried out: many servers take the condition and ignore it, or don't know it."""
        name = f"probe-{uuid.uuid4().hex}"
        try:
            return self.create(name, "first") and not self.create(name, "second") and self.all().get(name) == "first"
        except StoreUnavailable as error:
            if _status(error.__cause__) not in (400, 501):
                raise
            return False
        finally:
            self.remove(name)


def _status(error) -> int:
    return getattr(error, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def _split(address: str) -> tuple[str, str]:
    """s3://bucket/key -> (bucket, key). Raises CheckpointError where it is no S3 address."""
    if not address.startswith("s3://") or "/" not in address[5:]:
        raise CheckpointError(
            f"{address}: expected an s3://bucket/... address; checkpoints are kept in S3: create the experiment with an S3 artifact location"
        )
    bucket, key = address[5:].split("/", 1)
    return bucket, key
