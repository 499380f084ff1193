"""Ray Serve: registered models as HTTP endpoints."""
