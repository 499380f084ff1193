"""Clients that ask an endpoint without a pause, while a test does something to it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import psutil
import requests

from jobs._process import Service, _members

LATEST_START_S = 120.0


def until(what: Callable[[], bool], timeout_s: float = 120.0) -> None:
    """Wait for something, looking five times a second."""
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s"
        time.sleep(0.2)


class Load:
    """So many clients; what they were answered, by which version, and how long it took, is collected."""

    def __init__(self, url: str, data: bytes, num_clients: int) -> None:
        self.url = url
        self.data = data
        self.statuses: list[int] = []
        self.versions: list[str] = []
        self.errors: list[str] = []
        self.seconds: list[float] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(num_clients)]

    def _ask(self) -> None:
        with requests.Session() as session:
            while not self._stop.is_set():
                began_s = time.monotonic()
                try:
                    response = session.post(self.url, data=self.data, timeout=30)
                except requests.RequestException as error:
                    self.errors.append(f"{type(error).__name__}: {error}")
                    continue
                finally:
                    self.seconds.append(time.monotonic() - began_s)
                self.statuses.append(response.status_code)
                if response.ok:
                    self.versions.append(response.json()["model"]["version"])
                else:
                    self.errors.append(response.text[:300])

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def expect_no_failure(self) -> None:
        """Every request was answered with 200."""
        assert not self.errors, self.errors[:3]
        assert Counter(self.statuses).keys() == {200}


def process(head: Service, name: str) -> psutil.Process:
    """The replica whose process Ray calls so: `ServeReplica:<application>:<deployment>`."""
    deadline = time.monotonic() + LATEST_START_S
    while time.monotonic() < deadline:
        if found := processes(head, name):
            return found[0]
        time.sleep(0.2)
    raise AssertionError(f"no replica of {name}")


def processes(head: Service, name: str) -> list[psutil.Process]:
    found = {}
    for one in _members(head):  # which may name one twice
        with suppress(psutil.Error):  # it ends meanwhile
            if " ".join(one.cmdline()).startswith(f"ray::ServeReplica:{name}"):
                found[one.pid] = one
    return list(found.values())
