"""Keys of an endpoint: `add` one and print its token, `list` them, `revoke` one. No restart is needed for a change."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from jobs._run import Job, run
from pipeline.errors import ConfigError
from pipeline.inference import keys
from pipeline.inference.keys import Scope


class Listing(Job):
    """Keys of a file; without one, of `keys.json` in the storage folder."""

    file: Path | None = None

    @property
    def path(self) -> Path:
        """The key file."""
        return self.file or self.store / "keys.json"


class Add(Listing):
    """A new key; see `pipeline.inference.keys.Key`."""

    name: str
    scopes: tuple[Scope, ...] = ("infer",)
    requests_per_s: float | None = None
    burst: int | None = None
    max_concurrent: int | None = None


class Revoke(Listing):
    """The key that is to open nothing any more."""

    id: str


def add(job: Add) -> None:
    """Mint a key, keep its hash, and print its token: nobody can print it again."""
    limits = job.model_dump(include={"requests_per_s", "burst", "max_concurrent"}, exclude_none=True)
    key, token = keys.mint(job.name, job.scopes, **limits)
    keys.change(job.path, lambda before: (*before, key))
    print(f"kept     {key}  in {job.path}")
    print(f"token    {token}")


def show(job: Listing) -> None:
    """Print a line for each key."""
    for key in keys.load(job.path).keys:
        print(key)


def revoke(job: Revoke) -> None:
    """Take a key out of the file."""
    known = {key.id: key for key in keys.load(job.path).keys}
    if job.id not in known:
        raise ConfigError(f"{job.path}: no key has the id '{job.id}'; known: {', '.join(known) or 'none'}")
    keys.change(job.path, lambda before: tuple(key for key in before if key.id != job.id))
    print(f"revoked  {known[job.id]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line: python -m jobs.keys add name=ci, list, or revoke id=..."""
    verb, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    verbs = {"add": partial(run, Add, add), "list": partial(run, Listing, show), "revoke": partial(run, Revoke, revoke)}
    if verb in verbs:
        return verbs[verb](rest)
    print(f"error: expected {', '.join(verbs)}, as in: python -m jobs.keys add name=ci", file=sys.stderr)
    return ConfigError.exit_code


if __name__ == "__main__":
    sys.exit(main())
