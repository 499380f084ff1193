"""Plain FastAPI: a function for each request, in its thread pool, on uvicorn; no batches."""

from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import Body, FastAPI

from pipeline.benchmark.servers import classifier


def application(form: classifier.Form, folder: Path) -> FastAPI:
    """The application with its model."""
    app, model = FastAPI(), classifier.build(form, folder)

    @app.get("/health")
    def health() -> str:
        return "ok"

    @app.post("/predict")
    def predict(image: Annotated[bytes, Body(media_type="image/jpeg")]) -> dict[str, Any]:
        return model.answer(image)

    return app


def main() -> None:
    """Run from the command line: python -m pipeline.benchmark.servers.fastapi --form documented --folder F --port P."""
    args = classifier.arguments()
    uvicorn.run(application(args.form, args.folder), host=args.host, port=args.port)


if __name__ == "__main__":
    main()
