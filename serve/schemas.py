"""The words of the endpoint: what the application is told (`AppArgs`) and what it answers.

Every amount has a bound. What the answers look like when something is wrong is said in `serve.problems`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.config import Strict
from pipeline.types import Task

MIB = 2**20
Box = tuple[float, float, float, float]
LATE = "late"
"""The reason of an image whose client does not wait any more."""


class Batching(Strict):
    """How one replica joins requests into batches, counted in images.

    Attributes:
        max_size: images per forward pass.
        wait_ms: how long the first image waits for others that are being decoded. Little is enough: while one batch is
            computed the next one gathers.
    """

    max_size: int = Field(default=16, ge=1, le=1024)
    wait_ms: float = Field(default=1.0, ge=0, le=1000)


class Autoscaling(Strict):
    """How many replicas a model gets.

    Attributes:
        min_replicas: 0: none is loaded after `downscale_delay_s` without a request; the next one waits for it.
        target_ongoing_requests: requests a replica should have in hand, waiting ones included; None: two batches.
        upscale_delay_s: how long more must be asked for before replicas are added.
        downscale_delay_s: how long less must be asked for before replicas are taken away.
        look_back_s: the window that requests are averaged over.
    """

    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    target_ongoing_requests: float | None = Field(default=None, gt=0)
    upscale_delay_s: float = Field(default=10.0, ge=0)
    downscale_delay_s: float = Field(default=300.0, ge=0)
    look_back_s: float = Field(default=15.0, gt=0)

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is smaller than min_replicas {self.min_replicas}")
        return self


class Challenger(Strict):
    """A second version of a model, beside the live one, by another alias of the registry.

    Where that alias points to no version, or to the live one, there is none.

    Attributes:
        share: of the requests that name no version, those that it answers (canary), 0 to 1.
        shadow: of the requests that the live version answers, those that it is asked as well, 0 to 1. Its answer is
            compared and thrown away.
    """

    alias: str = "challenger"
    share: float = Field(default=0.0, ge=0, le=1)
    shadow: float = Field(default=0.0, ge=0, le=1)


class ModelArgs(Strict):
    """One model behind the endpoint.

    Attributes:
        name: its name in the path, and in the registry.
        alias: which registered version is served; where it moves to is followed.
        challenger: a second version beside it.
        bundle: a bundle's folder instead of the registry, the same on every node.
        load_s: time that a version may take until its first replica has loaded it.
        load_share: of the time, that what prepares a version may compute while another of the model is live, 0.1 to
            1. The less, the less those feel it who are answered on the same CPUs, and the longer it takes; 1 where
            versions load on CPUs of their own.
        keep_s: how long a version stays loaded after another has taken its place.
        max_queued: requests that may wait for a replica; further ones are refused with 429.
        num_cpus: CPUs, and threads, of a replica.
        num_gpus: GPUs of a replica; with any, the model runs there.
        decoders: threads of a replica that decode images.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)
    alias: str = "champion"
    challenger: Challenger | None = None
    bundle: Path | None = None
    load_s: float = Field(default=300.0, gt=0)
    load_share: float = Field(default=1.0, ge=0.1, le=1)
    keep_s: float = Field(default=300.0, ge=0)
    batch: Batching = Batching()
    autoscaling: Autoscaling = Autoscaling()
    max_queued: int = Field(default=256, ge=1)
    num_cpus: float = Field(default=1.0, gt=0)
    num_gpus: float = Field(default=0.0, ge=0)
    decoders: int = Field(default=2, ge=1, le=64)

    @model_validator(mode="after")
    def _two_aliases_of_the_registry(self) -> Self:
        if self.challenger and self.bundle is not None:
            raise ValueError(f"{self.name}: a challenger is an alias of the registry, but 'bundle' names a folder")
        if self.challenger and self.challenger.alias == self.alias:
            raise ValueError(f"{self.name}: alias and challenger.alias are both '{self.alias}'")
        return self


class Limits(Strict):
    """What one request, and all of them together, may take of an ingress replica.

    Attributes:
        max_body_bytes: size of a request's body, as it arrives and decompressed.
        max_images: in one request.
        max_pixels: of all images of a request that brings several, by their headers; one alone may have what its
            model's `decoding` allows.
        max_inflight: images in hand at once, a request whose body has not arrived counting as one; with
            `max_body_bytes` it bounds the memory that bodies take.
        body_s: time for the body to arrive.
        answer_s: time from the whole body to the answer.
        max_shadowed: images in hand at once that challengers are asked only for comparison; others are not compared.
    """

    max_body_bytes: int = Field(default=10 * MIB, ge=1, le=64 * MIB)
    max_images: int = Field(default=32, ge=1, le=1024)
    max_pixels: int = Field(default=100_000_000, ge=1)
    max_inflight: int = Field(default=256, ge=1)
    body_s: float = Field(default=10.0, gt=0)
    answer_s: float = Field(default=30.0, gt=0)
    max_shadowed: int = Field(default=8, ge=0)

    @property
    def most_images(self) -> int:
        """Of one request: what never finds room is not to be tried again."""
        return min(self.max_images, self.max_inflight)


class AppArgs(Strict):
    """The application's arguments in `config.yaml`.

    Attributes:
        registry: MLflow's address; None: the environment's MLFLOW_TRACKING_URI.
        poll_s: how often it is asked where the aliases point to.
        cache: where registered bundles are kept; every node must see this folder.
        ingress_replicas: processes that speak HTTP.
        ingress_cpus: CPUs that each of them reserves.
        keys: a key file, which every node with an ingress must see; None: the keys in the environment's VENTRAL_KEYS,
            else anyone may ask, on loopback.
        allow_anyone: anyone may ask on other addresses too, as behind a proxy that asks for keys itself.
        log_requests: whether a line about every request is logged, see `serve.watching`.
    """

    models: tuple[ModelArgs, ...]
    registry: str | None = None
    poll_s: float = Field(default=5.0, gt=0)
    cache: Path = Path("storage/bundles")
    limits: Limits = Limits()
    ingress_replicas: int = Field(default=1, ge=1)
    ingress_cpus: float = Field(default=0.5, ge=0)
    keys: Path | None = None
    allow_anyone: bool = False
    log_requests: bool = False

    @model_validator(mode="after")
    def _keys_or_anyone(self) -> Self:
        if self.keys is not None and self.allow_anyone:
            raise ValueError("keys and allow_anyone: expected one of them, got both")
        return self

    @model_validator(mode="after")
    def _names_are_free(self) -> Self:
        if any(model.name == "stats" for model in self.models):
            raise ValueError(
                "models: 'stats' is a path of the Open Inference Protocol; register the model by another name"
            )
        return self

    @model_validator(mode="after")
    def _each_name_once(self) -> Self:
        if not self.models:
            raise ValueError("models: expected at least one, got none")
        names = [model.name for model in self.models]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two models are called {', '.join(twice)}; each name may be served once")
        return self


@dataclass(frozen=True, slots=True)
class Served:
    """A model whose version is settled, as the ingress knows it.

    Attributes:
        version: the registered version, or the beginning of the weights' checksum for a bundle from a folder.
        alias: what it was resolved from; None for a bundle from a folder.
        bundle: its folder.
        weights: the beginning of the weights' checksum.
        app: the application of Ray Serve whose replicas hold it; "" before it is loaded.
        sleeps: whether it may have no replica until it is asked.
        run_url: MLflow's page of the run that made it; None for a bundle from a folder, or where MLflow does not tell.
        engine: that computes it, as `pipeline.inference.engine` names it.
    """

    name: str
    version: str
    alias: str | None
    bundle: Path
    num_classes: int
    task: Task = "classification"
    weights: str = ""
    app: str = ""
    sleeps: bool = False
    run_url: str | None = None
    engine: str = "eager-fp32"


class Asked(BaseModel):
    """The query of `POST /predict/{model}`: `top_k` is for classifiers, the other keys are for detectors."""

    model_config = ConfigDict(extra="forbid")

    top_k: int | None = Field(default=None, ge=1)
    score_threshold: float | None = Field(default=None, ge=0, le=1)
    iou_threshold: float | None = Field(default=None, ge=0, le=1)
    max_detections: int | None = Field(default=None, ge=1, le=1000)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request asks of a replica, beside its image; each task takes its own.

    Attributes:
        top_k: classes, of a classifier.
        score_threshold, iou_threshold, max_detections: of a detector; None: the overlap that its model suppresses from.
        picture: whether the image is wanted back with its boxes drawn.
        pixels: whether the images are NumPy files of uint8 [H, W, 3] instead of encoded.
        until_s: when nobody waits for an answer any more, in seconds since 1970; by then an image that is not computed
            yet never is. Clocks of nodes are taken to agree.
    """

    top_k: int = 5
    score_threshold: float = 0.25
    iou_threshold: float | None = None
    max_detections: int = 100
    picture: bool = False
    pixels: bool = False
    until_s: float = field(default=math.inf, compare=False)


@dataclass(frozen=True, slots=True)
class Told:
    """A replica's answer about one image: classes, best first, of a detector with their boxes, and the time it took.

    Attributes:
        boxes: (x_min, y_min, x_max, y_max) in pixels of the upright original; None where whole images are classified.
        picture: PNG of the upright original with its boxes, where it is wanted.
    """

    labels: tuple[int, ...]
    class_names: tuple[str, ...]
    scores: tuple[float, ...]
    boxes: tuple[Box, ...] | None
    decode_ms: float
    queue_ms: float
    infer_ms: float
    picture: bytes | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """A replica's answer about an image that it has no answer about.

    Attributes:
        reason: as in `ImageError`, for bytes that are not an image it accepts; or `LATE`.
    """

    reason: str
    message: str


class ModelOut(BaseModel):
    """Which model answered."""

    name: str
    version: str
    alias: str | None


class VersionOut(ModelOut):
    """A version that can be asked; `run_url` is the page of the run that made it, maybe out of a client's reach."""

    task: Task
    num_classes: int
    engine: str
    run_url: str | None


class Prediction(BaseModel):
    """One class; `score` is in [0, 1]."""

    label: int
    class_name: str
    score: float


class DetectedObject(Prediction):
    """One object; `box` is x_min, y_min, x_max, y_max in pixels of the image after EXIF orientation."""

    box: Box


class Timing(BaseModel):
    """Milliseconds spent on this image: decoding it, waiting for its batch, in its batch's forward pass."""

    decode: float
    queue: float
    infer: float


class Result(BaseModel):
    """One image: its best classes, or the objects that were found in it, best first."""

    predictions: list[DetectedObject] | list[Prediction]
    timing_ms: Timing


class Answer(Result):
    """What `POST /predict/{model}` answers to a body that is an image."""

    model: ModelOut
    request_id: str


class Answers(BaseModel):
    """What it answers to several images, in their order."""

    model: ModelOut
    request_id: str
    results: list[Result]


class ChallengerState(BaseModel):
    """The second version beside the live one; the counts are those of the process that answers, and of these two.

    Attributes:
        compared: images that both were asked about.
        agreed: those of them that both said the same of.
    """

    version: str
    alias: str
    share: float
    shadow: float
    compared: int
    agreed: int


class ModelState(BaseModel):
    """One name, and what is behind it.

    Attributes:
        version: the live one; None: none is loaded yet.
        versions: all that can be asked, the live one first.
        troubles: by alias, why the version that it points to is not served; and by `served.json`, why what is served
            is not written down.
    """

    name: str
    version: str | None
    alias: str | None
    versions: list[VersionOut]
    challenger: ChallengerState | None
    troubles: dict[str, str]


class ModelList(BaseModel):
    """What `GET /models` answers."""

    models: list[ModelState]
