"""The store: an S3 bucket that holds what is published. What was put there is read back before it counts."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from vrt.checkpoint.errors import CheckpointError, StoreUnavailable
from vrt.checkpoint.manifest import FileEntry, Manifest, manifest_name
from vrt.checkpoint.phases import Phase, reached
from vrt.observe import log


class Store(Protocol):
    """Where published checkpoints are, one folder per step."""

    def publish(self, manifest: Manifest, folder: Path) -> str:
        """Upload a committed checkpoint from `folder`, verify it there, and return its address. Safe to repeat."""

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
        address = f"{self._prefix}/{manifest.step:08d}"
        with self._guarded(address) as client:
            bucket, key = _split(address)
            for file in manifest.files:
                if self._sha256(client, bucket, f"{key}/{file.name}", file.size) != file.sha256:
                    client.upload_file(str(folder / file.name), bucket, f"{key}/{file.name}", Callback=lambda _: reached(Phase.UPLOAD))
                    reached(Phase.READ_BACK)
                    # Not every store checks a checksum that is sent along, so the bytes themselves are read back.
                    if self._sha256(client, bucket, f"{key}/{file.name}", file.size) != file.sha256:
                        raise StoreUnavailable(f"{address}/{file.name}: read back other bytes than were uploaded; uploading again")
            reached(Phase.UPLOAD)
            name, content = manifest_name(manifest.step), manifest.to_bytes()
            client.put_object(Bucket=bucket, Key=f"{key}/{name}", Body=content)
            # The last to be written, and the first to be read: spoiled, it would make the whole checkpoint unreadable.
            if self._sha256(client, bucket, f"{key}/{name}", len(content)) != hashlib.sha256(content).hexdigest():
                raise StoreUnavailable(f"{address}/{name}: read back other bytes than were uploaded; uploading again")
        return address

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


def _status(error) -> int:
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def _split(address: str) -> tuple[str, str]:
    """s3://bucket/key -> (bucket, key). Raises CheckpointError where it is no S3 address."""
    if not address.startswith("s3://") or "/" not in address[5:]:
        raise CheckpointError(
            f"{address}: expected an s3://bucket/... address; checkpoints are kept in S3: create the experiment with an S3 artifact location"
        )
    bucket, key = address[5:].split("/", 1)
    return bucket, key
