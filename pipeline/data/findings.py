"""What a verification looks for and what it found: kinds of findings, how grave each is, a table and a JSON file."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field

from pipeline.config import Strict

Severity = Literal["error", "warning"]
KINDS: dict[str, Severity] = {
    "shard_missing": "error",
    "shard_checksum": "error",
    "shard_unreadable": "error",
    "shard_columns": "error",
    "shard_rows": "error",
    "rejects": "error",
    "class_list": "error",
    "class_counts": "error",
    "object_counts": "error",
    "label": "error",
    "undecodable": "error",
    "size": "error",
    "sha256": "error",
    "boxes": "error",
    "objects": "error",
    "mask": "error",
    "image_id": "error",
    "duplicate_across_splits": "error",
    "duplicate": "warning",
    "near_duplicate_across_splits": "warning",
    "near_duplicate": "warning",
    "stray_file": "warning",
}
"""Every kind of finding, in the order of the table, and how grave it is."""


class Config(Strict):
    """What is looked for, and how much of it is shown.

    Attributes:
        max_distance: bits of 64 in which the hashes of near-duplicates may differ; None looks for none.
        num_examples: findings of each kind that are kept with their text; all are counted.
        strict: warnings count as errors.
    """

    max_distance: int | None = Field(default=4, ge=0, le=8)
    num_examples: int = Field(default=5, ge=0)
    strict: bool = False


class Finding(Strict):
    """One thing that is wrong.

    Attributes:
        kind: one of `KINDS`.
        shard: file name; empty where it concerns the whole dataset.
        image_id: empty where it concerns the whole file.
    """

    kind: str
    shard: str
    image_id: str
    message: str


class Report(Strict):
    """What a verification found.

    Attributes:
        num_images: rows that were read, sound or not.
        counts: findings of each kind, kinds without any left out.
        examples: the first ones of each kind, in the order of the shards.
        config: what was looked for.
    """

    dataset: str
    digest: str
    num_shards: int
    num_images: int
    counts: dict[str, int]
    examples: tuple[Finding, ...]
    config: Config

    def severity(self, kind: str) -> Severity:
        """How grave a kind of finding is, under this configuration."""
        return "error" if self.config.strict else KINDS[kind]

    def total(self, severity: Severity) -> int:
        """The number of findings of one severity."""
        return sum(count for kind, count in self.counts.items() if self.severity(kind) == severity)

    def table(self) -> str:
        """For people: a line for each kind with its severity and count, its examples indented below."""
        lines = []
        for kind in (kind for kind in KINDS if kind in self.counts):
            lines.append(f"{self.severity(kind):8} {kind:30} {self.counts[kind]:>8}")
            for found in (found for found in self.examples if found.kind == kind):
                where = ": ".join(part for part in (found.shard, found.image_id) if part)
                lines.append(f"           {where + ': ' if where else ''}{found.message}")
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.model_dump_json(indent=2) + "\n")


@dataclass(slots=True)
class Findings:
    """A tally of findings, of which the first `limit` of each kind are kept."""

    limit: int
    counts: Counter[str] = field(default_factory=Counter)
    examples: list[Finding] = field(default_factory=list)

    def add(self, kind: str, message: str, *, shard: str = "", image_id: str = "") -> None:
        """Count one, and keep it while there is room."""
        self.counts[kind] += 1
        if self.counts[kind] <= self.limit:
            self.examples.append(Finding(kind=kind, shard=shard, image_id=image_id, message=message))

    def merge(self, other: Findings) -> None:
        """Count those of another tally too."""
        for found in other.examples:
            if sum(mine.kind == found.kind for mine in self.examples) < self.limit:
                self.examples.append(found)
        self.counts += other.counts
