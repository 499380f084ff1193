"""Where versions are loaded: each is an application of Ray Serve of its own, without a route, scaled by its own load.

So a version is added, drained and removed without touching another, and one that cannot be loaded takes none with it.
Its name says what it holds: `<application>+<model>+<version>+<digest of weights, arguments and code>`, so a reconciler
that is started anew finds what its predecessor has loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from typing import Any

import ray
import ray.serve
from ray.serve.api import RunTarget, run_many
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ApplicationStatus

from pipeline.errors import ClusterError, ModelError, last_raised
from pipeline.inference import golden
from serve import throttle
from serve.deployments import Replica
from serve.schemas import Autoscaling, ModelArgs, Refused, Served, Wanted

START_ATTEMPTS = 3
"""Of a replica, before its deployment has failed; 20 by default."""
STARTING_S = 60.0
"""A replica that starts so soon after its version was asked for keeps to `load_share`; a later one is needed now."""
POLL_S = 0.25
QUIET = {"enable_access_log": False}
"""Ray's own line about each request costs as much as counting it; `log_requests` has a better one."""
DRAIN_MARGIN_S = 5.0
_FAILED = {ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY}
_NOT_THERE = {ApplicationStatus.NOT_STARTED, ApplicationStatus.DEPLOY_FAILED}


@dataclass(frozen=True, slots=True)
class _Condition:
    """How an application is, and why as far as Ray Serve tells."""

    status: ApplicationStatus
    reason: str = ""

    @property
    def is_running(self) -> bool:
        return bool(self.status == ApplicationStatus.RUNNING)


class RayStage:
    """Ray Serve as `serve.follower.Stage`.

    One thread asks Ray Serve, for every model: each configuration that Ray makes, also to tell how it is, changes for
    a while how modules are pickled in the whole process, and two at a time undo each other's change.
    """

    def __init__(self, application: str, answer_s: float) -> None:
        self._application = application
        self._answer_s = answer_s
        self._handles: dict[str, Any] = {}
        self._thread = ThreadPoolExecutor(1, "ray-serve")

    def place(self, served: Served, model: ModelArgs) -> str:
        """The place of a version: another one where replicas would be others."""
        args = model.model_dump_json(exclude={"alias", "challenger", "load_s", "load_share", "keep_s"})
        code = f"{metadata.version('ventral')} {ray.get_runtime_context().get_runtime_env_string()}"
        told = f"{served.weights} {served.bundle} {args} {self._answer_s} {code}"
        return f"{self._application}+{served.name}+{served.version}+{hashlib.sha256(told.encode()).hexdigest()[:8]}"

    async def find(self, served: Served, model: ModelArgs) -> Served | None:
        """A version that is loaded, or is just being loaded; None: it is not, and nothing is done about it."""
        app = self.place(served, model)
        found = await self._settled(app, model.load_s, _NOT_THERE)
        if found.status in _NOT_THERE:
            return None
        if not found.is_running:
            raise ClusterError(f"version {served.version} is {found.status.value.lower()} for {model.load_s:g} s")
        return await self._placed(served, app)

    async def load(self, served: Served, model: ModelArgs) -> Served:
        """Load a version; the same with its place. What could not be loaded is removed again.

        Raises:
            ClusterError: no replica has loaded it within `load_s`, or each one has failed.
        """
        app = self.place(served, model)
        try:
            await self._ask(_deploy, served, model, self._answer_s, app)
            found = await self._settled(app, model.load_s, _FAILED)
            if found.status in _FAILED:
                raise ClusterError(found.reason)
            if not found.is_running:
                wants = "has the cluster the CPUs and GPUs for a second version?"
                raise ClusterError(f"version {served.version} is not loaded within {model.load_s:g} s; {wants}")
            return await self._placed(served, app)
        except BaseException:
            with contextlib.suppress(Exception):  # the reason counts
                await self.unload(app)
            raise

    async def rehearse(self, served: Served, model: ModelArgs) -> None:
        """Have a loaded version answer the golden images of its bundle, through the road of every request.

        Raises:
            ModelError: it answers otherwise than when the bundle was made.
            TimeoutError: it does not answer.
        """
        handle = self._handles[served.app]
        async with asyncio.timeout(model.load_s):  # a replica that sleeps has to be woken
            await handle.ready.remote()
            for image, expected in golden.load(served.bundle):
                wanted = Wanted(top_k=len(expected.labels), **golden.SELECTED)
                [told] = await handle.predict.remote((image,), wanted)
                if isinstance(told, Refused):
                    raise ModelError(f"{expected.file}: refused ({told.reason}): {told.message}")
                golden.check(expected, golden.answer_of(told.labels, told.scores, told.boxes))

    async def unload(self, app: str) -> None:
        """Let what is loaded in a place go, once what it has been asked is answered; does not wait for it."""
        self._handles.pop(app, None)
        await self._ask(ray.serve.delete, app, _blocking=False)

    async def loaded(self, model: ModelArgs) -> Sequence[str]:
        """Every place that a version of a model is loaded in."""
        status = await self._ask(ray.serve.status)
        return [app for app in status.applications if app.split("+")[:2] == [self._application, model.name]]

    def handles(self) -> Mapping[str, Any]:
        """How replicas are reached, by place."""
        return dict(self._handles)

    async def _ask(self, call: Callable[..., Any], *args: Any, **keys: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(call, *args, **keys))

    async def _placed(self, served: Served, app: str) -> Served:
        if app not in self._handles:
            self._handles[app] = await self._ask(ray.serve.get_app_handle, app)
        return replace(served, app=app)

    async def _settled(self, app: str, within_s: float, ends: Collection[ApplicationStatus]) -> _Condition:
        """The condition of a place that runs or has come to one of some ends; after `within_s` whatever it is in."""
        deadline = time.monotonic() + within_s
        while not ((found := await self._condition(app)).is_running or found.status in ends):
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(POLL_S)
        return found

    async def _condition(self, app: str) -> _Condition:
        status = await self._ask(ray.serve.status)
        found = status.applications.get(app)
        if found is None:
            return _Condition(ApplicationStatus.NOT_STARTED)
        reasons = [found.message, *(deployment.message for deployment in found.deployments.values())]
        return _Condition(found.status, last_raised(" ".join(reasons)))


def bound(served: Served, args: ModelArgs, answer_s: float) -> ray.serve.Application:
    """One version as a graph of one deployment, whose replicas end what they have begun within `answer_s`."""
    actor: dict[str, Any] = {"num_cpus": args.num_cpus, "num_gpus": args.num_gpus}
    if args.load_share < 1:
        restrained = throttle.python(args.load_share, time.time() + STARTING_S)
        # Serve gives a deployment without an environment the caller's, which is the application's; so here.
        actor["runtime_env"] = {**ray.get_runtime_context().runtime_env, "py_executable": restrained}
    deployment = ray.serve.deployment(
        name=args.name,
        ray_actor_options=actor,
        autoscaling_config=_autoscaling(args.autoscaling, args.batch.max_size),
        max_ongoing_requests=4 * args.batch.max_size,  # one batch computed, one waiting, two being decoded
        max_queued_requests=args.max_queued,
        max_constructor_retry_count=START_ATTEMPTS,
        logging_config=QUIET,
        graceful_shutdown_timeout_s=answer_s + DRAIN_MARGIN_S,
    )
    return deployment(Replica).bind(served, args)


def _autoscaling(args: Autoscaling, batch_size: int) -> AutoscalingConfig:
    return AutoscalingConfig(
        min_replicas=args.min_replicas,
        initial_replicas=max(1, args.min_replicas),  # to be seen to answer, also what may sleep later
        max_replicas=args.max_replicas,
        target_ongoing_requests=args.target_ongoing_requests or 2 * batch_size,
        upscale_delay_s=args.upscale_delay_s,
        downscale_delay_s=args.downscale_delay_s,
        look_back_period_s=args.look_back_s,
    )


def _deploy(served: Served, args: ModelArgs, answer_s: float, name: str) -> None:
    """Deploy, and do not wait: `ray.serve.run` waits for as long as it takes."""
    target = RunTarget(bound(served, args, answer_s), name=name, route_prefix=None)
    run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
