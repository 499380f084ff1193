"""[Ray] This project: `Loader.train`, which a Ray Train worker iterates in its own process.

`local` needs no Ray here, as in the worker. For `ray` this process is a driver connected to the head, whose CPUs all
decode: a driver takes blocks from the object store through the same code as the actor that a Train worker is, and no
CPU has to be set aside for an actor that would only wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil

from pipeline import imaging
from pipeline.benchmark.contender import Contender, Epoch, Setting, Stored
from pipeline.benchmark.photos import Photo
from pipeline.data import loading, shards

ROWS_PER_SHARD = 1024  # as ingest makes them
ROWS_PER_GROUP: dict[Stored, int] = {"jpeg": 128, "decoded": 8}  # the second as `rows.Config` advises


class Contestant(Contender):
    """Shards as ingest writes them; connecting to Ray and warming it up is part of starting, as importing is."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._loader: loading.Loader | None = None
        if setting.reader == "ray":
            import ray  # noqa: PLC0415  (the local reader needs none)

            ray.init(address=setting.ray_address, log_to_driver=False, logging_level="ERROR")
            ray.get(loading.warm_up(self._config()))

    def prepare(self, photos: Sequence[Photo]) -> None:
        """Shards and a manifest; every photo is stored as it is, or as its pixels."""
        write_shards(photos, self.setting.folder, self.setting.stored)

    def epoch(self, seed: int) -> Epoch:
        """The loader's epoch of this number."""
        if self._loader is None:
            setting = self.setting
            self._loader = loading.Loader(shards.load(setting.folder), setting.spec, self._config(), seed=setting.seed)
        for batch in self._loader.train(seed):
            yield batch.images, batch.labels

    def _config(self) -> loading.Config:
        setting = self.setting
        return loading.Config(batch_size=setting.batch_size, reader=setting.reader, num_tasks=setting.num_processes)

    def spilled_bytes(self) -> int:
        """As the object store counts it since the head started."""
        if self.setting.reader != "ray":
            return 0
        from ray._private import internal_api  # noqa: PLC0415  (Ray has no public way)

        state = internal_api.get_state_from_address(self.setting.ray_address)
        return int(internal_api.get_memory_info_reply(state).store_stats.spilled_bytes_total)

    def other_processes(self) -> list[int]:
        """Ray's own."""
        return ray_processes() if self.setting.reader == "ray" else []


def ray_processes() -> list[int]:
    """Ray's own processes on this machine: all that were started with the folder of this session."""
    import ray  # noqa: PLC0415

    session = Path(ray._private.worker.global_worker.node.get_session_dir_path()).name
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if any(session in word for word in process.info["cmdline"] or ())
    ]


def write_shards(photos: Sequence[Photo], folder: Path, stored: Stored = "jpeg") -> None:
    """Shards of the photos as they are or decoded, and their manifest; without Ray."""
    folder.mkdir(parents=True)
    made = []
    for number, start in enumerate(range(0, len(photos), ROWS_PER_SHARD)):
        with shards.Writer(folder / f"train-{number:05d}.parquet", "train", ROWS_PER_GROUP[stored]) as writer:
            for photo in photos[start : start + ROWS_PER_SHARD]:
                writer.add(_row(photo, stored))
        assert writer.shard is not None
        made.append(writer.shard)
    labels = [photo.label for photo in photos]
    num_classes = max(labels) + 1
    manifest = shards.Manifest(
        dataset="benchmark",
        classes=tuple(f"{label:03d}" for label in range(num_classes)),
        class_counts={"train": tuple(labels.count(label) for label in range(num_classes))},
        num_rejects=0,
        shards=tuple(made),
        digest="0" * 64,
        decoding=imaging.Decoding(formats=("JPEG", "NPY")),
        config={},
        tool_versions={},
    )
    (folder / shards.MANIFEST).write_text(manifest.model_dump_json())


def _row(photo: Photo, stored: Stored) -> dict[str, object]:
    height, width = imaging.probe(photo.data)
    image = photo.data if stored == "jpeg" else imaging.encode_npy(imaging.decode(photo.data))
    return {
        "image_id": photo.image_id,
        "image": image,
        "label": photo.label,
        "height": height,
        "width": width,
        "original_height": height,
        "original_width": width,
        "original_bytes": len(photo.data),
        "sha256": "",
    }
