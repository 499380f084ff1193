"""What the endpoint says when it cannot answer: one JSON object, a sentence and a stable code, never a trace or a path.

`{"error": "<sentence>", "code": "<code>", "request_id": "<id>"}`. Codes: those below, and an image's reason as
`image_<reason>`. What Ray or HAProxy refuse before the application is reached stays plain text.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from starlette.exceptions import HTTPException

from serve.schemas import LATE, Refused
from serve.seen import seen

RETRY_AFTER = {"Retry-After": "1"}
MAX_ECHO = 80
"""Characters of a client's own text that an answer may repeat."""
_MAX_SENTENCE = 500  # whatever else of a client's found its way into it
_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_IMAGE_STATUS = {"empty": 400, "format": 415}  # every other reason is 422: an image's type, but not an image
GONE = (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError)
"""What a request gets to see of a replica that goes away while it is asked."""
_log = logging.getLogger("ray.serve")


class ProblemOut(BaseModel):
    """The body of every answer that is not a success."""

    error: str
    code: str
    request_id: str


class Problem(Exception):  # noqa: N818  (it is an answer, not a failure)
    """A refusal with its HTTP status, stable code and sentence."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers or {}


def of_image(refused: Refused, where: str = "") -> Problem:
    """The refusal of a request about an image that a replica has no answer about."""
    if refused.reason == LATE:
        return late()
    return Problem(_IMAGE_STATUS.get(refused.reason, 422), f"image_{refused.reason}", where + refused.message)


def of_exception(error: Exception) -> Problem:
    """The refusal that an exception on the way to a model means; what nobody foresaw is logged, and a 500."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, BackPressureError):
        return overloaded()
    if isinstance(error, GONE):
        return Problem(503, "unavailable", "The model's replica went away; try again.", RETRY_AFTER)
    if isinstance(error, TimeoutError):
        return late()
    _log.exception("unforeseen error", exc_info=error)
    return Problem(500, "internal", "The server failed on this request; its log tells more under this request_id.")


def late() -> Problem:
    """The refusal of a request whose time is over."""
    return Problem(504, "timeout", "The model did not answer in time; try again.", RETRY_AFTER)


def overloaded() -> Problem:
    """The refusal of a request that would have to wait behind too many others."""
    return Problem(429, "overloaded", "Too many requests are waiting; try again in a moment.", RETRY_AFTER)


def loading(name: str) -> Problem:
    """The refusal of a request for a model of which no version is loaded yet."""
    return Problem(503, "loading", f"{name} is not loaded yet; GET /models says why.", {"Retry-After": "5"})


def waiting_for(names: Sequence[str]) -> Problem:
    """The refusal of a question whether all of these are ready."""
    return Problem(503, "unavailable", f"Not loaded yet: {', '.join(names)}.", RETRY_AFTER)


def request_id(request: Request) -> str:
    """The request's id: the client's `x-request-id` or Ray's; a new one for text that is no id."""
    return valid_id(request.headers.get("x-request-id", "")) or uuid.uuid4().hex


def valid_id(given: str) -> str | None:
    """What a client gave as its request's id, if it can be one."""
    return given if _ID.fullmatch(given) else None


def install(app: FastAPI) -> None:
    """Make `app` answer every error as a problem."""
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_any)
    app.add_exception_handler(Problem, _on_any)


async def _on_any(request: Request, error: Exception) -> JSONResponse:
    return respond(request, of_exception(error))


async def _on_http(request: Request, error: Any) -> JSONResponse:
    # Of the scope: `request.url` is made of the Host header too, which may be none.
    path, method = request.scope["path"][:MAX_ECHO], request.method[:MAX_ECHO]
    if error.status_code == 404:
        problem = Problem(404, "not_found", f"There is nothing at {path}; see GET /models and POST /predict/<model>.")
    elif error.status_code == 405:
        problem = Problem(405, "method", f"{path} does not answer {method}.", dict(error.headers or {}))
    else:
        problem = Problem(error.status_code, "http", str(error.detail))
    return respond(request, problem)


async def _on_invalid(request: Request, error: Any) -> JSONResponse:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])[:MAX_ECHO]
    got = str(first.get("input"))[:MAX_ECHO]
    return respond(request, Problem(422, "query", f"{where}: {first['msg']}, got {got!r}."))


def respond(request: Request, problem: Problem) -> JSONResponse:
    """The answer that says the problem."""
    seen().code = problem.code
    said = str(problem)
    if len(said) > _MAX_SENTENCE:
        said = said[: _MAX_SENTENCE - 3] + "..."
    body = ProblemOut(error=said, code=problem.code, request_id=request_id(request))
    return JSONResponse(body.model_dump(), problem.status, problem.headers)
