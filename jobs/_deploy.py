"""Puts an application on Ray Serve, by its import path as text, and waits until it answers.

It speaks to the head's dashboard, as `serve deploy` does: what is deployed stays when the job ends, and applications
that the configuration leaves out are removed. The versions of models are applications of their own, which the
endpoint's reconciler removes; where the endpoint itself is left out they stay until `serve shutdown`.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import requests
import yaml

from jobs._process import LOOPBACK, Service, answers, claim
from pipeline.errors import ClusterError, last_raised

CONFIG = Path(__file__).parents[1] / "serve" / "config.yaml"
APPLICATION = "serve.app:build"
_POLL_S = 0.25
_REQUEST_S = 60
_PUT_ATTEMPTS = 3
_FAILED = {"DEPLOY_FAILED", "UNHEALTHY"}


def application(names: Sequence[str], alias: str | None, registry: str, storage: Path) -> dict[str, Any]:
    """The configuration of `serve/config.yaml`, for some registered models."""
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    args = config["applications"][0]["args"]
    args["models"] = [args["models"][0] | {"name": name, "alias": alias} for name in names]
    args |= {"registry": registry, "cache": str(storage / "bundles")}
    return config


def deploy(head: Service, config: Mapping[str, Any], *, port: int | None = None, timeout_s: float = 300.0) -> str:
    """Bring Serve on `head` to what `config` says (see `serve/config.yaml`) and return the endpoint's URL.

    Serve listens on loopback, on `port` or a free one; a Serve that runs already keeps its port.

    Raises:
        ClusterError: the port is taken, or an application did not come up; the message holds the reason.
    """
    wanted = copy.deepcopy(dict(config))
    running = _details(head)
    if not running.get("http_options"):
        options = dict(wanted.get("http_options") or {})
        wanted["http_options"] = options | {"host": LOOPBACK, "port": claim(port, "Ray Serve")}
    else:
        wanted["http_options"] = running["http_options"]
    _put(head, wanted)
    _wait_running(head, [app["name"] for app in wanted["applications"]], timeout_s)
    options = _details(head)["http_options"]
    endpoint = f"http://{options['host']}:{options['port']}"
    if any(app["import_path"] == APPLICATION for app in wanted["applications"]):
        _wait_served(endpoint, timeout_s)
    return endpoint


def replicas(head: Service, model: str) -> int:
    """How many replicas of a model run, of all its versions."""
    deployments = [app.get("deployments", {}).get(model, {}) for app in _details(head).get("applications", {}).values()]
    return sum(replica["state"] == "RUNNING" for found in deployments for replica in found.get("replicas", []))


def _put(head: Service, wanted: Mapping[str, Any]) -> None:
    """Hand over the configuration, once more if need be: a head that has just started can be too busy for Serve."""
    for attempt in range(_PUT_ATTEMPTS):
        try:
            _call(head, "PUT", wanted)
        except ClusterError:
            if attempt == _PUT_ATTEMPTS - 1:
                raise
        else:
            return


def _wait_running(head: Service, names: list[str], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        applications = _details(head).get("applications", {})
        states = {name: applications.get(name, {}).get("status", "NOT_STARTED") for name in names}
        for name in names:
            if states[name] in _FAILED:
                raise ClusterError(f"application '{name}' did not come up: {_reason(applications[name])}")
        if all(state == "RUNNING" for state in states.values()):
            return
        if time.monotonic() > deadline:
            slow = ", ".join(f"{name} is {state}" for name, state in states.items())
            raise ClusterError(f"not deployed within {timeout_s:.0f} s: {slow}; does the cluster have enough CPUs?")
        time.sleep(_POLL_S)


def _wait_served(endpoint: str, timeout_s: float) -> None:
    """Wait until every model is loaded: they are applications of their own, which the first one brings up."""
    deadline = time.monotonic() + timeout_s
    while not answers(f"{endpoint}/readyz"):
        with contextlib.suppress(requests.RequestException):
            for model in requests.get(f"{endpoint}/models", timeout=_REQUEST_S).json().get("models", []):
                if model["version"] is None and model["troubles"]:
                    raise ClusterError(
                        f"model '{model['name']}' is not served: {'; '.join(model['troubles'].values())}"
                    )
        if time.monotonic() > deadline:
            raise ClusterError(f"{endpoint}: not every model is loaded within {timeout_s:.0f} s; see GET /models")
        time.sleep(_POLL_S)


def _reason(application: Mapping[str, Any]) -> str:
    """The error that was raised on the cluster; else what Serve says."""
    deployments = application.get("deployments", {}).values()
    messages = [application.get("message", ""), *(deployment.get("message", "") for deployment in deployments)]
    return last_raised("\n".join(messages))


def _details(head: Service) -> dict[str, Any]:
    found = _call(head, "GET").json()
    return found if isinstance(found, dict) else {}


def _call(head: Service, method: str, body: Any = None) -> requests.Response:
    url = f"{head.dashboard}/api/serve/applications/"
    token = head.env.get("RAY_AUTH_TOKEN_PATH")
    headers = {"Authorization": f"Bearer {Path(token).read_text()}"} if token else {}
    try:
        response = requests.request(method, url, json=body, headers=headers, timeout=_REQUEST_S)
    except requests.RequestException as error:
        state = "answers, but too slowly" if answers(f"{head.dashboard}/api/gcs_healthz") else "does not answer"
        raise ClusterError(f"the Ray head at {head.dashboard} {state} ({type(error).__name__})") from None
    if not response.ok:
        raise ClusterError(f"Ray Serve refused the configuration: {last_raised(response.text)}")
    return response
