"""The application with two real tiny models on a socket of its own, and a Chromium that looks at it. No Ray."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from fastapi import Request
from fastapi.responses import JSONResponse, Response

from pipeline import models
from pipeline.errors import ImageError
from pipeline.inference import bundle
from pipeline.inference.bundle import Bundle
from pipeline.inference.predictor import Predictor
from pipeline.types import Detections
from serve.gate import Gate
from serve.ingress import application
from serve.roster import Roster, Standing
from serve.schemas import Limits, Refused, Served, Told, Wanted
from tests.asgi import on_socket
from tests.small_detection import CLASSES, untaught

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
RUN = "http://mlflow.example/#/experiments/1/runs/a"
KEY = "correct-horse"
MARKUP = "<img src=x onerror=\"document.title='owned'\">"
"""A class that would like to be HTML."""
MOST_BYTES = 300_000


@dataclasses.dataclass
class Models:
    """Reaches the models within this process; a test may have the next requests wait or fail, or ask for a key."""

    predictors: dict[str, Predictor]
    failures: list[Exception] = dataclasses.field(default_factory=list)
    needs_key: bool = False

    async def predict(self, served: Served, images: tuple[bytes, ...], wanted: Wanted) -> list[Told | Refused]:
        if self.failures:
            raise self.failures.pop()
        return await asyncio.to_thread(lambda: [told(self.predictors[served.name], data, wanted) for data in images])

    async def ready(self, served: Served) -> bool:
        return served.name in self.predictors


def told(predictor: Predictor, data: bytes, wanted: Wanted) -> Told | Refused:
    began = time.perf_counter()
    (answer,) = predictor.predict([data])
    if isinstance(answer, ImageError):
        return Refused(answer.reason, str(answer))
    took_ms = 1000 * (time.perf_counter() - began)
    if isinstance(answer, Detections):
        best = answer.best(wanted.score_threshold, wanted.max_detections)
        boxes = tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in best.boxes_xyxy.tolist())
        labels, names, scores = best.labels.tolist(), predictor.class_names(best), best.scores.tolist()
        return Told(tuple(labels), names, tuple(scores), boxes, took_ms / 4, took_ms / 8, took_ms / 2)
    top = slice(wanted.top_k)
    labels, names, scores = answer.labels[top].tolist(), predictor.class_names(answer)[top], answer.scores[top].tolist()
    return Told(tuple(labels), names, tuple(scores), None, took_ms / 4, took_ms / 8, took_ms / 2)


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """A classifier and a detector that have learnt nothing; `markup` has classes that are HTML."""
    folder = tmp_path_factory.mktemp("bundles")
    torch.manual_seed(7)
    config = models.config_of("lenet5")(name="lenet5", num_classes=10)
    names = tuple(f"class {label}" for label in range(10))
    hostile = tuple(f"{MARKUP} {label}" for label in range(10))
    return {
        "digits": bundle.save(folder / "digits", models.build(config), config, classes=names),
        "markup": bundle.save(folder / "markup", models.build(config), config, classes=hostile),
        "insects": untaught(folder / "insects", CLASSES),
    }


@pytest.fixture(scope="session")
def reached(bundles: dict[str, Bundle]) -> Models:
    return Models({name: Predictor(made) for name, made in bundles.items()})


@pytest.fixture(scope="session")
def roster(bundles: dict[str, Bundle]) -> Roster:
    """What is served at first."""
    served = [
        Served("digits", "3", "champion", bundles["digits"].path, 10, run_url=RUN),
        Served("insects", "1", None, bundles["insects"].path, len(CLASSES), "detection"),
        Served("markup", "1", None, bundles["markup"].path, 10, run_url="javascript:document.title='owned'"),
    ]
    return Roster.of([Standing(one.name, one) for one in served])


@pytest.fixture(scope="session")
def gate(roster: Roster, reached: Models) -> Gate:
    """The endpoint's; a test may set its roster, as a swap does."""
    return Gate(roster, Limits(max_body_bytes=MOST_BYTES), reached)


@pytest.fixture(autouse=True)
def _as_at_first(reached: Models, roster: Roster, gate: Gate) -> None:
    reached.failures.clear()
    reached.needs_key = False
    gate.roster = roster


@pytest.fixture(scope="session")
def url(gate: Gate, reached: Models) -> Iterator[str]:
    """The endpoint's address; its own thread serves it."""
    app = application(gate)

    @app.middleware("http")
    async def key(request: Request, call_next: Callable[[Request], Any]) -> Response:
        is_open = request.url.path == "/" or request.url.path.startswith("/page/")
        if not reached.needs_key or is_open or request.headers.get("authorization") == f"Bearer {KEY}":
            response: Response = await call_next(request)
            return response
        said = {"error": "Expected a key in the header Authorization.", "code": "key", "request_id": "r1"}
        return JSONResponse(said, 401, {"WWW-Authenticate": "Bearer"})

    with on_socket(app) as url:
        yield url


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright  # noqa: PLC0415  (only `make test-page` installs it)

    program = next(filter(None, map(shutil.which, NAMES)), None)
    assert program, f"expected one of {', '.join(NAMES)} on the PATH, found none; install your system's Chromium"
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """The page as it opens; afterwards nothing was asked of elsewhere, and the console had nothing to say.

    A refusal's own line in the console is the browser's, and no error of the page.
    """
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    shown, requested, said = context.new_page(), list[str](), list[str]()
    shown.set_default_timeout(10_000)
    shown.on("request", lambda request: requested.append(request.url))
    shown.on("pageerror", lambda error: said.append(str(error)))
    shown.on("console", lambda message: said.append(message.text) if message.type in {"error", "warning"} else None)
    shown.goto(url)
    shown.wait_for_selector("#model option, #problem p", state="attached")
    yield shown
    assert {one for one in requested if not one.startswith((url, f"blob:{url}"))} == set()
    assert [one for one in said if not one.startswith("Failed to load resource: ")] == []
    context.close()


@pytest.fixture
def files(tmp_path: Path) -> Callable[[str, bytes], Path]:
    """A file with this name and content."""

    def write(name: str, data: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write
