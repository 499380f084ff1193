"""What Ray's metrics agents say of Ventral, of all nodes at once.

Behind the load balancer nobody knows which ingress replica takes a scrape, so each has to give the same answer: what
all agents have, each series with its process and node in its labels. An answer without one of the nodes would show
counters that fall, so there is none then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any

import httpx
import ray
from fastapi import FastAPI
from fastapi.responses import Response

from serve.problems import RETRY_AFTER, Problem

PREFIX = "ray_ventral_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FRESH_S = 1.0
"""How long an answer is given again: agents are not asked more often, whoever calls."""
_AGENT_S = 5.0


def install(app: FastAPI) -> None:
    """Add the route; where there is no Ray nobody has counted, and it stays away."""
    scrape = Scrape()

    async def metrics() -> Response:
        return Response(await scrape.text(), media_type=CONTENT_TYPE)

    app.get("/metrics", include_in_schema=False)(metrics)


class Scrape:
    """The agents of this process's cluster."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._read_s = 0.0
        self._text = ""

    async def text(self) -> str:
        """The metrics whose names begin with `PREFIX`, as Prometheus reads them.

        Raises:
            Problem: 503, a node's agent does not answer.
        """
        async with self._lock:
            if not self._text or time.monotonic() - self._read_s > FRESH_S:
                self._text = merged(await _agents_say())
                self._read_s = time.monotonic()
            return self._text


def merged(texts: Iterable[str]) -> str:
    """Several agents' metrics as one text: `PREFIX` only, each metric's lines together.

    Histograms lose their `_sum`: Ray's agent makes it up from the middles of the buckets.
    """
    about: dict[str, dict[str, str]] = {}
    samples: dict[str, list[str]] = {}
    for text in texts:
        name = ""
        for line in text.split("\n"):
            if line.startswith("# "):
                _, word, name, _ = f"{line} ".split(" ", 3)
                about.setdefault(name, {}).setdefault(word, line)
            elif line.startswith(PREFIX) and not line.startswith(f"{name}_sum{{"):
                samples.setdefault(name, []).append(line)
    lines = [line for name, found in samples.items() for line in (*about.get(name, {}).values(), *found)]
    return "".join(f"{line}\n" for line in lines)


async def _agents_say() -> list[str]:
    nodes = await asyncio.to_thread(ray.nodes)
    async with httpx.AsyncClient(timeout=_AGENT_S, trust_env=False) as client:
        return await asyncio.gather(*(_agent_says(client, node) for node in nodes if node["Alive"]))


async def _agent_says(client: httpx.AsyncClient, node: dict[str, Any]) -> str:
    try:
        answer = await client.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics")
        answer.raise_for_status()
    except httpx.HTTPError:
        message = "A node's metrics agent does not answer; scrape the agents themselves."
        raise Problem(503, "metrics", message, RETRY_AFTER) from None
    return answer.text
