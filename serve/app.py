"""The application: the only place where deployments are bound into a graph. Ray Serve imports it as `serve.app:build`.

One ingress deployment and one reconciler. The models are applications of their own, which the reconciler adds and
removes (`serve.stage`), so that a version comes and goes without this graph being deployed anew.
"""

from __future__ import annotations

from typing import Any

import ray.serve

from pipeline import config
from serve import keys, versions
from serve.endpoint import Endpoint, Minder
from serve.process import load_no_code
from serve.schemas import AppArgs
from serve.stage import QUIET, START_ATTEMPTS

INGRESS = "ingress"
RECONCILER = "reconciler"


def build(args: dict[str, Any]) -> ray.serve.Application:
    """The graph for `AppArgs`, after every model's version has been found and its bundle is on disk.

    Raises:
        ConfigError: the arguments are not `AppArgs`, the keys are damaged, or others could ask without any.
        TrackingError: the registry has no such model; or it does not answer, and no version is known from before.
        BundleError: a bundle is damaged.
    """
    load_no_code()
    wanted = config.parse(AppArgs, args, "serve.app args")
    access = keys.settle(wanted)
    versions.settle_all(wanted)
    minder = ray.serve.deployment(
        name=RECONCILER,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1000,  # every ingress process waits for news
        max_surge_percent=0,  # two would undo each other's work
        graceful_shutdown_timeout_s=2,
    )
    ingress = ray.serve.deployment(
        name=INGRESS,
        num_replicas=wanted.ingress_replicas,
        ray_actor_options={"num_cpus": wanted.ingress_cpus},
        max_ongoing_requests=2 * wanted.limits.max_inflight + 16,  # the ingress refuses for itself, as JSON
        max_surge_percent=100,  # an old replica answers until its successor does
        max_constructor_retry_count=START_ATTEMPTS,
        logging_config=QUIET,
    )
    return ingress(ray.serve.ingress()(Endpoint)).bind(wanted, access, minder(Minder).bind(wanted))
