"""Serve a registered model on this machine, until Ctrl-C or, with keep=true, until `python -m jobs.down`.

It always starts a Ray of its own; the registry is that of MLFLOW_TRACKING_URI, else the one in `storage`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from pydantic import Field

from jobs import _deploy
from jobs._process import claim
from jobs._run import Job, run
from jobs._stack import Stack
from pipeline.tracking import registry


class Deploy(Job):
    """What is served, and how long.

    Attributes:
        port: of the endpoint; None takes a free one.
        num_cpus: logical CPUs of the local Ray; replicas share them.
    """

    model: str
    alias: str = "champion"
    port: int | None = Field(default=None, ge=1, le=65535)
    num_cpus: int = Field(default=4, ge=2)
    keep: bool = False


def deploy(job: Deploy) -> None:
    """Start MLflow, Ray and the endpoint, and say where it is."""
    Stack.refuse_second(job.store)
    if job.port is not None:
        claim(job.port, "the endpoint")  # found before anything starts
    with Stack(job.store) as stack:
        uri = os.environ.get("MLFLOW_TRACKING_URI") or stack.mlflow().address
        registry.resolve(uri, f"{job.model}@{job.alias}")  # what is missing is found before Ray starts
        head = stack.ray(num_cpus=job.num_cpus)
        config = _deploy.application([job.model], job.alias, uri, job.store)
        endpoint = _deploy.deploy(head, config, port=job.port)
        print(f"endpoint {endpoint}/predict/{job.model}")
        print(f"try      curl --data-binary @IMAGE {endpoint}/predict/{job.model}", flush=True)
        if job.keep:
            stack.keep()
        else:
            print("serving until Ctrl-C", flush=True)
            signal.pause()


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line: python -m jobs.deploy model=digits [port=8000]."""
    return run(Deploy, deploy, argv)


if __name__ == "__main__":
    sys.exit(main())
