"""The only place where preprocessing is decided: one file per task."""
