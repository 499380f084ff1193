"""Ray Serve as its documentation shows it: a deployment that takes Starlette's request, with and without batching.

Each function is the import path of an application; `args` hold the folder, and `form` for the batched one.
"""

from pathlib import Path
from typing import Any

import ray.serve
from starlette.requests import Request

from pipeline.benchmark.servers import classifier


@ray.serve.deployment
class OneByOne:
    """A request after the other."""

    def __init__(self, form: classifier.Form, folder: str) -> None:
        self.model = classifier.build(form, Path(folder))

    async def __call__(self, request: Request) -> classifier.Answer:
        """One JPEG."""
        return self.model.answer(await request.body())


@ray.serve.deployment(max_ongoing_requests=64)  # its documentation: more than a batch, or batches stay small
class InBatches:
    """Requests are joined."""

    def __init__(self, form: classifier.Form, folder: str) -> None:
        self.model = classifier.build(form, Path(folder))

    @ray.serve.batch(max_batch_size=16)  # type: ignore[untyped-decorator]
    async def classify(self, images: list[bytes]) -> list[classifier.Answer]:
        """A batch."""
        return self.model.classify([self.model.decode(data) for data in images])

    async def __call__(self, request: Request) -> classifier.Answer:
        """One JPEG."""
        answer: classifier.Answer = await self.classify(await request.body())
        return answer


def one_by_one(args: dict[str, Any]) -> ray.serve.Application:
    """The application without batches."""
    return OneByOne.bind(args["form"], args["folder"])  # type: ignore[attr-defined]  # the decorator's


def in_batches(args: dict[str, Any]) -> ray.serve.Application:
    """The application with them."""
    return InBatches.bind(args["form"], args["folder"])  # type: ignore[attr-defined]  # as above
