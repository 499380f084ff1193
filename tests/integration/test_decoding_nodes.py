"""Where Ray decodes: on the nodes whose labels a run asks for, on any node where there are none."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path, PosixPath

import pytest
import torch

from pipeline.batch import Batch
from pipeline.data import shards
from pipeline.data.loading import Config, Loader
from pipeline.types import InputSpec
from tests import local_nodes

SPEC = InputSpec(size_hw=(28, 28))
RAY = Config(batch_size=4, reader="ray", num_tasks=3, batches_per_read=1)
TIMEOUT_S = 180


class Watched(PosixPath):
    """A folder that notes by which node something in it is asked for, in a folder of notes beside it."""

    def __truediv__(self, name: str | os.PathLike[str]) -> Watched:
        import ray  # noqa: PLC0415

        (Path(str(self)).with_name("notes") / ray.get_runtime_context().get_node_id()).touch()
        return super().__truediv__(name)

    def take_notes(self) -> set[str]:
        """The nodes since the last time."""
        notes = list(Path(str(self)).with_name("notes").iterdir())
        for note in notes:
            note.unlink()
        return {note.name for note in notes}


def train(folder: Path, config: Config) -> list[Batch]:
    return list(Loader(shards.Shards(folder, shards.load(Path(str(folder))).manifest), SPEC, config, seed=2).train(1))


def check_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right) == 10
    for mine, theirs in zip(left, right, strict=True):
        assert (mine.ids, mine.frames) == (theirs.ids, theirs.frames)
        assert torch.equal(mine.images, theirs.images)
        assert torch.equal(mine.labels, theirs.labels)


def decode_here_and_there(path: Path) -> None:
    """First on a head alone, then beside a node for ingest."""
    import ray  # noqa: PLC0415

    folder = Watched(path)
    with local_nodes.cluster(num_cpus=1) as cluster:
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # no worker could import a test
        expected = train(folder, RAY.model_copy(update={"reader": "local", "num_tasks": 0}))
        folder.take_notes()
        (head,) = nodes()
        check_same(train(folder, RAY.model_copy(update={"num_tasks": 1})), expected)
        assert folder.take_notes() == {head}
        cluster.add_node(num_cpus=2, labels={"role": "ingest"})
        (second,) = nodes() - {head}
        check_same(train(folder, RAY), expected)
        assert folder.take_notes() == {second}
        check_same(train(folder, RAY.model_copy(update={"decode_on": {"role": "none"}})), expected)
        assert head in folder.take_notes()  # so it was the labels that kept it free


def nodes() -> set[str]:
    import ray  # noqa: PLC0415

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


@pytest.mark.slow
def test_decoding_moves_to_the_node_for_it_and_stays_anywhere_without(stripes: shards.Shards, tmp_path: Path) -> None:
    path = Path(shutil.copytree(stripes.path, tmp_path / "shards"))
    (tmp_path / "notes").mkdir()
    local_nodes.alone(decode_here_and_there, path, timeout_s=TIMEOUT_S)
