"""Which training params and data define, and where its checkpoints come from."""

import platform

from vrt.checkpoint.policy import ResumePolicy
from vrt.checkpoint.tracking import Lineage
from vrt.data.clips import PreparedData
from vrt.params import Params, fingerprint
from vrt.stages.provenance import code_version


def lineage_of(params: Params, data: PreparedData) -> Lineage:
    """The training that these params and these data define."""
    identity = params.identity() | {"data.digest": data.digest}
    if parent := ResumePolicy.parse(params.checkpoints.resume).parent:
        # With the same params as its parent it is still another training.
        identity["fork"] = parent
    return Lineage(params.name, fingerprint(identity), identity)


def origin_here(lineage: Lineage, attempt: str) -> dict[str, str]:
    """Where a checkpoint is made."""
    parent = {"parent": lineage.identity["fork"]} if "fork" in lineage.identity else {}
    return {"attempt": attempt, "code_version": code_version(), "host": platform.node()} | parent
