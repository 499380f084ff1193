"""LitServe: one worker process that decodes and computes batches of up to 16, fed through queues by uvicorn."""

from pathlib import Path
from typing import Annotated, Any

import litserve as ls
from fastapi import Body

from pipeline.benchmark.servers import classifier

Jpeg = Annotated[bytes, Body(media_type="image/jpeg")]


class Api(ls.LitAPI):  # type: ignore[misc]  # untyped
    """The four steps as its documentation lays them out."""

    def __init__(self, form: classifier.Form, folder: Path) -> None:
        super().__init__(max_batch_size=16, batch_timeout=0.01)
        self.form, self.folder = form, folder

    def setup(self, device: str) -> None:
        """Load the model, in the worker."""
        self.model = classifier.build(self.form, self.folder)

    def decode_request(self, request: Jpeg) -> Any:
        """One JPEG."""
        return self.model.decode(request)

    def batch(self, inputs: list[Any]) -> list[Any]:
        """They are stacked with the forward pass."""
        return inputs

    def predict(self, inputs: list[Any]) -> list[classifier.Answer]:
        """A batch."""
        return self.model.classify(inputs)

    def unbatch(self, output: list[classifier.Answer]) -> list[classifier.Answer]:
        """They are apart already."""
        return output

    def encode_response(self, output: classifier.Answer) -> classifier.Answer:
        """As it is."""
        return output


def main() -> None:
    """Run from the command line: python -m pipeline.benchmark.servers.litserve --form given --folder F --port P."""
    args = classifier.arguments()
    server = ls.LitServer(Api(args.form, args.folder), accelerator="cpu")
    server.run(host=args.host, port=args.port, generate_client_file=False)


if __name__ == "__main__":
    main()
