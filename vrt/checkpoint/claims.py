"""Where trainers claim a lineage (`vrt.checkpoint.lease.Notes`): in the store where that creates an object only once, else on the run."""

import time
import uuid
from contextlib import suppress

from vrt.checkpoint.answers import status
from vrt.checkpoint.errors import StoreUnavailable
from vrt.checkpoint.lease import Notes
from vrt.checkpoint.registry import MlflowRegistry
from vrt.checkpoint.store import S3Store, split

LEASE = "vrt.lease."
# Longer than a trainer that looks and then writes takes in between.
SECONDS_TO_SETTLE = 1.0


def claims_on(registry: MlflowRegistry) -> Notes:
    """The claims on the registry's lineage, in the same place for every trainer: what the first one found is noted on the run."""
    in_store = S3Notes(registry.lease_address)
    kind = registry.lease_kind(lambda: "store" if in_store.are_exclusive() else "registry")
    return in_store if kind == "store" else RunNotes(registry)


class S3Notes:
    """Small texts below `prefix` of the same server, one object each."""

    def __init__(self, prefix: str):
        self._store, self._prefix = S3Store(prefix), prefix.rstrip("/")

    def all(self) -> dict[str, str]:
        """One request for each note. Raises StoreUnavailable where the store does not answer."""
        with self._store.guarded(self._prefix) as client:
            bucket, key = split(self._prefix)
            names = [each["Key"].rsplit("/", 1)[1] for each in client.list_objects_v2(Bucket=bucket, Prefix=f"{key}/").get("Contents", [])]
            found = {}
            for name in names:
                # Another trainer may clear away old claims meanwhile.
                with suppress(client.exceptions.NoSuchKey):
                    found[name] = client.get_object(Bucket=bucket, Key=f"{key}/{name}")["Body"].read().decode()
            return found

    def create(self, name: str, text: str) -> bool:
        """Write a note on the condition that there is none, which the store decides. False: it exists."""
        with self._store.guarded(self._prefix) as client:
            bucket, key = split(self._prefix)
            try:
                client.put_object(Bucket=bucket, Key=f"{key}/{name}", Body=text.encode(), IfNoneMatch="*")
            except client.exceptions.ClientError as error:
                # 409: someone else is creating it at this moment.
                if status(error) in (409, 412):
                    return False
                raise
        return True

    def write(self, name: str, text: str) -> None:
        """Put the note in the place of what it said before."""
        with self._store.guarded(self._prefix) as client:
            bucket, key = split(self._prefix)
            client.put_object(Bucket=bucket, Key=f"{key}/{name}", Body=text.encode())

    def remove(self, name: str) -> None:
        """Delete the object; where it is gone already, nothing happens."""
        with self._store.guarded(self._prefix) as client:
            bucket, key = split(self._prefix)
            client.delete_object(Bucket=bucket, Key=f"{key}/{name}")

    def are_exclusive(self) -> bool:
        """Whether `create` refuses what exists, tried out: many servers take the condition and ignore it, or don't know it."""
        name = f"probe-{uuid.uuid4().hex}"
        try:
            return self.create(name, "first") and not self.create(name, "second") and self.all().get(name) == "first"
        except StoreUnavailable as error:
            if status(error.__cause__) not in (400, 501):
                raise
            return False
        finally:
            self.remove(name)


class RunNotes:
    """Small texts as tags of the lineage's run, for stores that can't keep them safely."""

    def __init__(self, registry: MlflowRegistry):
        self._registry = registry

    def all(self) -> dict[str, str]:
        """Of the run's tags those that are notes. Raises StoreUnavailable where MLflow does not answer."""
        with self._registry.guarded() as client:
            tags = client.get_run(self._registry.run_id).data.tags
        return {key.removeprefix(LEASE): value for key, value in tags.items() if key.startswith(LEASE)}

    def create(self, name: str, text: str) -> bool:
        """Not atomic: who else wrote in the same moment shows when it is read back after this."""
        if name in self.all():
            return False
        self.write(name, text)
        time.sleep(SECONDS_TO_SETTLE)
        return True

    def write(self, name: str, text: str) -> None:
        """Set the tag, whatever it said before."""
        with self._registry.guarded() as client:
            client.set_tag(self._registry.run_id, LEASE + name, text)

    def remove(self, name: str) -> None:
        """Delete the tag. MLflow refuses it where there is none."""
        with self._registry.guarded() as client:
            client.delete_tag(self._registry.run_id, LEASE + name)
