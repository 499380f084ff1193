"""Ask an endpoint about images on this machine, and print what it answers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import Field, SecretStr

from jobs._parcels import Parcel, packed
from jobs._run import Job, run
from pipeline.inference.client import MAX_DETECTIONS, SCORE_THRESHOLD, TOP_K, Client


class Call(Job):
    """What is asked.

    Attributes:
        url: the endpoint's address.
        model: a served model; `name@alias` or `name/versions/3` to be sure of the version.
        images: files; relative paths lie in `data_root`.
        top_k: of a classifier, the classes that are printed.
        score_threshold, max_detections: of a detector, which objects are.
        images_per_request: how many are sent together at most; never more than 8 MiB, as endpoints refuse large bodies.
        key: of an endpoint that asks for one; the environment's VENTRAL_KEY shows in no list of processes.
    """

    url: str = "http://127.0.0.1:8000"
    model: str
    images: tuple[Path, ...] = Field(min_length=1)
    top_k: int = Field(default=TOP_K, ge=1)
    score_threshold: float = Field(default=SCORE_THRESHOLD, ge=0, le=1)
    max_detections: int = Field(default=MAX_DETECTIONS, ge=1)
    images_per_request: int = Field(default=16, ge=1)
    key: SecretStr | None = None


def call(job: Call) -> None:
    """Ask, and print a line for each class or object."""
    with Client(job.url, key=job.key.get_secret_value() if job.key else None) as client:
        lines = _objects if client.task(job.model.partition("/")[0]) == "detection" else _classes
        for parcel in packed(job.data_folder, job.images, job.images_per_request):
            for line in lines(client, job, parcel):
                print(line)


def _classes(client: Client, job: Call, parcel: Parcel) -> Iterator[str]:
    answers = client.predict_many(job.model, parcel.images, job.top_k)
    for path, ranked in zip(parcel.paths, answers, strict=True):
        for name, score in zip(ranked.class_names, ranked.scores, strict=True):
            yield f"{path}  {score:.4f}  {name}"


def _objects(client: Client, job: Call, parcel: Parcel) -> Iterator[str]:
    answers = client.detect_many(
        job.model, parcel.images, score_threshold=job.score_threshold, max_detections=job.max_detections
    )
    for path, found in zip(parcel.paths, answers, strict=True):
        boxes = found.detections
        for name, score, box in zip(found.class_names, boxes.scores, boxes.boxes_xyxy, strict=True):
            yield f"{path}  {score:.4f}  {name}  {' '.join(f'{side:.1f}' for side in box)}"
        if not len(boxes):
            yield f"{path}  nothing found"


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line: python -m jobs.call model=digits 'images=[a.png, b.png]'."""
    return run(Call, call, argv)


if __name__ == "__main__":
    sys.exit(main())
