"""From names to versions to bundles: local folders, and aliases in a real registry."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs._process import Service
from pipeline import config, models
from pipeline.errors import BundleError, ConfigError, TrackingError
from pipeline.inference import bundle
from pipeline.tracking import fetched, registry, runs
from serve import versions
from serve.follower import Follower
from serve.pauses import FIRST_PAUSE_S
from serve.schemas import AppArgs, ModelArgs, Served


def make_bundle(path: Path, seed: int) -> bundle.Bundle:
    torch.manual_seed(seed)
    architecture = models.config_of("lenet5")(name="lenet5", num_classes=3)
    return bundle.save(path, models.build_classifier(architecture), architecture, classes=("a", "b", "c"))


def args(*served: dict[str, Any], **more: Any) -> AppArgs:
    return config.parse(AppArgs, {"models": list(served)} | more, "args")


def test_settle_all_of_an_alias_settles_its_version_until_it_is_asked_again(
    mlflow_server: Service, tmp_path: Path
) -> None:
    uri = mlflow_server.address
    with runs.start(uri, runs.Config(experiment="reconciler"), params={}, tags={}) as run:
        made = [registry.publish(run, make_bundle(tmp_path / str(seed), seed), "reconciled") for seed in (1, 2)]
    wanted = args({"name": "reconciled"}, registry=uri, cache=str(tmp_path / "cache"))
    for version, seed in zip(made, (1, 2), strict=True):
        registry.promote(uri, "reconciled", version.version)
        (served,) = versions.settle_all(wanted)
        assert (served.name, served.version, served.alias) == ("reconciled", version.version, "champion")
        assert (served.num_classes, served.engine, served.run_url) == (3, "eager-fp32", run.url)
        assert bundle.load(served.bundle).card == bundle.load(tmp_path / str(seed)).card
        assert served.bundle.is_relative_to(tmp_path / "cache")


def test_link_to_a_run_gives_no_password_away_and_none_is_made_up(mlflow_server: Service, tmp_path: Path) -> None:
    uri = mlflow_server.address
    with runs.start(uri, runs.Config(experiment="reconciler"), params={}, tags={}) as run:
        version = registry.publish(run, make_bundle(tmp_path / "made", 5), "linked")
    assert registry.run_url(uri.replace("//", "//me:secret@"), version) == run.url
    assert registry.run_url(uri, replace(version, run_id="0" * 32)) is None
    assert registry.run_url(uri, replace(version, run_id="")) is None


def test_settle_all_of_an_unknown_model_says_which_are_known(mlflow_server: Service, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="no model 'nobody' is registered"):
        versions.settle_all(args({"name": "nobody"}, registry=mlflow_server.address, cache=str(tmp_path)))


def test_settle_all_without_a_registry_says_how_to_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="model 'digits' is to come from the registry, but there is none: set"):
        versions.settle_all(args({"name": "digits"}))


def test_settle_all_of_a_folder_needs_no_registry_and_takes_the_weights_checksum_for_a_version(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "made", 3)
    (served,) = versions.settle_all(args({"name": "local", "bundle": str(made.path)}))
    assert (served.version, served.alias, served.run_url) == (made.card.weights_sha256[:12], None, None)
    assert served.bundle == made.path


def test_settle_all_of_a_damaged_folder_deploys_nothing(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "made", 4)
    weights = made.path / bundle.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    with pytest.raises(BundleError, match="sha256 differs"):
        versions.settle_all(args({"name": "local", "bundle": str(made.path)}))


@pytest.fixture(scope="module")
def three(mlflow_server: Service, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a registry with the versions 1, 2 and 3 of `kept`."""
    uri, folder = mlflow_server.address, tmp_path_factory.mktemp("three")
    with runs.start(uri, runs.Config(experiment="kept"), params={}, tags={}) as run:
        for seed in (1, 2, 3):
            registry.publish(run, make_bundle(folder / str(seed), seed), "kept")
    return uri


class Anywhere:
    """A stage on which everything is loaded at once."""

    def place(self, served: Served, model: ModelArgs) -> str:
        return f"app-{served.version}"

    async def find(self, served: Served, model: ModelArgs) -> Served | None:
        return replace(served, app=self.place(served, model))

    async def rehearse(self, served: Served, model: ModelArgs) -> None:
        bundle.load(served.bundle)

    async def loaded(self, model: ModelArgs) -> list[str]:
        return []


class Following:
    """A follower of `kept@champion` by a real registry and a real cache, and the clock of both."""

    def __init__(self, uri: str, cache: Path, **more: Any) -> None:
        wanted = args({"name": "kept", "keep_s": 0.0} | more, registry=uri, cache=str(cache))
        self.uri, self.cache, self.now_s = uri, cache, 0.0
        self.model, self.versions = wanted.models[0], versions.Versions(wanted, lambda: self.now_s)
        stage: Any = Anywhere()
        self.follower = Follower(self.model, self.versions, stage, lambda: None, lambda: self.now_s)

    def step(self, champion: str | None = None) -> str | None:
        """Follow the alias, perhaps to where it moves; the version that is live then."""
        if champion is not None:
            registry.promote(self.uri, "kept", champion)
        asyncio.run(self.follower.follow_live())
        live = self.follower.standing.live
        return live.version if live else None

    @property
    def troubles(self) -> dict[str, str]:
        return dict(self.follower.standing.troubles)

    @property
    def copies(self) -> list[str]:
        return sorted(path.name for path in (self.cache / "kept").iterdir())

    def age(self) -> None:
        """Let everything have been asked for two days ago."""
        then_s = time.time() - 2 * versions.UNUSED_S
        for receipt in (self.cache / fetched.RECEIPTS / "kept").iterdir():
            os.utime(receipt, (then_s, then_s))


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Let no file of this process grow longer: the write fails as on a full disk, with another number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_bundles_that_nobody_needs_are_removed_and_what_was_served_last_is_not(three: str, tmp_path: Path) -> None:
    following = Following(three, tmp_path)
    assert [following.step(number) for number in ("1", "2", "3", "2")] == ["1", "2", "3", "2"]
    (tmp_path / "kept" / "7").mkdir()
    (tmp_path / "kept" / "7" / "model.json").write_text("somebody's own")
    following.versions.tidy(following.model, {"2"})
    assert following.copies == ["1", "2", "3", "7"]  # asked for only just now
    (tmp_path / "kept" / ".2.partial-abc").mkdir()  # of a download that was killed
    os.utime(tmp_path / "kept" / ".2.partial-abc", (0, 0))
    following.age()
    following.versions.tidy(following.model, {"3"})
    assert following.copies == ["2", "3", "7"]  # 2 was served last, 3 is needed
    assert following.step("1") == "1"  # which is fetched again
    assert following.copies == ["1", "2", "3", "7"]
    following.age()
    assert following.step() == "1"
    following.versions.tidy(following.model, set())
    assert following.copies == ["1", "7"]
    away = versions.Versions(args({"name": "kept"}, registry="http://127.0.0.1:9", cache=str(tmp_path)))
    last = away.last(following.model, "champion")
    assert last is not None
    assert bundle.load(last.bundle).card == bundle.load(tmp_path / "kept" / "1").card


def test_a_bundle_that_cannot_be_removed_is_logged_and_the_others_go(
    three: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    following = Following(three, tmp_path)
    assert [following.step(number) for number in ("1", "2", "3")] == ["1", "2", "3"]
    (tmp_path / "kept" / ".1.removed").write_text("in its way")
    following.age()
    following.versions.tidy(following.model, {"3"})
    assert following.copies == [".1.removed", "1", "3"]
    assert "kept version 1: its bundle, which nobody needs, is not removed: " in caplog.text


def test_nothing_is_removed_where_nobody_knows_what_was_served_last(
    three: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    following = Following(three, tmp_path)
    assert [following.step(number) for number in ("1", "2")] == ["1", "2"]
    (tmp_path / versions.MEMORY).write_text("{damaged")
    following.age()
    following.versions.tidy(following.model, set())
    assert following.copies == ["1", "2"]
    assert "unused bundles are not removed" in caplog.text


def test_a_bundle_for_which_there_is_no_room_leaves_the_live_version_and_says_so_until_there_is(
    three: str, tmp_path: Path
) -> None:
    following = Following(three, tmp_path / "cache")
    assert following.step("1") == "1"
    with files_of_at_most(60_000):
        assert following.step("2") == "1"
    assert following.troubles == {
        "champion": "the bundle of kept version 2 cannot be kept in cache: File too large; make room there, or let it "
        "be written to"
    }
    assert following.copies == ["1"]
    assert fetched.versions(tmp_path / "cache", "kept") == ["1"]
    assert following.step() == "1"  # not tried again at once
    assert set(following.troubles) == {"champion"}
    following.now_s += FIRST_PAUSE_S
    assert following.step() == "2"
    assert following.troubles == {}
    assert following.copies == ["1", "2"]


def test_what_is_served_stays_written_where_the_next_cannot_be(three: str, tmp_path: Path) -> None:
    following = Following(three, tmp_path / "cache")
    assert [following.step(number) for number in ("1", "2", "1")] == ["1", "2", "1"]
    memory = tmp_path / "cache" / versions.MEMORY
    before = memory.read_text()
    with files_of_at_most(100):
        assert following.step("2") == "2"
    assert following.troubles == {
        "served.json": "what is served cannot be written to served.json: File too large; make room there, for a start "
        "without the registry would not find it"
    }
    assert memory.read_text() == before
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [fetched.RECEIPTS, "kept", "served.json"]
    assert following.step() == "2"
    assert following.troubles == {}
    assert json.loads(memory.read_text())["kept"]["champion"]["version"] == "2"


class Interrupted(versions.Versions):
    """One that is held up just after it has read what is written, so that another can come in between."""

    def __init__(self, wanted: AppArgs, meanwhile: Callable[[], None]) -> None:
        super().__init__(wanted)
        self._meanwhile = meanwhile

    def _read(self) -> Any:
        found = super()._read()
        self._meanwhile()
        return found


def test_applications_that_share_a_cache_lose_nothing_that_the_other_serves(three: str, tmp_path: Path) -> None:
    wanted = args({"name": "kept"}, registry=three, cache=str(tmp_path))
    registry.promote(three, "kept", "1")
    other = versions.Versions(wanted)
    served = other.settle(wanted.models[0], "champion")
    writes = threading.Thread(target=other.remember, args=(replace(served, alias="other"),))

    def let_the_other_write() -> None:
        writes.start()
        writes.join(timeout=0.5)  # as long as it takes where nothing holds it back

    one = Interrupted(wanted, let_the_other_write)
    one.settle(wanted.models[0], "champion")
    one.remember(served)
    writes.join(timeout=60)
    told = json.loads((tmp_path / versions.MEMORY).read_text())["kept"]
    assert {alias: said["version"] for alias, said in told.items()} == {"champion": "1", "other": "1"}


def test_what_many_remember_at_once_is_all_written(three: str, tmp_path: Path) -> None:
    wanted = args({"name": "kept"}, registry=three, cache=str(tmp_path))
    registry.promote(three, "kept", "1")
    served = versions.Versions(wanted).settle(wanted.models[0], "champion")

    def remember(number: int) -> None:
        one = versions.Versions(wanted)
        one.settle(wanted.models[0], "champion")
        together.wait(timeout=60)
        for again in range(5):
            one.remember(replace(served, alias=f"a{number}-{again}"))

    together = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(remember, range(4)))
    told = json.loads((tmp_path / versions.MEMORY).read_text())["kept"]
    assert set(told) == {f"a{number}-{again}" for number in range(4) for again in range(5)}
