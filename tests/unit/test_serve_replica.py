"""A replica without a cluster: every caller gets its own answer, whoever else is in the batch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import models
from pipeline.batch import Batch
from pipeline.inference import bundle
from pipeline.inference.predictor import Predictor
from pipeline.types import Classification
from serve.batching import Batcher
from serve.deployments import Replica
from serve.metrics import WAITING
from serve.schemas import LATE, Batching, ModelArgs, Refused, Served, Told, Wanted
from tests.small_detection import photo

IMAGES = [photo(seed, 30 + seed, 40) for seed in range(6)]
BAD, POISON = b"no image", photo(99, 64, 64)


class Poisoned(Predictor):
    """Fails on one picture in a way that nobody foresaw; remembers how many it was given at once."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.sizes: list[int] = []
        self.poison = self.decode(POISON).image

    def predict_batch(self, batch: Batch, selects: Any = None) -> Any:
        self.sizes.append(len(batch))
        if any(np.array_equal(image, self.poison) for image in batch.images):
            raise RuntimeError("the network choked")
        return super().predict_batch(batch, selects)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> bundle.Bundle:
    torch.manual_seed(5)
    config = models.config_of("lenet5")(name="lenet5", num_classes=10)
    classes = tuple(map(str, range(10)))
    return bundle.save(tmp_path_factory.mktemp("replica") / "b", models.build(config), config, classes=classes)


@pytest.fixture(scope="module")
def alone(made: bundle.Bundle) -> dict[bytes, Classification]:
    """What the predictor says of each picture by itself."""
    predictor, found = Predictor(made), {}
    for image in IMAGES:
        (answer,) = predictor.predict([image])
        assert isinstance(answer, Classification)
        found[image] = answer
    return found


@pytest.fixture
def replica(made: bundle.Bundle) -> Iterator[Replica]:
    before = torch.get_num_threads()
    served = Served("tiny", "1", None, made.path, 10)
    found = Replica(served, ModelArgs(name="tiny", batch=Batching(max_size=4, wait_ms=5.0)))
    found.predictor = Poisoned(made)
    yield found
    torch.set_num_threads(before)


async def ask(replica: Replica, image: bytes, **wanted: Any) -> Told | Refused | Exception:
    try:
        (answer,) = await replica.predict([image], Wanted(**wanted))
    except RuntimeError as error:
        return error
    return answer


def expect(answer: Told | Refused | Exception, image: bytes, alone: dict[bytes, Classification]) -> None:
    if image == BAD:
        assert isinstance(answer, Refused)
        assert answer.reason == "format"
    elif image == POISON:
        assert isinstance(answer, RuntimeError)
        assert str(answer) == "the network choked"
    else:
        assert isinstance(answer, Told)
        assert list(answer.labels) == alone[image].labels[:5].tolist()
        assert list(answer.scores) == pytest.approx(alone[image].scores[:5].tolist(), abs=1e-6)


@settings(max_examples=15)
@given(st.lists(st.sampled_from([*IMAGES, BAD, POISON]), min_size=1, max_size=12), st.data())
def test_every_caller_gets_what_it_would_get_alone_also_beside_one_that_fails(
    made: bundle.Bundle, alone: dict[bytes, Classification], images: list[bytes], data: st.DataObject
) -> None:
    replica = Replica(Served("tiny", "1", None, made.path, 10), ModelArgs(name="tiny", batch=Batching(max_size=4)))
    replica.predictor = Poisoned(made)
    grouped = data.draw(st.booleans(), "several in a call")

    async def scenario() -> list[Any]:
        if grouped and POISON not in images:
            return await replica.predict(images, Wanted())
        return await asyncio.gather(*(ask(replica, image) for image in images))

    for answer, image in zip(asyncio.run(scenario()), images, strict=True):
        expect(answer, image, alone)


def test_an_image_whose_time_is_over_is_not_computed(replica: Replica, alone: dict[bytes, Classification]) -> None:
    async def scenario() -> list[Any]:
        now_s = time.time()
        late = [ask(replica, image, until_s=now_s - 1) for image in IMAGES[:3]]
        return await asyncio.gather(*late, ask(replica, IMAGES[3], until_s=now_s + 60))

    *late, due = asyncio.run(scenario())
    assert late == [Refused(LATE, "nobody waits for this image any more")] * 3
    expect(due, IMAGES[3], alone)
    assert sum(replica.predictor.sizes) == 1  # type: ignore[attr-defined]


def test_an_image_whose_time_ends_while_it_waits_for_its_batch_is_not_computed(replica: Replica) -> None:
    waiting = [replica_waiting(replica, image, until_s) for image, until_s in [(IMAGES[0], 0.0), (IMAGES[1], 1e12)]]
    late, due = replica._compute(waiting)
    assert late.answer is None
    assert isinstance(due.answer, Classification)
    assert replica.predictor.sizes == [1]  # type: ignore[attr-defined]


def replica_waiting(replica: Replica, image: bytes, until_s: float) -> Any:
    from serve.deployments import _Waiting  # noqa: PLC0415

    return _Waiting(replica.predictor.decode(image), replica._select(Wanted()), until_s)


def test_waiting_for_a_decoder_is_told_as_waiting_not_as_decoding(made: bundle.Bundle) -> None:
    slow_s = 0.05
    replica = Replica(Served("tiny", "1", None, made.path, 10), ModelArgs(name="tiny", decoders=1))
    decode, most = replica.predictor.decode, 0.0

    def slowly(*args: Any, **keys: Any) -> Any:
        nonlocal most
        time.sleep(slow_s)  # so long decoding takes
        most = max(most, *(value for metric, value, _ in replica.load.readings() if metric == WAITING))
        return decode(*args, **keys)

    replica.predictor.decode = slowly  # type: ignore[method-assign]
    answers = asyncio.run(replica.predict([IMAGES[0]] * 4, Wanted()))
    last = answers[-1]
    assert isinstance(last, Told)
    assert last.queue_ms > 3 * 1000 * slow_s > last.decode_ms  # it waited for three others
    assert most == 4


def test_a_caller_that_goes_away_is_not_computed_for(replica: Replica) -> None:
    async def scenario() -> None:
        replica.join = Batcher(replica._infer, 4, 0.5, lambda: True)
        calls = [asyncio.create_task(ask(replica, image)) for image in IMAGES[:3]]
        while replica.decoders._work_queue.qsize():
            await asyncio.sleep(0)
        await asyncio.sleep(0.1)  # they wait for their batch
        calls[0].cancel()
        calls[2].cancel()
        await asyncio.wait(calls)

    asyncio.run(scenario())
    assert replica.predictor.sizes == [1]  # type: ignore[attr-defined]


def test_batches_gather_while_one_is_computed_whatever_the_wait() -> None:
    sizes: list[int] = []

    async def scenario() -> list[int]:
        may_end = asyncio.Event()

        async def compute(items: list[int]) -> list[int]:
            sizes.append(len(items))
            await may_end.wait()
            return [item + 1 for item in items]

        join = Batcher(compute, 8, 0.0, lambda: True)
        calls = [asyncio.create_task(join(0))]
        while not sizes:
            await asyncio.sleep(0)
        for number in range(1, 11):  # one after the other, while the first is computed
            calls.append(asyncio.create_task(join(number)))
            await asyncio.sleep(0)
        may_end.set()
        return list(await asyncio.gather(*calls))

    assert asyncio.run(scenario()) == list(range(1, 12))
    assert sizes == [1, 8, 2]


def test_one_alone_waits_for_nobody() -> None:
    async def compute(items: list[int]) -> list[int]:
        return items

    async def scenario() -> int:
        join = Batcher(compute, 8, 3600.0, lambda: False)
        return await asyncio.wait_for(join(1), 5.0)

    assert asyncio.run(scenario()) == 1


def test_a_batch_that_fails_fails_for_its_own_callers_only() -> None:
    async def compute(items: list[int]) -> list[int]:
        if 2 in items:
            raise ValueError("two")
        return items

    async def scenario() -> list[Any]:
        join = Batcher(compute, 2, 0.0, lambda: True)
        first = await asyncio.gather(join(1), join(2), return_exceptions=True)
        return [*first, await join(3)]

    one, two, three = asyncio.run(scenario())
    assert isinstance(one, ValueError)
    assert isinstance(two, ValueError)
    assert three == 3


def test_a_replicas_own_port_answers_nothing(replica: Replica) -> None:
    response = asyncio.run(replica(None))  # type: ignore[arg-type]
    assert (response.status_code, bytes(response.body)) == (404, b"Ask the endpoint.\n")


def test_the_replicas_module_knows_no_registry() -> None:
    source = (Path(__file__).parents[2] / "serve" / "deployments.py").read_text()
    assert "mlflow" not in source.lower()
    assert "pickle" not in source
