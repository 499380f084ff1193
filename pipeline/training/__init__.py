"""One training loop for every model; Ray Train around it."""
