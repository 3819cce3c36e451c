"""Runs `vrt` commands in forked children, so that hundreds of trainings pay for importing torch and MLflow once.

Reads one JSON object a line from stdin: {"arguments", "folder", "environment", "log"}. Answers with the child's process id, and when
that ended, with its return code as `subprocess` gives it. Start it as a process of its own: a fork is only safe before any thread is started.
"""

import json
import os
import sys
import threading

import boto3
import mlflow.tracking.client
import torch  # noqa: F401

import vrt.stages.train  # noqa: F401
from vrt.cli import main


def run(order: dict) -> None:
    """Be the child that runs one command."""
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os._exit(main(order["arguments"]))


def serve() -> None:
    # What these load lazily is loaded here.
    mlflow.tracking.client.MlflowClient("http://127.0.0.1:9")
    boto3.client("s3", region_name="us-east-1", aws_access_key_id="none", aws_secret_access_key="none")
    boto3.DEFAULT_SESSION = None
    for line in sys.stdin:
        assert threading.active_count() == 1
        pid = os.fork()
        if not pid:
            try:
                run(json.loads(line))
            finally:
                os._exit(70)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
