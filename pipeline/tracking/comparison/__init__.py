"""Comparison of runs: which is better, by how much, how sure we are, and what it costs."""
