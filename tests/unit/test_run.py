"""What the doors share, as far as it needs neither Ray nor MLflow: the line of progress."""

from __future__ import annotations

import re

import pytest

from jobs import _run


def test_line_of_progress_tells_images_rate_rejects_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    report = _run.progress("images")
    report(40, 100, "3 rejects")  # an earlier run did these
    report(70, 100, "4 rejects")
    report(100, 100, "5 rejects")
    *_, line = capsys.readouterr().out.splitlines()  # the others only where a second has gone by
    assert re.fullmatch(r"images 100/100  \d+/s  5 rejects  about 0 s left", line)


def test_line_of_progress_without_more_to_say_or_a_rate_leaves_no_gap(capsys: pytest.CaptureFixture[str]) -> None:
    _run.progress("images")(7, 7)
    assert capsys.readouterr().out == "images 7/7  0/s  just begun\n"
