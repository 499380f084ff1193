"""MLflow: runs, the registry, and the code that MLflow itself loads to serve a bundle."""
