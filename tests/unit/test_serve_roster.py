"""Which version a request reaches: by alias, by number, by a challenger's share; and what a shadow is asked."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from serve.agreement import agree, iou
from serve.roster import Roster, Standing
from serve.schemas import Refused, Told
from tests.asgi import SERVED, Client, ranked

LIVE = SERVED[0]
RIVAL = replace(LIVE, version="4", alias="challenger")
OLD = replace(LIVE, version="2", alias=None)
STANDING = Standing("digits", LIVE, RIVAL, (OLD,), share=0.25)


def client(standing: Standing = STANDING, answer: Any = None, **limits: Any) -> Client:
    return Client(ranked(1) if answer is None else answer, standings=(standing,), **limits)


def ask(client: Client, path: str = "/predict/digits", **headers: str) -> tuple[int, Any]:
    return asyncio.run(client.post(path, [b"x"], headers={key.replace("_", "-"): headers[key] for key in headers}))[:2]


@pytest.mark.parametrize(
    ("path", "version", "alias"),
    [
        ("/predict/digits@champion", "3", "champion"),
        ("/predict/digits@challenger", "4", "challenger"),
        ("/predict/digits/versions/3", "3", "champion"),
        ("/predict/digits/versions/4", "4", "challenger"),
        ("/predict/digits/versions/2", "2", None),
    ],
)
def test_a_version_is_reached_by_its_alias_and_by_its_number(path: str, version: str, alias: str | None) -> None:
    asked = client()
    status, body = ask(asked, path)
    assert (status, body["model"]) == (200, {"name": "digits", "version": version, "alias": alias})
    assert asked.models.versions == [version]


@pytest.mark.parametrize("path", ["/predict/digits@best", "/predict/digits/versions/5"])
def test_a_version_that_is_not_served_names_those_that_are(path: str) -> None:
    status, body = ask(client(), path)
    assert (status, body["code"]) == (404, "unknown_version")
    assert "version 3 (champion), version 4 (challenger), version 2 are" in body["error"]


def test_a_challenger_answers_its_share_and_equal_request_ids_get_equal_versions() -> None:
    asked = client()
    first = [ask(asked, x_request_id=f"r-{number}")[1]["model"]["version"] for number in range(2000)]
    assert set(first) == {"3", "4"}
    assert abs(first.count("4") / 2000 - 0.25) < 0.04  # four standard deviations
    again = [ask(asked, x_request_id=f"r-{number}")[1]["model"]["version"] for number in range(50)]
    assert again == first[:50]


@pytest.mark.parametrize(("share", "versions"), [(0.0, {"3"}), (1.0, {"4"})])
def test_a_share_of_nothing_or_all_is_just_that(share: float, versions: set[str]) -> None:
    asked = client(replace(STANDING, share=share))
    assert {ask(asked)[1]["model"]["version"] for _ in range(50)} == versions


def test_other_protocols_reach_the_challenger_too() -> None:
    asked = client(replace(STANDING, share=1.0))
    status, _ = ask(asked, "/invocations", content_type="image/jpeg")
    assert (status, asked.models.versions) == (200, ["4"])


def test_a_model_that_is_not_loaded_yet_is_a_503_that_says_where_to_look() -> None:
    asked = client(Standing("digits", troubles={"champion": "no MLflow server answers there"}))
    status, body = ask(asked)
    assert (status, body["code"]) == (503, "loading")
    status, body, _ = asyncio.run(asked.send("GET", "/models", asked._body([b""], 0), {}))
    assert body["models"][0]["version"] is None
    assert body["models"][0]["troubles"] == {"champion": "no MLflow server answers there"}
    status, body, _ = asyncio.run(asked.send("GET", "/readyz", asked._body([b""], 0), {}))
    assert (status, body["waiting_for"]) == (503, ["digits"])


def test_models_show_versions_and_how_often_the_challenger_agrees() -> None:
    asked = client(replace(STANDING, share=0.0, shadow=1.0))

    async def scenario() -> Any:
        for _ in range(3):
            assert (await asked.post("/predict/digits", [b"x"]))[0] == 200
        async with asyncio.timeout(10):
            while asked.gate.agreement(LIVE, RIVAL).compared < 3:
                await asyncio.sleep(0)
        return await asked.send("GET", "/models", asked._body([b""], 0), {})

    _, body, _ = asyncio.run(scenario())
    (model,) = body["models"]
    assert [one["version"] for one in model["versions"]] == ["3", "4", "2"]
    assert model["challenger"] == {
        "version": "4",
        "alias": "challenger",
        "share": 0.0,
        "shadow": 1.0,
        "compared": 3,
        "agreed": 3,
    }
    assert asked.gate.tally(RIVAL).requests == 0  # what nobody waited for is no request


def test_agreement_is_of_the_present_pair_and_of_no_other_that_the_challenger_had() -> None:
    """Version 3 disagrees with version 4 in what is being compared when version 2 takes over, which agrees."""

    class Answering:
        """The challenger's answers wait for `let_go`."""

        def __init__(self) -> None:
            self.let_go = asyncio.Event()

        async def predict(self, served: Any, images: Any, wanted: Any) -> list[Told]:
            if served == RIVAL:
                await self.let_go.wait()
            return [replace(ranked(1), class_names=("one",) if served == LIVE else ("another",))]

    first = replace(STANDING, share=0.0, shadow=1.0)
    asked, models = client(first), Answering()
    asked.gate._ask = models  # type: ignore[assignment]

    async def shown(after: int) -> tuple[int, int]:
        async with asyncio.timeout(10):
            while len(asked.gate._shadows) > after:
                await asyncio.sleep(0)
        _, body, _ = await asked.send("GET", "/models", asked._body([b""], 0), {})
        challenger = body["models"][0]["challenger"]
        return challenger["compared"], challenger["agreed"]

    async def scenario() -> None:
        for _ in range(2):
            await asked.post("/predict/digits", [b"x"])
        asked.gate.roster = Roster.of([replace(first, live=OLD, kept=(LIVE,))])
        assert await shown(after=2) == (0, 0)
        models.let_go.set()
        assert await shown(after=0) == (0, 0)  # they were compared with another
        for _ in range(3):
            await asked.post("/predict/digits", [b"x"])
        assert await shown(after=0) == (3, 3)
        asked.gate.roster = Roster.of([first])
        assert await shown(after=0) == (2, 0)

    asyncio.run(scenario())


def test_a_shadow_that_fails_or_is_slow_is_not_the_clients_affair() -> None:
    asked = client(replace(STANDING, share=0.0, shadow=1.0), max_shadowed=2, answer_s=5.0)

    class Slow:
        """Answers at once as the live version, and never as the challenger."""

        def __init__(self) -> None:
            self.versions: list[str] = []

        async def predict(self, served: Any, images: Any, wanted: Any) -> list[Told]:
            self.versions.append(served.version)
            if served.version == "4":
                await asyncio.sleep(60)
            return [ranked(1)]

    slow = Slow()
    asked.gate._ask = slow  # type: ignore[assignment]

    async def scenario() -> None:
        for _ in range(5):
            assert (await asked.post("/predict/digits", [b"x"]))[0] == 200
            await asyncio.sleep(0)

    asyncio.run(scenario())
    assert slow.versions.count("3") == 5
    assert slow.versions.count("4") == 2  # no more than are allowed at once


def test_answers_that_come_at_once_shadow_no_more_than_is_allowed() -> None:
    asked = client(replace(STANDING, share=0.0, shadow=1.0), max_shadowed=3)
    most, in_hand = 0, 0

    class Slow:
        """Answers as the live version when all have asked, and as the challenger a moment later."""

        async def predict(self, served: Any, images: Any, wanted: Any) -> list[Told]:
            nonlocal most, in_hand
            if served.version == "4":
                in_hand += 1
                most = max(most, in_hand)
                await asyncio.sleep(0.01)
                in_hand -= 1
            else:
                await all_asked.wait()
            return [ranked(1)]

    asked.gate._ask = Slow()  # type: ignore[assignment]
    all_asked = asyncio.Event()

    async def scenario() -> None:
        asking = [asyncio.ensure_future(asked.post("/predict/digits", [b"x"])) for _ in range(16)]
        async with asyncio.timeout(30):
            while asked.gate._inflight < 16:
                await asyncio.sleep(0)
        all_asked.set()
        assert {status for status, *_ in await asyncio.gather(*asking)} == {200}
        await asyncio.gather(*asked.gate._shadows)
        assert (await asked.post("/predict/digits", [b"x"]))[0] == 200  # and there is room again
        await asyncio.gather(*asked.gate._shadows)

    asyncio.run(scenario())
    assert most == 3
    assert asked.gate.agreement(LIVE, RIVAL).compared == 4


def test_a_roster_that_changes_is_turned_to_between_requests() -> None:
    asked = client(replace(STANDING, share=0.0))
    assert ask(asked)[1]["model"]["version"] == "3"
    asked.gate.roster = Roster.of([Standing("digits", RIVAL, None, (LIVE,))])
    assert ask(asked)[1]["model"]["version"] == "4"
    assert ask(asked, "/predict/digits/versions/3")[0] == 200


def found(*objects: tuple[str, tuple[float, float, float, float]]) -> Told:
    names = tuple(name for name, _ in objects)
    return Told((0,) * len(objects), names, (0.9,) * len(objects), tuple(box for _, box in objects), 1.0, 1.0, 1.0)


CAT, DOG = ("cat", (0.0, 0.0, 10.0, 10.0)), ("dog", (0.0, 0.0, 10.0, 10.0))
NEAR, FAR = ("cat", (0.0, 0.0, 10.0, 6.0)), ("cat", (0.0, 0.0, 10.0, 4.0))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (found(CAT), found(CAT), True),
        (found(CAT), found(NEAR), True),  # an IoU of 0.6
        (found(CAT), found(FAR), False),  # of 0.4
        (found(CAT), found(DOG), False),
        (found(CAT), found(CAT, DOG), False),
        (found(CAT, DOG), found(DOG, CAT), True),
        (found(CAT, CAT), found(CAT), False),
        (found(), found(), True),
        (ranked(2), ranked(3), True),  # the best class counts
        (ranked(1), replace(ranked(1), class_names=("another",)), False),
        (Refused("truncated", "ends early"), ranked(1), False),
    ],
)
def test_agree_of_two_answers_is_what_hand_and_eye_say(one: Told | Refused, other: Told | Refused, same: bool) -> None:
    assert agree(one, other) is same
    assert agree(other, one) is same


def test_iou_of_boxes_without_area_is_nothing() -> None:
    assert iou((1, 1, 1, 1), (1, 1, 1, 1)) == 0.0
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)


def test_after_keeps_a_model_that_a_new_reconciler_does_not_serve_yet() -> None:
    last = Roster.of([STANDING, Standing("flowers", SERVED[1])])
    news = Roster.of([Standing("digits", troubles={"champion": "no room"}), Standing("flowers", SERVED[1])])
    kept = news.after(last)
    assert kept.standings["digits"] == replace(STANDING, troubles={"champion": "no room"})
    assert kept.standings["flowers"].live == SERVED[1]
    assert kept.token == news.token
    assert news.after(Roster({})) == news
