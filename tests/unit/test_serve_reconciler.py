"""What is served follows the aliases: decided here against a registry and a stage that do as they are told."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import BundleError, ModelError, TrackingError
from serve.follower import TIDY_S, TURN_S, Follower
from serve.pauses import FIRST_PAUSE_S, LONGEST_PAUSE_S
from serve.reconciler import Reconciler
from serve.schemas import ModelArgs, Served


def version(number: int, alias: str | None = "champion", app: str = "") -> Served:
    return Served("digits", str(number), alias, Path("/nowhere"), 10, weights=f"w{number}", app=app)


class Registry:
    """Aliases that point where the test says; an exception is raised."""

    def __init__(self, champion: int | Exception = 1, challenger: int | Exception | None = None) -> None:
        self.points: dict[str, int | Exception | None] = {"champion": champion, "challenger": challenger}
        self.was: int | None = None
        self.remembered: list[str] = []
        self.is_full = False
        self.needed: list[set[str]] = []
        self.shares: list[float] = []

    def settle(self, model: ModelArgs, alias: str) -> Served:
        self.shares.append(model.load_share)
        found = self.points[alias]
        if isinstance(found, Exception):
            raise found
        assert found is not None
        return version(found, alias)

    def last(self, model: ModelArgs, alias: str) -> Served | None:
        return None if self.was is None else version(self.was, alias)

    def settle_if_any(self, model: ModelArgs, alias: str) -> Served | None:
        return None if self.points[alias] is None else self.settle(model, alias)

    def remember(self, served: Served) -> None:
        if self.is_full:
            raise BundleError("what is served cannot be written to /srv/cache/served.json: No space left on device")
        self.remembered.append(served.version)

    def tidy(self, model: ModelArgs, needed: Collection[str]) -> None:
        self.needed.append(set(needed))


class Loading:
    """A stage whose loads and rehearsals fail as told; `during` is done while a version is being loaded."""

    def __init__(self) -> None:
        self.apps: list[str] = []
        self.did: list[str] = []
        self.fails: dict[str, Exception] = {}
        self.answers_wrongly: dict[str, Exception] = {}
        self.slow: set[str] = set()
        self.during: Any = None
        self.shares: list[float] = []

    def place(self, served: Served, model: ModelArgs) -> str:
        return f"app-{served.version}"

    async def find(self, served: Served, model: ModelArgs) -> Served | None:
        app = self.place(served, model)
        return replace(served, app=app) if app in self.apps else None

    async def load(self, served: Served, model: ModelArgs) -> Served:
        app = self.place(served, model)
        self.did.append(f"load {served.version}")
        self.shares.append(model.load_share)
        if self.during is not None:
            self.during()
        if served.version in self.slow:
            await asyncio.sleep(60)
        if served.version in self.fails:
            raise self.fails[served.version]
        self.apps.append(app)
        return replace(served, app=app)

    async def rehearse(self, served: Served, model: ModelArgs) -> None:
        if served.version in self.answers_wrongly:
            raise self.answers_wrongly[served.version]

    async def unload(self, app: str) -> None:
        self.did.append(f"unload {app.removeprefix('app-')}")
        self.apps.remove(app)

    async def loaded(self, model: ModelArgs) -> Sequence[str]:
        return list(self.apps)

    def handles(self) -> Mapping[str, Any]:
        return {app: f"handle of {app}" for app in self.apps}


class Case:
    """A follower, its registry and stage, and a clock that stands still."""

    def __init__(self, registry: Registry, **model: Any) -> None:
        self.registry, self.stage, self.now_s = registry, Loading(), 0.0
        self.args = ModelArgs(**({"name": "digits", "keep_s": 100.0} | model))
        self.published: list[str | None] = []
        self.follower = Follower(self.args, registry, self.stage, self.publish, clock=lambda: self.now_s)

    def publish(self) -> None:
        self.published.append(self.live)

    def step(self, now_s: float | None = None) -> None:
        self.now_s = self.now_s if now_s is None else now_s

        async def once() -> None:
            await self.follower.follow_live()
            await self.follower.follow_challenger()
            await self.follower.tidy()

        asyncio.run(once())

    @property
    def live(self) -> str | None:
        live = self.follower.standing.live
        return live.version if live else None

    @property
    def kept(self) -> list[str]:
        return [one.version for one in self.follower.standing.kept]

    @property
    def troubles(self) -> dict[str, str]:
        return dict(self.follower.standing.troubles)


def test_step_at_first_loads_what_the_alias_points_to_and_remembers_it() -> None:
    case = Case(Registry(3))
    case.step()
    assert case.follower.standing.live == version(3, app="app-3")
    assert case.registry.remembered == ["3"]
    case.step()
    assert case.stage.did == ["load 3"]  # nothing moved, nothing is done


def test_the_first_version_is_loaded_at_once_and_those_beside_it_with_restraint() -> None:
    case = Case(Registry(1), load_share=0.1, challenger={"share": 0.5})
    case.step()
    case.registry.points |= {"champion": 2, "challenger": 3}
    case.step()
    assert case.stage.did == ["load 1", "load 2", "load 3"]
    assert case.stage.shares == [1.0, 0.1, 0.1]
    assert case.registry.shares == [1.0] * 2 + [0.1] * 4  # asked before and after each loading


def test_step_after_the_alias_has_moved_keeps_the_version_before_for_a_while() -> None:
    case = Case(Registry(1))
    case.step()
    case.registry.points["champion"] = 2
    case.step()
    assert (case.live, case.kept) == ("2", ["1"])
    case.step(99.0)
    assert case.kept == ["1"]
    case.step(100.0)
    assert (case.live, case.kept, case.stage.apps) == ("2", [], ["app-1", "app-2"])  # nobody is told of it any more
    case.step(100.0 + TURN_S - 1)
    assert case.stage.apps == ["app-1", "app-2"]
    case.step(100.0 + TURN_S)
    assert case.stage.did == ["load 1", "load 2", "unload 1"]


def test_a_version_is_kept_until_every_ingress_has_turned_away_however_short_keep_s_is() -> None:
    case = Case(Registry(1), keep_s=0.0)
    case.step()
    case.registry.points["champion"] = 2
    case.step()
    case.step(TURN_S - 1)
    assert case.kept == ["1"]
    case.step(TURN_S)
    assert case.kept == []


def test_an_alias_that_moves_back_to_what_is_about_to_be_unloaded_keeps_it() -> None:
    case = Case(Registry(1))
    case.step()
    case.registry.points["champion"] = 2
    case.step()
    case.step(100.0)
    case.registry.points["champion"] = 1
    case.step(101.0)
    case.step(100.0 + 3 * TURN_S)
    assert (case.live, case.stage.did) == ("1", ["load 1", "load 2"])


def test_a_version_that_is_loaded_is_neither_rehearsed_nor_unloaded_again() -> None:
    case = Case(Registry(1, challenger=2), challenger={})
    case.step()
    case.stage.answers_wrongly["2"] = ModelError("too busy to answer")
    case.registry.points["champion"] = 2
    case.step()
    assert (case.live, case.stage.apps, case.troubles) == ("2", ["app-1", "app-2"], {})
    assert case.stage.did == ["load 1", "load 2"]


def test_what_cannot_be_unloaded_stops_nothing_and_is_tried_again() -> None:
    class Stuck(Loading):
        async def unload(self, app: str) -> None:
            self.did.append("try")
            raise RuntimeError("the controller does not answer")

    case = Case(Registry(1))
    case.stage = case.follower._stage = Stuck()
    case.step()
    case.registry.points["champion"] = 2
    for now_s in (0.0, 100.0, 120.0, 121.0):
        case.step(now_s)
    case.registry.points["champion"] = 3
    case.step()
    assert case.live == "3"
    assert case.stage.did.count("try") >= 2


def test_an_alias_that_moves_back_finds_its_version_loaded() -> None:
    case = Case(Registry(1))
    for number in (1, 2, 1):
        case.registry.points["champion"] = number
        case.step()
    assert (case.live, case.kept) == ("1", ["2"])
    assert not any(done.startswith("unload") for done in case.stage.did)


@pytest.mark.parametrize("place", ["fails", "answers_wrongly"])
def test_a_version_that_cannot_be_taken_leaves_the_live_one_and_says_why(place: str) -> None:
    case = Case(Registry(1))
    case.step()
    getattr(case.stage, place)["2"] = ModelError("golden image 0: class 3 had 0.9")
    case.registry.points["champion"] = 2
    case.step()
    assert (case.live, case.kept, case.stage.apps) == ("1", [], ["app-1"])
    assert case.troubles == {"champion": "golden image 0: class 3 had 0.9"}


def test_a_version_that_cannot_be_taken_is_tried_again_after_pauses_that_double() -> None:
    case = Case(Registry(1))
    case.step()
    trace = "Traceback (most recent call last):\n  File /srv/a.py, line 1\nValueError: http://me:x@host/y, see /tmp/a/b"
    case.stage.fails["2"] = RuntimeError(trace)
    case.registry.points["champion"] = 2
    tried_s = []
    while case.now_s < 3 * LONGEST_PAUSE_S:
        before = len(case.stage.did)
        case.step()
        tried_s += [case.now_s] * (len(case.stage.did) > before)
        case.now_s += 1.0
    pauses = [after - before for before, after in itertools.pairwise(tried_s)]
    assert pauses[:4] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S, 8 * FIRST_PAUSE_S]
    assert max(pauses) == LONGEST_PAUSE_S
    assert case.troubles == {
        "champion": "an unforeseen RuntimeError (ValueError: http://host/y, see b); the reconciler's log tells more"
    }
    del case.stage.fails["2"]
    case.now_s += LONGEST_PAUSE_S
    case.step()
    assert (case.live, case.troubles) == ("2", {})


def test_a_newer_version_is_not_held_up_by_one_that_was_refused() -> None:
    case = Case(Registry(1))
    case.step()
    case.stage.fails["2"] = RuntimeError("no room")
    for number in (2, 3):
        case.registry.points["champion"] = number
        case.step()
    assert (case.live, case.troubles) == ("3", {})


@pytest.mark.parametrize(
    "error", [TrackingError("no MLflow server answers"), BundleError("the stored bundle is not the registered one")]
)
def test_a_registry_that_fails_changes_nothing_but_says_so_until_it_answers(error: Exception) -> None:
    case = Case(Registry(1))
    case.step()
    case.registry.points["champion"] = error
    case.step()
    assert (case.live, case.troubles) == ("1", {"champion": str(error)})
    case.registry.points["champion"] = 1
    case.step()
    assert (case.live, case.troubles, case.stage.did) == ("1", {}, ["load 1"])


def test_a_start_without_the_registry_serves_what_was_served_last() -> None:
    case = Case(Registry(TrackingError("no MLflow server answers")))
    case.registry.was = 7
    case.step()
    assert case.live == "7"
    case.step()
    assert (case.live, case.troubles) == ("7", {"champion": "no MLflow server answers"})


def test_an_alias_that_moves_on_while_its_version_is_loaded_is_not_served_by_that_version() -> None:
    case = Case(Registry(1))
    case.step()
    case.registry.points["champion"] = 2
    case.stage.during = lambda: case.registry.points.update(champion=1)  # somebody takes it back
    case.step()
    assert (case.live, case.kept) == ("1", ["2"])
    for now_s in (100.0, 100.0 + TURN_S):
        case.step(now_s)
    assert case.stage.apps == ["app-1"]


def test_a_flapping_alias_loads_each_version_once_and_ends_where_it_points() -> None:
    case = Case(Registry(1))
    for number in [1, 2] * 50 + [1]:
        case.registry.points["champion"] = number
        case.step()
        assert case.live == str(number)
    assert case.stage.apps == ["app-1", "app-2"]
    assert case.kept == ["2"]


def test_a_challenger_stands_beside_the_live_version_until_its_alias_goes() -> None:
    case = Case(Registry(1, challenger=2), challenger={"share": 0.25, "shadow": 1.0})
    case.step()
    standing = case.follower.standing
    assert standing.challenger == version(2, "challenger", "app-2")
    assert (standing.share, standing.shadow) == (0.25, 1.0)
    case.registry.points["challenger"] = None
    case.step()
    assert (case.live, case.follower.standing.challenger, case.kept) == ("1", None, ["2"])


def test_a_challenger_that_is_promoted_is_live_at_once_and_its_own_challenger_no_more() -> None:
    case = Case(Registry(1, challenger=2), challenger={})
    case.step()
    case.registry.points["champion"] = 2
    case.step()
    assert (case.live, case.follower.standing.challenger, case.kept) == ("2", None, ["1"])
    assert case.follower.standing.live == version(2, "champion", "app-2")


def test_a_challenger_that_fails_leaves_the_live_version_alone() -> None:
    case = Case(Registry(1, challenger=2), challenger={})
    case.stage.answers_wrongly["2"] = ModelError("another answer")
    case.step()
    assert (case.live, case.follower.standing.challenger) == ("1", None)
    assert case.troubles == {"challenger": "another answer"}


def test_a_challenger_that_is_loaded_slowly_holds_nothing_up() -> None:
    """The live version is published, and a rollback followed, while the challenger takes its minute."""
    case = Case(Registry(2, challenger=3), challenger={})
    case.stage.slow = {"3"}

    async def scenario() -> None:
        await case.follower.follow_live()
        assert case.published == ["2"]
        slow = asyncio.create_task(case.follower.follow_challenger())
        await asyncio.sleep(0.05)
        case.registry.points["champion"] = 1
        await case.follower.follow_live()
        assert case.live == "1"
        case.now_s = 1000.0
        await case.follower.tidy()  # nobody has been told yet
        assert case.stage.apps == ["app-2", "app-1"]
        slow.cancel()

    asyncio.run(scenario())


def test_a_version_that_is_loaded_slowly_holds_up_no_unloading_it_may_wait_for_that_room() -> None:
    case = Case(Registry(1), keep_s=0.0)
    case.step()
    case.registry.points["champion"] = 2
    case.step()
    case.step(TURN_S)
    case.registry.points["champion"] = 3
    case.stage.slow = {"3"}

    async def scenario() -> None:
        slow = asyncio.create_task(case.follower.follow_live())
        async with asyncio.timeout(10):
            while "load 3" not in case.stage.did:
                await asyncio.sleep(0.01)
        case.now_s = 2 * TURN_S
        await case.follower.tidy()
        assert case.stage.apps == ["app-2"]
        slow.cancel()

    asyncio.run(scenario())


def test_a_model_is_not_replaced_by_one_of_another_task() -> None:
    case = Case(Registry(1))
    case.step()
    settle = case.registry.settle
    case.registry.settle = lambda model, alias: replace(settle(model, alias), task="detection")  # type: ignore[method-assign]
    case.registry.points["champion"] = 2
    case.step()
    assert case.live == "1"
    assert "version 2 is for detection, version 1, which is served, for classification" in case.troubles["champion"]


def test_an_alias_that_means_the_live_version_too_reaches_it() -> None:
    case = Case(Registry(1, challenger=1), challenger={})
    case.step()
    standing = case.follower.standing
    assert (standing.challenger, standing.also) == (None, ("challenger",))
    assert standing.find("challenger", None) == standing.live
    assert standing.find("challenger", "2") is None


@pytest.mark.parametrize(
    "trouble",
    [ModelError("another answer"), TrackingError("model 'digits' has no alias 'champion'"), OSError("no space left")],
)
def test_a_reconciler_that_is_started_anew_serves_the_last_version_where_the_wanted_one_cannot_be(
    trouble: Exception,
) -> None:
    """Its predecessor had version 1 live, and the alias points to what cannot be taken."""
    case = Case(Registry(2))
    case.registry.was, case.stage.apps = 1, ["app-1"]
    if isinstance(trouble, ModelError):
        case.stage.fails["2"] = trouble
    else:
        case.registry.points["champion"] = trouble
    case.step()
    assert (case.live, case.stage.apps) == ("1", ["app-1"])
    assert set(case.troubles) == {"champion"}


def test_a_reconciler_that_is_started_anew_finds_what_is_loaded_and_unloads_nothing_of_it_when_it_is_too_busy() -> None:
    case = Case(Registry(1))
    case.registry.was, case.stage.apps = 1, ["app-1"]
    case.stage.answers_wrongly["1"] = TimeoutError()
    for now_s in (0.0, 1000.0, 2000.0):
        case.step(now_s)
    assert (case.live, case.stage.did) == ("1", [])


def test_a_registry_that_goes_away_while_a_version_is_loaded_refuses_nothing() -> None:
    case = Case(Registry(1))
    case.step()
    case.registry.points["champion"] = 2
    case.stage.during = lambda: case.registry.points.update(champion=TrackingError("no MLflow server answers"))
    case.step()
    assert (case.live, case.kept) == ("1", ["2"])
    case.registry.points["champion"] = 2
    case.step()
    assert (case.live, case.stage.did) == ("2", ["load 1", "load 2"])


def test_troubles_tell_no_password_and_no_folder() -> None:
    case = Case(
        Registry(TrackingError("http://bob:secret@10.0.0.1:5000: /srv/cache/digits/3/model.json is not a card"))
    )
    case.step()
    assert case.troubles == {"champion": "http://10.0.0.1:5000: model.json is not a card"}


def test_reconciler_tells_news_at_once() -> None:
    async def scenario() -> None:
        registry, stage = Registry(1), Loading()
        stage.apps = ["app-1"]
        reconciler = Reconciler([ModelArgs(name="digits")], registry, stage, poll_s=0.01)
        reconciler.begin()
        async with asyncio.timeout(10):
            first, handles = await reconciler.roster("")
            assert first.standings["digits"].live == version(1, app="app-1")
            assert handles["app-1"] == "handle of app-1"
            waiting = asyncio.create_task(reconciler.roster(first.token))
            registry.points["champion"] = 2
            second, handles = await waiting
        assert second.token != first.token
        assert [one.version for one in second.standings["digits"].versions] == ["2", "1"]
        assert set(handles) == {"app-1", "app-2"}
        reconciler.check()

    asyncio.run(scenario())


def test_what_a_predecessor_left_is_unloaded_once_nobody_can_ask_it() -> None:
    case = Case(Registry(1, challenger=2), challenger={})
    case.stage.apps = ["app-1", "app-2", "app-of-yore"]
    case.step()
    case.step(TURN_S - 1)
    assert case.stage.apps == ["app-1", "app-2", "app-of-yore"]
    case.step(TURN_S)
    assert case.stage.apps == ["app-1", "app-2"]


def test_reconciler_whose_task_has_ended_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(self: Follower) -> None:
        raise OSError("gone")

    async def scenario() -> None:
        monkeypatch.setattr(Follower, "tidy", broken)
        reconciler = Reconciler([ModelArgs(name="digits")], Registry(1), Loading(), poll_s=0.01)
        reconciler.begin()
        async with asyncio.timeout(10):
            await asyncio.wait(reconciler.tasks, return_when=asyncio.FIRST_COMPLETED)
        with pytest.raises(RuntimeError, match="the reconciler has stopped: gone"):
            reconciler.check()

    asyncio.run(scenario())


def test_what_is_served_but_not_written_down_is_served_all_the_same_and_written_when_it_can_be() -> None:
    case = Case(Registry(1))
    case.step()
    case.registry.is_full = True
    case.registry.points["champion"] = 2
    case.step()
    told = {"served.json": "what is served cannot be written to served.json: No space left on device"}
    assert (case.live, case.troubles) == ("2", told)
    published = len(case.published)
    case.step()
    assert (case.troubles, len(case.published)) == (told, published)  # the ingress is not told the same again
    case.registry.is_full = False
    case.step()
    case.step()
    assert (case.live, case.troubles, case.registry.remembered) == ("2", {}, ["1", "2"])


def test_bundles_are_let_go_at_quiet_times_only_and_those_of_shown_versions_never() -> None:
    case = Case(Registry(1, challenger=2), challenger={})
    case.stage.apps = ["app-of-yore"]
    case.step()
    assert case.registry.needed == []  # something is loaded that nobody knows
    case.step(TURN_S)
    assert case.registry.needed == [{"1", "2"}]
    case.registry.points["champion"] = 3
    case.step(2 * TURN_S)
    case.step(2 * TURN_S + TIDY_S)  # version 1 is kept no longer, but an ingress may still ask it
    assert (case.kept, case.registry.needed[1:]) == ([], [])
    case.step(3 * TURN_S + TIDY_S)
    assert case.registry.needed[1:] == [{"3", "2"}]
    case.step(3 * TURN_S + 2 * TIDY_S - 1)
    assert case.registry.needed[2:] == []
    case.step(3 * TURN_S + 2 * TIDY_S)
    assert case.registry.needed[2:] == [{"3", "2"}]


def test_bundles_are_not_let_go_while_a_version_is_being_loaded() -> None:
    case = Case(Registry(1, challenger=2), challenger={})
    case.stage.slow = {"2"}

    async def scenario() -> None:
        await case.follower.follow_live()
        slow = asyncio.create_task(case.follower.follow_challenger())
        async with asyncio.timeout(10):
            while "load 2" not in case.stage.did:
                await asyncio.sleep(0.01)
        await case.follower.tidy()
        assert case.registry.needed == []
        slow.cancel()

    asyncio.run(scenario())


def test_bundles_that_cannot_be_let_go_stop_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Stuck(Registry):
        def tidy(self, model: ModelArgs, needed: Collection[str]) -> None:
            raise RuntimeError("stuck")

    case = Case(Stuck(1))
    case.step()
    assert "unused bundles could not be removed" in caplog.text
    case.registry.points["champion"] = 2
    case.step()
    assert (case.live, case.troubles) == ("2", {})
