"""One file per benchmarked plane."""
