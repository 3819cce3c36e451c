"""What deploy/ has for S3: the policy allows what a trainer does with its buckets and no more; the lifecycle expires nothing current."""

import json
from pathlib import Path

import botocore.session
import pytest
from botocore.validate import ParamValidator
from configobj import ConfigObj

from tests.stages.fault_proxy import FaultProxy

DEPLOY = Path(__file__).parents[2] / "deploy"
POLICY, LIFECYCLE = DEPLOY / "s3-policy.json", DEPLOY / "s3-lifecycle.json"
# Sent where a large upload fails, which none does here.
UNSEEN = {(f"arn:aws:s3:::{bucket}/*", "s3:AbortMultipartUpload") for bucket in ("mlflow", "dvc")}


def right(method: str, path: str) -> tuple[str, str]:
    """(resource, action): what a policy has to allow for a request."""
    place, _, query = path.partition("?")
    bucket, _, key = place.lstrip("/").partition("/")
    objects = f"arn:aws:s3:::{bucket}/*"
    match method, bool(key):
        case (("GET" | "HEAD"), False):
            return f"arn:aws:s3:::{bucket}", "s3:ListBucket"
        case (("GET" | "HEAD"), True):
            return objects, "s3:GetObject"
        case (("PUT" | "POST"), True) if "delete" not in query:
            return objects, "s3:PutObject"
        case ("DELETE", True) | ("POST", _):
            return objects, "s3:DeleteObject"
    raise AssertionError(f"{method} {path}: not known here")


@pytest.mark.long
def test_the_policy_is_what_trainers_and_workers_do(make_workspace):
    workspace = make_workspace("rights")
    workspace.edit(train__total_steps=16, checkpoints__keep_last=1)
    seen: set[tuple[str, str]] = set()
    with FaultProxy(workspace.environment["MLFLOW_S3_ENDPOINT_URL"]) as proxy:

        def record(method: str, path: str, _has_body: bool) -> None:
            seen.add(right(method, path))

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
    allowed = {(resource, action) for statement in statements for resource in statement["Resource"] for action in statement["Action"]}
    assert allowed == seen | UNSEEN


def test_the_lifecycle_is_one_that_s3_takes_and_expires_nothing_that_is_current():
    rules = json.loads(LIFECYCLE.read_text())
    asked = botocore.session.get_session().get_service_model("s3").operation_model("PutBucketLifecycleConfiguration").input_shape
    report = ParamValidator().validate({"Bucket": "mlflow", "LifecycleConfiguration": rules}, asked)
    assert not report.has_errors(), report.generate_report()
    forms = {"ID", "Status", "Filter", "AbortIncompleteMultipartUpload", "NoncurrentVersionExpiration", "Expiration"}
    for rule in rules["Rules"]:
        assert rule["Status"] == "Enabled" and rule.keys() <= forms
        # What is left of a deleted object once its versions are gone.
        assert rule.get("Expiration", {"ExpiredObjectDeleteMarker": True}) == {"ExpiredObjectDeleteMarker": True}
    assert {name for rule in rules["Rules"] for name in rule} == forms
