"""From image collections to shards, and from shards to batches."""
