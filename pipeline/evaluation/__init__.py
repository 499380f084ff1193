"""Metrics as mergeable counts, and the reports made of them."""
