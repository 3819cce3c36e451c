"""The store: an S3 bucket that holds what is published. What was put there is read back before it counts."""

import hashlib
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from vrt.checkpoint.errors import CheckpointError, StoreUnavailable
from vrt.checkpoint.manifest import FileEntry, Manifest, manifest_name
from vrt.checkpoint.phases import Phase, reached
from vrt.observe import log

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
        """Download one file to `path`."""


class S3Store:
    """A `Store` below `prefix` (s3://bucket/key) of the S3 server that the AWS environment variables describe."""

    CHUNK = 1 << 20

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

    def fetch(self, address: str, file: FileEntry, path: Path) -> None:
        with self._guarded(address) as client:
            bucket, key = _split(address)
            log.info("fetching %s/%s (%.1f MB)", address, file.name, file.size / 1e6)
            client.download_file(bucket, f"{key}/{file.name}", str(path))

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
                config = Config(connect_timeout=5, read_timeout=60, retries={"max_attempts": 2}, s3={"addressing_style": "path"})
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
                raise CheckpointError(f"{address}: there is no such object in the store ({answer})") from error
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
