"""Ventral, the library: image recognition at scale on Ray. `jobs` and `serve` are its doors; see `README.md` here."""
