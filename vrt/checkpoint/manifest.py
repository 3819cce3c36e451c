"""The manifest: what makes some files one checkpoint. A checkpoint without its manifest does not exist."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vrt.checkpoint.errors import CheckpointError
from vrt.checkpoint.serialize import sha256_of

FORMAT = 1


@dataclass(frozen=True)
class FileEntry:
    """A file of a checkpoint: its size in bytes and its digest in hexadecimal."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """One checkpoint of one lineage at one step."""

    lineage: str
    """The training it belongs to: NAME-FINGERPRINT."""
    step: int
    files: tuple[FileEntry, ...]
    metrics: dict[str, float]
    """The newest value of each metric at this step."""
    identity: dict[str, Any]
    """What must not change under the lineage (`Params.identity` and the data digest)."""
    origin: dict[str, str]
    """Where it was made: code version, host, attempt, time. Not part of the content."""
    format: int = FORMAT

    @property
    def digest(self) -> str:
        """SHA-256 of the content: equal for the same step of the same lineage with the same bytes, wherever it was made."""
        content = {"lineage": self.lineage, "step": self.step, "files": [asdict(file) for file in self.files]}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def file(self, suffix: str) -> FileEntry | None:
        """The file whose name ends in `suffix`, such as `_G.pth`."""
        return next((file for file in self.files if file.name.endswith(suffix)), None)

    def to_bytes(self) -> bytes:
        """JSON with sorted keys and the digest: equal manifests give equal bytes."""
        return json.dumps(asdict(self) | {"digest": self.digest}, indent=1, sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> "Manifest":
        """Raises CheckpointError, naming `source`, where the bytes are no manifest of a format known here."""
        try:
            fields = json.loads(data)
            if fields["format"] != FORMAT:
                raise CheckpointError(f"{source}: manifest format {fields['format']}; this version reads format {FORMAT}: update vrt")
            digest = fields.pop("digest")
            manifest = cls(**{**fields, "files": tuple(FileEntry(**file) for file in fields["files"])})
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{source}: no readable manifest ({type(error).__name__}: {error})") from error
        if digest != manifest.digest:
            raise CheckpointError(f"{source}: the manifest's own digest does not match its content; it was altered or damaged")
        taken = manifest_name(manifest.step)
        for name in (str(file.name) for file in manifest.files):
            if not name.startswith(f"{manifest.step}_") or "/" in name or name == taken:
                raise CheckpointError(f"{source}: {name!r} is no name of a file of step {manifest.step}; the manifest was forged")
        return manifest


def manifest_name(step: int) -> str:
    """The file that makes the files of a step a checkpoint."""
    return f"{step}_manifest.json"


def problems_of(manifest: Manifest, folder: Path) -> list[str]:
    """What is wrong with a checkpoint's files in `folder`, each by name. Empty: all bytes are as the manifest says."""
    problems = []
    for file in manifest.files:
        path = folder / file.name
        try:
            if not path.is_file():
                problems.append(f"{file.name} is missing")
            elif path.stat().st_size != file.size:
                problems.append(f"{file.name} has {path.stat().st_size} bytes; the manifest says {file.size}")
            elif sha256_of(path) != file.sha256:
                problems.append(f"{file.name} has other content than the manifest says (SHA-256 differs)")
        except OSError as error:
            problems.append(f"{file.name} can't be read ({error.strerror})")
    return problems
