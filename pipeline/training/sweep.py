"""[Ray Tune] Runs the trials of a sweep; each is a training like any other, and a child of one MLflow run.

Tune decides which trial runs when and which one stops early. Of a training it sees what the run's journal says: a
trial's actor starts the training as a task, reads the watched metric of each epoch and hands it on. What became of a
trial is kept beside the sweep's own journal, so that a sweep that was stopped goes on with what is missing.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import ray
from ray import tune

from pipeline.config import flatten
from pipeline.errors import ConfigError, ModelError, TrackingError, VentralError, own_cause
from pipeline.inference import bundle
from pipeline.tracking import journal, runs, shipping
from pipeline.training import experiment, launch, stopping, trials
from pipeline.training.guard import DivergedError
from pipeline.training.outcomes import Outcome, Place, State, as_csv, best_of
from pipeline.training.trials import Trial

POLL_S = 0.5
STOP_S = 30.0  # for which a trial that is stopped early is waited for
OF_AN_ACTOR = {"cpu": 0, "memory": 1 << 20}  # it waits for its training; Tune places none that asks for nothing
TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # MLflow has the figures
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends this job as any other
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a training may fail before its first epoch ends
    "RAY_AIR_NEW_OUTPUT": "0",
}

log = logging.getLogger("ventral.training")


def run(
    place: Place, found: Sequence[Trial], base: experiment.Config, config: trials.Config, *, resume: bool = False
) -> dict[Trial, Outcome]:
    """Run all trials on an initialised Ray, and register the best where `base.register_as` says so.

    Args:
        place: where everything lies.
        found: the trials, from `trials.expand`.
        base: the training that they change.
        config: the sweep.
        resume: go on with an earlier sweep of this name: trials that finished or were stopped early stay as they are.

    Raises:
        ConfigError: there is an earlier sweep of this name that is not this one.
        ModelError: some trials failed; the others are kept.
    """
    _check_earlier(place, found, resume=resume)
    tracking = base.tracking.model_copy(update={"run_name": place.name})
    params = {f"sweep.{key}": value for key, value in flatten(config).items()}
    with runs.start(
        place.uri,
        tracking,
        params=params,
        tags={"sweep": place.name},
        folder=place.folder,
        resume_id=runs.known(place.folder) if resume else None,
    ) as parent:
        log.info("MLflow run %s", parent.url)
        _tune(place, found, config, parent.id)
        outcomes = {trial: place.outcome(trial) or _lost() for trial in found}
        parent.log_text("trials.csv", as_csv(outcomes, config))
        if failed := {trial.name: outcome for trial, outcome in outcomes.items() if outcome.state == "failed"}:
            name, outcome = next(iter(failed.items()))
            raise ModelError(
                f"{len(failed)} of {len(found)} trials failed: {name}: {outcome.error}; mend that and run again with "
                "resume=true, what has come to an end is kept"
            )
        if (best := best_of(outcomes, base)) is not None:
            _crown(parent, place, best, outcomes[best], base)
    return outcomes


def close_runs(place: Place, found: Sequence[Trial]) -> None:
    """Close the MLflow runs of trainings that ended without a word, as when the sweep was stopped."""
    for trial in found:
        folder = place.run(trial)
        if journal.origin(folder / journal.FOLDER) and not journal.has_ended(folder / journal.FOLDER):
            try:
                shipping.replay(folder, place.uri, STOP_S)
            except TrackingError as error:
                log.warning("the MLflow run of %s stays open: %s", trial.name, error)


class _Training(tune.Trainable):  # type: ignore[misc]  # Ray is untyped
    """The actor of one trial after another."""

    def setup(self, config: dict[str, Any], place: Place, found: tuple[Trial, ...], parent_id: str) -> None:
        """Start the first training."""
        self._place, self._found = place, found
        self._tags = {runs.PARENT_TAG: parent_id, "sweep": place.name}
        self._begin(config["trial"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start the next one: a new actor would have all of this to import again."""
        self.cleanup()
        self._begin(new_config["trial"])
        return True

    def _begin(self, name: str) -> None:
        self._trial = next(trial for trial in self._found if trial.name == name)
        self._num_told, self._has_ended = 0, False
        self._task = _train.remote(self._place, self._trial, self._tags)

    def step(self) -> dict[str, Any]:
        """Wait for the next epoch, or for the end."""
        while True:
            ended, _ = ray.wait([self._task], timeout=POLL_S)
            values = self._values()
            if ended:
                self._place.note(self._trial, self._ended(values))
                self._has_ended = True
                return {"done": True, "epoch": len(values), **self._metric(values)}
            # The last epoch is told with the end: ASHA must not stop what only has to be evaluated.
            if self._num_told < min(len(values), self._trial.training.recipe.epochs - 1):
                self._num_told += 1
                return {"epoch": self._num_told, **self._metric(values[: self._num_told])}

    def cleanup(self) -> None:
        """End a training that is stopped early."""
        if self._has_ended:
            return
        self._has_ended = True
        ray.cancel(self._task, force=True)
        ray.wait([self._task], timeout=STOP_S)
        folder, values = self._place.run(self._trial), self._values()
        if journal.origin(folder / journal.FOLDER):
            writer = journal.Writer(folder / journal.FOLDER, "sweep")
            writer.append(journal.Tags({"stopped": f"early by the sweep, after {len(values)} epochs"}))
            writer.close()
        close_runs(self._place, [self._trial])
        shutil.rmtree(folder / "ray", ignore_errors=True)
        self._place.note(self._trial, self._came_to("stopped", values))

    def _ended(self, values: list[float]) -> Outcome:
        try:
            ray.get(self._task)
        except ray.exceptions.RayError as error:
            cause = own_cause(error)
            if isinstance(cause, VentralError):
                text = str(cause)
            else:
                cause = getattr(error, "cause", None) or error
                text = f"{type(cause).__name__}: {cause}"
                log.error("trial %s failed", self._trial.name, exc_info=error)
            state: State = "diverged" if isinstance(cause, DivergedError) else "failed"
            return self._came_to(state, values, text.splitlines()[0])
        return self._came_to("finished", values)

    def _came_to(self, state: State, values: list[float], error: str = "") -> Outcome:
        recipe, run_id = self._trial.training.recipe, runs.known(self._place.run(self._trial))
        at = stopping.best_epoch(recipe.watch, values) if recipe.keep_best and values else -1
        return Outcome(
            state=state, epochs=len(values), value=values[at] if values else None, error=error, run_id=run_id
        )

    def _values(self) -> list[float]:
        curve = journal.curve(self._place.run(self._trial) / journal.FOLDER, self._trial.training.recipe.watch.metric)
        return [curve[epoch] for epoch in sorted(curve)]

    def _metric(self, values: list[float]) -> dict[str, float]:
        return {self._trial.training.recipe.watch.metric: values[-1]} if values else {}


# Outside the resources that Tune gives the actor, from which it could have no others.
@ray.remote(num_cpus=0, max_retries=0, scheduling_strategy="DEFAULT")  # type: ignore[untyped-decorator]
def _train(place: Place, trial: Trial, tags: dict[str, str]) -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s", force=True)
    is_begun = launch.where_begun(place.run(trial), trial.training.checkpoints) is not None
    config = trial.training.model_copy(update={"resume": is_begun, "register_as": None})
    experiment.conduct(trial.name, config, storage=place.storage, uri=place.uri, roots=place.roots, tags=tags)


class _Progress(tune.Callback):  # type: ignore[misc]  # Ray is untyped
    """A line for each trial that ends."""

    def __init__(self, num_trials: int, num_done: int, metric: str) -> None:
        self._total, self._done, self._metric = num_trials, num_done, metric

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tell of it."""
        self._done += 1
        result = trial.last_result or {}
        value = result.get(self._metric)
        figure = "no value" if value is None else f"{self._metric} {value:.4f}"
        log.info("trials %d/%d  %s: %s", self._done, self._total, trial.config["trial"], figure)


def _tune(place: Place, found: Sequence[Trial], config: trials.Config, parent_id: str) -> None:
    """Let Tune run the trials whose outcome is not known, or that failed."""
    left = [trial for trial in found if (known := place.outcome(trial)) is None or known.state == "failed"]
    if not left:
        return
    watch = found[0].training.recipe.watch
    os.environ.update({key: os.environ.get(key, value) for key, value in TUNE_SETTINGS.items()})
    trainable = tune.with_parameters(_Training, place=place, found=tuple(left), parent_id=parent_id)
    tuner = tune.Tuner(
        tune.with_resources(trainable, OF_AN_ACTOR),
        param_space={"trial": tune.grid_search([trial.name for trial in left])},
        tune_config=tune.TuneConfig(
            metric=watch.metric,
            mode=stopping.mode_of(watch),
            scheduler=_scheduler(left, config),
            max_concurrent_trials=config.concurrent,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(place.folder.absolute()),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # trainings have their own
            verbose=0,
            callbacks=[_Progress(len(found), len(found) - len(left), watch.metric)],
        ),
    )
    try:
        tuner.fit()
    finally:
        shutil.rmtree(place.folder / "tune", ignore_errors=True)  # Tune's own bookkeeping


def _scheduler(left: Sequence[Trial], config: trials.Config) -> tune.schedulers.TrialScheduler:
    if config.early_stopping is None:
        return tune.schedulers.FIFOScheduler()
    return tune.schedulers.ASHAScheduler(
        time_attr="epoch",
        max_t=max(trial.training.recipe.epochs for trial in left),
        grace_period=config.early_stopping.grace_epochs,
        reduction_factor=config.early_stopping.reduction_factor,
    )


def _check_earlier(place: Place, found: Sequence[Trial], *, resume: bool) -> None:
    """Refuse to continue by accident, and to continue another sweep; write down what this one is."""
    if not place.is_begun:
        if resume:
            raise ConfigError(f"{place.folder}: holds no sweep to resume; leave resume out to start anew")
        for trial in found:
            launch.check_folder(place.run(trial), trial.training.checkpoints, resume=False)
        place.begin(found)
    elif not resume:
        raise ConfigError(
            f"{place.folder}: holds an earlier sweep; choose another name, delete it and its runs, or set resume=true"
        )
    elif not place.is_of(found):
        raise ConfigError(f"{place.folder}: the sweep '{place.name}' was begun with other trials; choose another name")


def _crown(parent: runs.Run, place: Place, best: Trial, outcome: Outcome, base: experiment.Config) -> None:
    """Write down which trial is the best of all, and register it: only when none is left to be run again."""
    assert outcome.value is not None
    parent.set_tags({"best_trial": best.name, "best_run_id": outcome.run_id or ""})
    parent.log_metrics({f"best/{base.recipe.watch.metric}": outcome.value}, 0)
    if base.register_as is not None:
        made = runs.attach(place.uri, outcome.run_id or "")
        experiment.register(made, bundle.load(place.run(best) / "bundle"), base.register_as)


def _lost() -> Outcome:
    return Outcome(state="failed", epochs=0, value=None, error="its process died without a word; see Ray's log")
