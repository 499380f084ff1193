"""Random streams: one for each draw, whatever was drawn before."""

from __future__ import annotations

import numpy as np

from pipeline.data.streams import Streams


def test_a_stream_does_not_depend_on_what_was_drawn_before() -> None:
    streams = Streams(seed=3, epoch=1)
    first = streams.of(7).integers(0, 256, 5, np.uint8).tolist(), streams.of(8).random(4).tolist()
    streams.of(9).random(1000)
    again = Streams(seed=3, epoch=1)
    assert again.of(8).random(4).tolist() == first[1]
    assert streams.of(7).integers(0, 256, 5, np.uint8).tolist() == first[0]


def test_streams_of_other_draws_epochs_and_seeds_differ() -> None:
    places = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 2**40)]
    values = [Streams(seed, epoch).of(draw).random() for seed, epoch, draw in places]
    assert len(set(values)) == len(places)


def test_streams_of_consecutive_draws_are_uniform_and_unrelated() -> None:
    streams = Streams(seed=0, epoch=0)
    values = np.array([streams.of(draw).random(2) for draw in range(20_000)])
    np.testing.assert_allclose(values.mean(axis=0), 0.5, atol=0.01)
    np.testing.assert_allclose(np.histogram(values[:, 0], 10, (0, 1))[0], 2000, atol=200)
    related = np.corrcoef(np.column_stack([values[:-1], values[1:]]).T) - np.eye(4)
    assert np.abs(related).max() < 0.03
