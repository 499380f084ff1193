"""Pages that come back: lent memory is not written to while anything holds it, and is used again afterwards."""

from __future__ import annotations

import gc
import multiprocessing
from multiprocessing.connection import Connection

import numpy as np
import torch

from pipeline.data.pages import Pages

FORK = multiprocessing.get_context("fork")


def test_a_page_is_free_again_when_nothing_holds_what_was_lent() -> None:
    pages = Pages(2, (3, 4))
    first, second = pages.take(), pages.take()
    assert {first, second} == {0, 1}
    assert pages.take() is None
    assert first is not None
    lent = pages.lend(first, 2)
    part, lent = lent[1:, ::2], torch.empty(0)  # a view of a view keeps it
    gc.collect()
    assert pages.take() is None
    assert part.shape == (1, 2)
    del part
    gc.collect()
    assert pages.take() == first


def test_lend_gives_the_memory_itself() -> None:
    pages = Pages(1, (3, 4))
    number = pages.take()
    assert number is not None
    pages.page(number)[:] = 7
    lent = pages.lend(number, 2)
    assert (lent.shape, lent.dtype) == ((2, 4), torch.uint8)
    pages.page(number)[1] = 9
    np.testing.assert_array_equal(lent.numpy(), [[7] * 4, [9] * 4])


def _fill(pages: Pages, orders: Connection) -> None:
    while (value := orders.recv()) is not None:
        number = pages.take()
        if number is not None:
            pages.page(number)[:] = value
        orders.send(number)


def test_another_process_fills_what_this_one_has_given_back() -> None:
    pages = Pages(2, (5,))
    here, there = FORK.Pipe()
    process = FORK.Process(target=_fill, args=(pages, there))
    process.start()
    held = []
    for value, expected in ((1, 0), (2, 1), (3, None)):
        here.send(value)
        number = here.recv()
        assert number == expected
        if number is not None:
            held.append(pages.lend(number, 5))
    assert [int(page[0]) for page in held] == [1, 2]
    del held[0]
    here.send(4)
    assert here.recv() == 0
    assert int(held[0][0]) == 2
    here.send(None)
    process.join(30)
    assert process.exitcode == 0
