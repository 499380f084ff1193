"""Where Ray Serve listens, and whether an endpoint that anyone may ask may be there: on loopback, or if it is said.

Only Serve knows its address: it is of the cluster, not of an application. So it is asked where an application is built,
before anything is fetched, and again in each ingress replica, for who builds by hand may start Serve later.
"""

from __future__ import annotations

import ipaddress

import ray
import ray.serve.context

from pipeline.errors import ConfigError


def refuse_open(host: str | None) -> None:
    """Refuse an endpoint without keys on an address that others can reach.

    Args:
        host: Serve's `http_options.host`; None is every address, to HAProxy.

    Raises:
        ConfigError: it is one.
    """
    if host is None or not _is_loopback(host):
        where = "every address" if host in {None, "", "0.0.0.0", "::"} else host  # noqa: S104  (it is refused)
        raise ConfigError(
            f"Ray Serve listens on {where} and the endpoint has no keys, so anyone could ask it: "
            "set http_options.host to 127.0.0.1, name a key file as 'keys' in the application's args "
            "(python -m jobs.keys add name=...), or say 'allow_anyone: true' there"
        )


def refuse_open_on_this_cluster() -> None:
    """The same for the Serve that runs here; where none runs yet there is nothing to say.

    Raises:
        ConfigError: it listens on such an address.
    """
    if ray.is_initialized():
        client = ray.serve.context._get_global_client(raise_if_no_controller_running=False)  # no public way
        if client is not None:
            refuse_open(client.http_config.host)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
