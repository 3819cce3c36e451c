"""What a trainer does with its buckets is what deploy/s3-policy.json allows, and no more is allowed."""

import json
import re
from pathlib import Path

import pytest
from configobj import ConfigObj

from tests.stages.fault_proxy import FaultProxy

POLICY = Path(__file__).parents[2] / "deploy" / "s3-policy.json"
# Sent where a large upload fails, which none does here.
UNSEEN = {"s3:AbortMultipartUpload"}


def action(method: str, path: str) -> str:
    """The right that a request needs."""
    place, _, query = path.partition("?")
    _, _, key = place.lstrip("/").partition("/")
    match method, bool(key):
        case (("GET" | "HEAD"), False):
            return "s3:ListBucket"
        case (("GET" | "HEAD"), True):
            return "s3:GetObject"
        case (("PUT" | "POST"), True) if "delete" not in query:
            return "s3:PutObject"
        case ("DELETE", True) | ("POST", _):
            return "s3:DeleteObject"
    raise AssertionError(f"{method} {path}: not known here")


@pytest.mark.long
def test_the_policy_is_what_trainers_and_workers_do(make_workspace):
    workspace = make_workspace("rights")
    workspace.edit(train__total_steps=16, checkpoints__keep_last=1)
    seen: set[str] = set()
    buckets: set[str] = set()
    with FaultProxy(workspace.environment["MLFLOW_S3_ENDPOINT_URL"]) as proxy:

        def record(method: str, path: str, _has_body: bool) -> None:
            seen.add(action(method, path))
            buckets.add(re.match(r"/([\w-]+)", path)[1])

        proxy.choose = record
        to_proxy = {"MLFLOW_S3_ENDPOINT_URL": proxy.address, "AWS_ENDPOINT_URL": proxy.address}
        config = ConfigObj(str(workspace.root / ".dvc" / "config.local"))
        config['remote "storage"']["endpointurl"] = proxy.address
        config.write()
        for command in (
            ["vrt", "doctor"],
            ["dvc", "repro"],
            ["dvc", "push"],
            ["vrt", "checkpoints", "verify"],
            ["vrt", "evaluate", "--checkpoint", "latest"],
            ["vrt", "checkpoints", "fetch", "--to", "elsewhere"],
        ):
            ended = workspace.run(*command, variables=to_proxy)
            assert ended.returncode == 0, ended.stdout
    statements = json.loads(POLICY.read_text())["Statement"]
    assert {action for statement in statements for action in statement["Action"]} == seen | UNSEEN
    assert {resource.split(":::")[1].split("/")[0] for statement in statements for resource in statement["Resource"]} == buckets
