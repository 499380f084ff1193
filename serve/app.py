"""The application: the only place where deployments are bound into a graph. Ray Serve imports it as `serve.app:build`.

One ingress deployment, and one deployment per model, named after it and scaled by its own load.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray.serve
from ray.serve.config import AutoscalingConfig

from pipeline import config
from serve import keys, reconciler
from serve.deployments import Replica
from serve.ingress import Endpoint
from serve.keys import Access
from serve.schemas import AppArgs, Autoscaling, ModelArgs, Served

INGRESS = "ingress"
START_ATTEMPTS = 3  # of a replica, before the deployment has failed; 20 by default


def build(args: dict[str, Any]) -> ray.serve.Application:
    """The graph for `AppArgs`, every model's version settled and its bundle on disk.

    Raises:
        ConfigError: the arguments are not `AppArgs`, the keys are damaged, or others could ask without any.
        TrackingError: the registry does not answer or has no such model.
        BundleError: a bundle is damaged.
    """
    wanted = config.parse(AppArgs, args, "serve.app args")
    access = keys.settle(wanted)
    served = reconciler.reconcile(wanted)
    handles = {model.name: _bind(model, found) for model, found in zip(wanted.models, served, strict=True)}
    return _bind_ingress(wanted, served, handles, access)


def _bind(args: ModelArgs, served: Served) -> ray.serve.Application:
    deployment = ray.serve.deployment(
        name=args.name,
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        autoscaling_config=_autoscaling(args.autoscaling, args.batch.max_size),
        max_ongoing_requests=4 * args.batch.max_size,  # one batch computed, one waiting, two being decoded
        max_queued_requests=args.max_queued,
        max_surge_percent=100,  # an old replica answers until its successor does
        max_constructor_retry_count=START_ATTEMPTS,
    )
    return deployment(Replica).bind(served, args)


def _bind_ingress(
    args: AppArgs, served: list[Served], handles: Mapping[str, Any], access: Access
) -> ray.serve.Application:
    deployment = ray.serve.deployment(
        name=INGRESS,
        num_replicas=args.ingress_replicas,
        ray_actor_options={"num_cpus": args.ingress_cpus},
        max_ongoing_requests=2 * args.limits.max_inflight + 16,  # the ingress refuses for itself, as JSON
        max_surge_percent=100,
        max_constructor_retry_count=START_ATTEMPTS,
    )
    return deployment(ray.serve.ingress()(Endpoint)).bind(served, args.limits, dict(handles), access)


def _autoscaling(args: Autoscaling, batch_size: int) -> AutoscalingConfig:
    return AutoscalingConfig(
        min_replicas=args.min_replicas,
        max_replicas=args.max_replicas,
        target_ongoing_requests=args.target_ongoing_requests or 2 * batch_size,
        upscale_delay_s=args.upscale_delay_s,
        downscale_delay_s=args.downscale_delay_s,
        look_back_period_s=args.look_back_s,
    )
