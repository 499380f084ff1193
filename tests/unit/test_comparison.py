"""Grouping by seed, the verdict, the table and the page, on made-up runs without a server."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from jobs.compare import _as_keys
from pipeline.data import shards
from pipeline.errors import ConfigError, DataError, TrackingError
from pipeline.tracking.compare import Config, conclude
from pipeline.tracking.comparison import charts, groups
from pipeline.tracking.comparison.evidence import Trial
from pipeline.tracking.comparison.verdict import changes, judge
from pipeline.tracking.predictions import Origin, Predictions

CLASSES = ("ant", "bee", "cat <b>", "dog & co")
NUM_IMAGES = 400


def said(
    wrong: Sequence[int], digest: str = "d" * 64, classes: tuple[str, ...] = CLASSES, num: int = NUM_IMAGES
) -> Predictions:
    """Predictions that are right but for some images, which are taken for the next class."""
    labels = np.arange(num) % len(classes)
    predicted = labels.copy()
    predicted[list(wrong)] = (labels[list(wrong)] + 1) % len(classes)
    scores = np.full((num, len(classes)), 0.1, np.float32)
    scores[np.arange(num), predicted] = 0.5 + np.arange(num, dtype=np.float32) / num / 4
    origin = Origin(split="val", dataset="zoo", dataset_digest=digest, weights_sha256="w", classes=classes)
    return Predictions.of(origin, [f"img/{number:04d}" for number in range(num)], labels, scores)


def trial(name: str, params: Mapping[str, str], wrong: Sequence[int] | None, start_ms: int = 0) -> Trial:
    """One run; `wrong` None: without predictions, as older runs are."""
    predictions = None if wrong is None else said(wrong)
    top1 = 0.5 if predictions is None else float(predictions.right().mean())
    return Trial(
        id=name.encode().hex().ljust(32, "0")[:32],
        name=name,
        url="",
        experiment_id="1",
        split="val",
        start_ms=start_ms,
        seconds=90,
        params=params,
        metrics={"final/val/top1": top1, "final/val/loss": 1 - top1, "images_per_s": 100.0},
        tags={groups.COMMIT: "abc", "host": "here"},
        digest="d" * 64,
        source="",
        curves={
            "val/top1": tuple((epoch, top1 * epoch / 5) for epoch in range(1, 6)),
            "images_per_s": ((1, 90.0), (2, 110.0)),
        },
        predictions=predictions,
    )


def recipe(activation: str, seed: int, **more: str) -> dict[str, str]:
    return {
        "recipe.model.activation": activation,
        "recipe.seed": str(seed),
        "tracking.run_name": f"{activation}{seed}",
        **more,
    }


def two_recipes(tanh_wrong: int, num_seeds: int = 3, relu_wrong: int = 20) -> list[Trial]:
    """Three seeds of relu, wrong about 20 to 22 images, and of tanh, wrong about `tanh_wrong` and up to two more."""
    relu = [trial(f"net-relu-s{seed}", recipe("relu", seed), range(relu_wrong + seed)) for seed in range(num_seeds)]
    tanh = [trial(f"net-tanh-s{seed}", recipe("tanh", seed), range(tanh_wrong + seed)) for seed in range(num_seeds)]
    return [*tanh, *relu]


# ---- grouping


def test_by_recipe_runs_that_differ_in_seed_and_bookkeeping_are_one_group() -> None:
    trials = two_recipes(60)
    shuffled = [trials[place] for place in (5, 0, 3, 1, 4, 2)]
    found, notes = groups.by_recipe(shuffled)
    assert notes == []
    assert [(group.name, [groups.seed(each) for each in group.trials]) for group in found] == [
        ("net-relu", ["0", "1", "2"]),
        ("net-tanh", ["0", "1", "2"]),
    ]
    assert found[0].mean("top1") == pytest.approx(1 - 21 / 400)
    assert found[0].std("top1") == pytest.approx(1 / 400)
    assert (found[0].typical("top1").name, found[0].best("top1").name) == ("net-relu-s1", "net-relu-s0")


def test_by_recipe_what_cannot_change_a_result_makes_no_recipe() -> None:
    base = {"cluster.num_workers": "2", "cluster.max_failures": "1", "checkpoints.every_s": "300", "evaluate": "[val]"}
    kept = {"cluster.max_failures": "9", "checkpoints.every_steps": "10", "evaluate": "[val, test]"}
    first, second = (
        trial(f"r{seed}", recipe("relu", seed, **params), [1]) for seed, params in enumerate((base, base | kept))
    )
    assert len(groups.by_recipe([first, second])[0]) == 1
    wider = trial("r2", recipe("relu", 2, **base | {"cluster.num_workers": "4"}), [1])  # another batch
    assert len(groups.by_recipe([first, second, wider])[0]) == 2


def test_by_recipe_same_seed_again_keeps_the_later_run_and_says_so() -> None:
    first, second = (trial(name, recipe("relu", 0), [1], start) for name, start in (("old", 1), ("new", 2)))
    found, notes = groups.by_recipe([second, first])
    assert [each.name for each in found[0].trials] == ["new"]
    assert "Run old" in notes[0]
    assert "new is a later one of its seed" in notes[0]


def test_by_recipe_evaluations_without_a_seed_stay_apart() -> None:
    found, _ = groups.by_recipe([trial(name, {"model": "m@champion"}, [1]) for name in ("monday", "tuesday")])
    assert [group.name for group in found] == ["monday", "tuesday"]
    assert groups.differences(found) == []


def test_groups_without_a_common_name_are_letters() -> None:
    trials = [trial(name, recipe("relu", seed), [1]) for seed, name in enumerate(("wise-owl", "odd-fish"))]
    trials += [trial(name, recipe("tanh", seed), [1]) for seed, name in enumerate(("red-cat", "big-dog"))]
    assert [group.name for group in groups.by_recipe(trials)[0]] == ["A", "B"]


def test_seeds_are_ordered_as_numbers() -> None:
    found, _ = groups.by_recipe([trial(f"r{seed}", recipe("relu", seed), [1]) for seed in (10, 9, 100)])
    assert [groups.seed(each) for each in found[0].trials] == ["9", "10", "100"]


def test_differences_name_parameters_and_commits_that_are_not_the_same() -> None:
    first = trial("a", recipe("relu", 0, **{"recipe.epochs": "3", "recipe.model.extra": "1"}), [1])
    second = trial("b", recipe("tanh", 1, **{"recipe.epochs": "3", "storage": "/x"}), [1])
    found = groups.differences(groups.by_recipe([first, replace(second, tags={groups.COMMIT: "0123456789"})])[0])
    assert {row.key: row.values for row in found} == {
        "commit": ("abc", "01234567"),
        "recipe.model.activation": ("relu", "tanh"),
        "recipe.model.extra": ("1", groups.NONE),
    }


def test_a_run_that_was_resumed_with_another_value_is_a_recipe_of_its_own() -> None:
    params = {"recipe.optim.lr": "0.1", "resume": "False"}
    plain, changed = (trial(f"net-s{seed}", recipe("relu", seed, **params), [1]) for seed in (0, 1))
    tags = {groups.COMMIT: "abc", "resumed.recipe.optim.lr": "0.01", "resumed.host": "there", "resumed.resume": "True"}
    found, _ = groups.by_recipe([plain, replace(changed, tags=tags)])
    assert len(found) == 2
    assert [(row.key, row.values) for row in groups.differences(found)] == [
        ("recipe.optim.lr", ("0.1", "0.1, then 0.01"))
    ]
    only_resumed = {key: value for key, value in tags.items() if key != "resumed.recipe.optim.lr"}
    assert len(groups.by_recipe([plain, replace(changed, tags=only_resumed)])[0]) == 1


# ---- the verdict


def test_judge_a_clear_difference_names_the_champion_and_both_witnesses() -> None:
    found = judge(groups.by_recipe(two_recipes(60))[0])
    assert found.leader.name == "net-relu"
    assert found.champion
    assert found.champion.name == "net-relu-s0"
    (contrast,) = found.contrasts
    assert contrast.images
    assert contrast.mcnemar_p == pytest.approx(2 / 2**40)
    assert contrast.seeds_p is not None
    assert contrast.mcnemar_p is not None
    assert contrast.p == max(contrast.images.p, contrast.mcnemar_p, contrast.seeds_p)
    assert found.sentence().startswith(
        "net-relu should be champion (its best run: net-relu-s0): mean top-1 94.75 %, 10.00 points above net-tanh "
        "(95 % interval +"
    )


def test_judge_images_may_be_sure_where_seeds_are_not() -> None:
    """Each seed of tanh is very different: the weaker witness decides."""
    relu = [trial(f"relu-{seed}", recipe("relu", seed), range(20 + seed)) for seed in range(3)]
    tanh = [trial(f"tanh-{seed}", recipe("tanh", seed), range(wrong)) for seed, wrong in enumerate((22, 45, 150))]
    found = judge(groups.by_recipe([*relu, *tanh])[0])
    (contrast,) = found.contrasts
    assert contrast.images_p is not None
    assert contrast.images_p < 0.001
    assert contrast.seeds_p is not None
    assert contrast.seeds_p > 0.05
    assert found.champion is None
    assert "No champion is shown: relu leads" in found.sentence()
    assert "the seeds are the weaker witness" in found.sentence()


def test_judge_a_witness_for_the_other_group_never_supports_the_leader() -> None:
    """One lucky seed puts A ahead, over images too; but its typical run is worse than the only one of B."""
    lucky = [trial(f"a-s{seed}", recipe("a", seed), range(wrong)) for seed, wrong in enumerate((70, 66, 20))]
    found = judge(groups.by_recipe([*lucky, trial("b", recipe("b", 0), range(64))])[0])
    (contrast,) = found.contrasts
    assert found.leader.name == "a"
    assert contrast.images
    assert contrast.images.p < 0.05
    assert contrast.mcnemar_p == contrast.p == 1.0
    assert found.champion is None


def test_judge_single_runs_say_that_a_seed_might_object() -> None:
    found = judge(groups.by_recipe([trial("a", recipe("relu", 0), [1]), trial("b", recipe("tanh", 0), range(40))])[0])
    assert found.champion
    assert found.contrasts[0].seeds_p is None
    assert "another seed might say otherwise" in found.sentence()


def test_judge_many_groups_are_held_to_a_higher_standard() -> None:
    """The same two groups stop being told apart when they are among many."""

    def wrongs(extra: int) -> list[int]:
        return [*range(20), *range(100, 100 + extra)]

    alone = [trial("a", recipe("a", 0), wrongs(0)), trial("b", recipe("b", 0), wrongs(7))]
    others = [trial(f"o{number}", recipe(f"o{number}", 0), wrongs(7)) for number in range(9)]
    assert judge(groups.by_recipe(alone)[0]).champion
    crowd = judge(groups.by_recipe([*alone, *others])[0])
    assert crowd.champion is None
    assert crowd.contrasts[0].p == pytest.approx(min(1, 10 * (crowd.contrasts[0].weakest or 0)))


def test_judge_runs_of_different_data_are_refused_or_shown_untested() -> None:
    trials = two_recipes(60)
    trials[0] = replace(trials[0], digest="e" * 64)
    with pytest.raises(
        DataError, match=r"2 different datasets or views \(e{12}: net-tanh-s0; d{12}: .*compare runs of one known"
    ):
        judge(groups.by_recipe(trials)[0])
    views = two_recipes(60)
    views[0] = replace(views[0], views="ten_crop")
    with pytest.raises(DataError, match=r"\(d{12} \(ten_crop\): net-tanh-s0; d{12}: "):
        judge(groups.by_recipe(views)[0])
    mixed = conclude("", trials, Config(mixed=True))
    assert mixed.verdict.champion is None
    assert mixed.verdict.contrasts[0].p is None
    assert mixed.verdict.sentence().startswith("Nothing can be said about a champion")
    assert mixed.pair is None


def test_judge_runs_of_unknown_data_are_refused_too() -> None:
    """That none of them says what it was evaluated on does not make it the same."""
    unknown = [replace(trial(name, recipe(name, 0), None), digest="") for name in "ab"]
    with pytest.raises(DataError, match=r"evaluated on unknown data \(unknown data: a and b\)"):
        judge(groups.by_recipe(unknown)[0])
    with pytest.raises(DataError, match=r"2 different datasets or views \(unknown data: a; d{12}: c\)"):
        judge(groups.by_recipe([unknown[0], trial("c", recipe("c", 0), [1])])[0])
    assert judge(groups.by_recipe(unknown)[0], mixed=True).comparable is False
    assert judge(groups.by_recipe(unknown[:1])[0]).sentence().startswith("Only a is here")


def test_judge_runs_without_predictions_cannot_tell_how_sure() -> None:
    found = judge(groups.by_recipe([trial("a", recipe("relu", 0), [1]), trial("b", recipe("tanh", 0), None)])[0])
    assert found.champion is None
    assert "predictions of single images were not logged" in found.sentence()


def test_judge_one_group_has_nothing_to_choose() -> None:
    found = judge(groups.by_recipe(two_recipes(60)[:3])[0])
    assert found.sentence() == "Only net-tanh is here (mean top-1 84.75 %): there is nothing to choose between."


def test_value_of_a_run_without_the_metric_is_one_clear_sentence() -> None:
    run = replace(trial("a", {}, None), metrics={})
    with pytest.raises(TrackingError, match=r"has neither predictions nor the metric final/val/top5"):
        run.value("top5")


def test_changes_are_ordered_by_the_score_of_the_error_and_need_the_same_images() -> None:
    found = changes(said([1, 2, 3]), said([3, 7, 9, 8]))
    assert (found.lost.tolist(), found.won.tolist()) == ([9, 8, 7], [2, 1])
    with pytest.raises(DataError, match="400 and 399 images that are not the same"):
        changes(said([1]), said([1], num=399))


# ---- table and page


class Checked(HTMLParser):
    """Collects what a page shows and points to, and fails on tags that are not closed."""

    VOID = ("meta", "img", "br", "rect", "line", "circle", "polyline")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for key, value in attrs if key in {"src", "href", "xlink:href", "action"}]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in {"style", "title"}:
            self.text += data + "\n"


def test_page_answers_first_and_needs_nothing_from_outside() -> None:
    cluster = {"relu": "2", "tanh": "[1, 4]"}
    trials = [
        replace(each, params={**each.params, "cluster.num_workers": cluster[each.params["recipe.model.activation"]]})
        for each in two_recipes(60)
    ]
    found = conclude("http://127.0.0.1:5000", trials, Config())
    page = found.html()
    checked = Checked(page)
    assert checked.text.strip().splitlines()[0].replace("\xa0", " ") == found.verdict.sentence()
    assert all(address.startswith("data:") for address in checked.addresses)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|<link", page)
    for expected in ("94.75", "recipe.model.activation", "tanh", "net-relu-s2", "From right to wrong: 0", "dog & co"):
        assert expected in checked.text, expected
    assert "recipe.seed" not in checked.text
    assert "cat <b>" in checked.text  # a class name is text, never markup
    for shown in ("2 CPU", "0.05", "[1, 4]"):  # two workers for 90 s; a range of workers costs what nobody knows
        assert shown in checked.text, shown
    for drawing in re.findall(r"<svg.*?</svg>", page):
        ET.fromstring(drawing)
    assert checked.tags.count("svg") == 3  # values, one curve that was logged, classes


def test_page_shows_the_changed_pictures_where_the_shards_are_reachable(stripes: shards.Shards) -> None:
    rows = shards.read(stripes.path / stripes.manifest.of("val")[0].name, [0, 1], ["image_id", "label"])
    labels, ids = rows.column("label").to_numpy(), rows.column("image_id").to_pylist()
    origin = Origin(
        split="val", dataset="stripes", dataset_digest="0" * 64, weights_sha256="w", classes=stripes.manifest.classes
    )

    def stripe_trial(name: str, wrong: list[int]) -> Trial:
        scores = np.eye(2, dtype=np.float32)[labels]
        scores[wrong] = scores[wrong][:, ::-1]
        predictions = Predictions.of(origin, ids, labels, scores)
        return replace(
            trial(name, recipe(name, 0), None), predictions=predictions, digest="0" * 64, source=str(stripes.path)
        )

    trials = [stripe_trial("early", [1, 2, 3, 4]), stripe_trial("late", [5, 4])]
    found = conclude("", trials, Config())
    assert found.pair
    checked = Checked(found.html())
    assert "From right to wrong: 1" in checked.text
    assert "From wrong to right: 3" in checked.text
    assert len(checked.addresses) == 4
    gone = conclude("", [replace(each, source="/gone") for each in trials], Config())
    assert Checked(gone.html()).addresses == []
    assert ids[5] in Checked(gone.html()).text
    limited = conclude("", trials, Config(max_pictures=2))
    assert "From wrong to right: 3, the first 2" in Checked(limited.html()).text


def test_table_has_the_answer_the_groups_the_tests_and_what_differs() -> None:
    text = conclude("", two_recipes(60), Config()).text()
    assert text.startswith("net-relu should be champion")
    assert re.search(r"net-relu +3 +0,1,2 +top1 +94.75 % +0.25 +100 +90", text)
    assert re.search(r"net-tanh +10.00 points +\+[\d.]+ to \+[\d.]+", text)
    assert re.search(r"recipe.model.activation +relu +tanh", text)
    assert max(map(len, text.splitlines())) < 140


def test_baseline_is_a_group_or_run_and_a_misspelt_one_is_named() -> None:
    trials = [*two_recipes(60), trial("net-elu", recipe("elu", 0), range(50))]
    assert [(pair := conclude("", trials, Config(baseline=name)).pair) and pair.earlier.name for name in (
        None, "net-tanh", "net-tanh-s1", "net-relu",
    )] == ["net-elu", "net-tanh", "net-tanh", "net-elu"]  # fmt: skip
    with pytest.raises(ConfigError, match="no group or run 'net-tan'; did you mean 'net-tanh'"):
        conclude("", trials, Config(baseline="net-tan"))


@pytest.mark.parametrize(
    ("low", "high", "about", "expected"),
    [
        (0, 1, 5, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (93.2, 95.1, 6, [93.5, 94, 94.5, 95]),
        (-3, 3, 6, [-3, -2, -1, 0, 1, 2, 3]),
    ],
)
def test_ticks_are_round_numbers_within_the_range(low: float, high: float, about: int, expected: list[float]) -> None:
    assert charts.ticks(low, high, about) == pytest.approx(expected)


def test_charts_of_equal_values_single_points_and_gaps_are_drawn() -> None:
    nan = float("nan")
    drawn = [
        charts.dots([charts.Row("a", (0.5, 0.5)), charts.Row("b & c", (0.5,))], "x"),
        charts.curves(
            [charts.Series("a", (((1, 0.5),),)), charts.Series("b", (((1, nan), (2, 1.0)), ((2, 3.0),)))], "y"
        ),
        charts.bars([charts.Bar("a", 0.0), charts.Bar("b", -1.0, "note")], "z"),
    ]
    for svg in drawn:
        ET.fromstring(svg)
        assert "nan" not in svg
    assert charts.curves([], "none") == charts.bars([], "none") == ""


# ---- the door


def test_words_on_the_command_line_name_what_is_compared() -> None:
    assert _as_keys(["mnist", "compare.metric=top5", "a@champion", "--dry-run"]) == [
        "compare.metric=top5",
        "--dry-run",
        'what=["mnist", "a@champion"]',
    ]
    assert _as_keys(["saved.yaml", "page=x.html"]) == ["saved.yaml", "page=x.html"]
