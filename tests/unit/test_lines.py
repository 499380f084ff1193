"""What people are told while a training runs."""

from __future__ import annotations

import logging
import re

import pytest

from pipeline.training import lines
from pipeline.training.loop import Epoch, Progress

METRICS = {
    "train/loss": 1.25,
    "val/loss": 1.5,
    "val/top1": 0.625,
    "lr": 0.01,
    "images_per_s": 480.0,
    "data_wait_share": 0.031,
}


def test_an_epoch_is_one_line_with_speed_waits_memory_and_time_left() -> None:
    line = lines.of_epoch(Epoch(3, 10, METRICS, seconds=60.0, measuring_s=5.0))
    assert re.fullmatch(
        r"epoch 3/10  loss 1\.2500  val loss 1\.5000  val top-1 0\.6250  lr 0\.01  480 images/s  data wait 3%  "
        r"memory \d+\.\d GiB  about 455 s left",
        line,
    )


def test_within_an_epoch_a_line_tells_how_far_it_is() -> None:
    line = lines.of_progress(Progress(1, 2, 300, 1000, loss=2.0, images_per_s=100.0, data_wait_share=0.5))
    assert re.fullmatch(
        r"epoch 1/2  image 300/1000  loss 2\.0000  100 images/s  data wait 50%  memory \d+\.\d GiB  about 17 s left",
        line,
    )


def test_a_ticker_speaks_only_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    log, progress = logging.getLogger("ventral.test"), Progress(1, 2, 300, 1000, 2.0, 100.0, 0.5)
    with caplog.at_level("INFO", log.name):
        quiet, eager = lines.Ticker(log, every_s=1e9), lines.Ticker(log, every_s=0)
        for ticker in (quiet, eager, eager):
            ticker(progress)
    assert len(caplog.records) == 2
