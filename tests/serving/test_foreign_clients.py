"""Clients over real HTTP (proxy, ingress, model): those of the Open Inference Protocol, unmodified, and our own."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import requests
from open_inference.openapi.client import InferenceRequest, OpenInferenceClient
from open_inference.openapi.core.api_error import ApiError
from open_inference.openapi.errors import BadRequestError
from PIL import Image
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException

from jobs import call
from jobs._deploy import deploy
from jobs._process import Service
from pipeline.inference.bundle import Bundle
from pipeline.inference.client import AsyncClient, Ranked
from pipeline.inference.predictor import Predictor
from pipeline.types import Classification

NUM_CLASSES = 10


@pytest.fixture(scope="module")
def url(ray_head: Service, app_config: Callable[..., dict[str, Any]]) -> str:
    return deploy(ray_head, app_config({"max_images": 8}))


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(url.removeprefix("http://")) as client:
        yield client


@pytest.fixture(scope="module")
def offline(tiny: Bundle) -> Predictor:
    return Predictor(tiny)


def probabilities(offline: Predictor, images: list[bytes]) -> Any:
    """[N, C] of the predictor itself."""
    found = np.zeros((len(images), NUM_CLASSES), np.float32)
    for row, answer in enumerate(offline.predict(images)):
        assert isinstance(answer, Classification)
        found[row, answer.labels] = answer.scores
    return found


def encoded(images: list[bytes]) -> triton.InferInput:
    tensor = triton.InferInput("image", [len(images)], "BYTES")
    tensor.set_data_from_numpy(np.array(images, np.object_))
    return tensor


def test_triton_client_finds_server_and_model(client: triton.InferenceServerClient, tiny: Bundle) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert not client.is_model_ready("tinny")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    version = tiny.card.weights_sha256[:12]
    found = client.get_model_metadata("tiny", version)
    assert (found["name"], found["versions"]) == ("tiny", [version])
    assert found["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    assert [one["name"] for one in found["outputs"]][:2] == ["probabilities", "top_k_indices"]
    index = [{"name": "tiny", "version": version, "state": "READY", "reason": ""}]
    assert client.get_model_repository_index() == index


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_triton_client_gets_the_predictors_probabilities_of_encoded_images(
    client: triton.InferenceServerClient, offline: Predictor, picture: Any, count: int, compression: str | None
) -> None:
    images = [picture(seed, encoding="PNG" if seed % 2 else "JPEG") for seed in range(count)]
    answer = client.infer(
        "tiny", [encoded(images)], request_id="r-1", request_compression_algorithm=compression, parameters={"top_k": 3}
    )
    expected = probabilities(offline, images)
    np.testing.assert_allclose(answer.as_numpy("probabilities"), expected, atol=1e-5)
    best = np.argsort(-expected, axis=1)[:, :3]
    np.testing.assert_array_equal(answer.as_numpy("top_k_indices"), best)
    np.testing.assert_allclose(answer.as_numpy("top_k_scores"), np.take_along_axis(expected, best, axis=1), atol=1e-5)
    named = [[f"class {label}".encode() for label in row] for row in best]
    assert answer.as_numpy("top_k_labels").tolist() == named
    said = answer.get_response()
    assert (said["model_name"], said["id"]) == ("tiny", "r-1")


@pytest.mark.parametrize("binary", [True, False])
def test_triton_client_gets_what_it_asks_for_of_pixels(
    client: triton.InferenceServerClient, offline: Predictor, picture: Any, binary: bool
) -> None:
    image = picture(3, encoding="PNG")
    pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))[None]
    tensor = triton.InferInput("image", pixels.shape, "UINT8")
    tensor.set_data_from_numpy(pixels, binary_data=binary)
    wanted = [
        triton.InferRequestedOutput("top_k_labels", binary_data=binary),
        triton.InferRequestedOutput("probabilities", binary_data=not binary),
    ]
    answer = client.infer("tiny", [tensor], outputs=wanted)
    expected = probabilities(offline, [image])
    np.testing.assert_allclose(answer.as_numpy("probabilities"), expected, atol=1e-5)
    assert answer.as_numpy("top_k_indices") is None
    assert answer.as_numpy("top_k_labels").shape == (1, 5)


def test_triton_client_gets_the_best_classes_as_texts(
    client: triton.InferenceServerClient, offline: Predictor, picture: Any
) -> None:
    images = [picture(seed) for seed in range(2)]
    wanted = [triton.InferRequestedOutput("probabilities", class_count=2)]
    found = client.infer("tiny", [encoded(images)], outputs=wanted).as_numpy("probabilities")
    assert found.shape == (2, 2)
    for row, expected in zip(found, probabilities(offline, images), strict=True):
        score, label, name = row[0].decode().split(":")
        assert int(label) == expected.argmax()
        assert float(score) == pytest.approx(expected.max(), abs=1e-4)
        assert name == f"class {label}"


def test_triton_client_counts_what_was_answered(client: triton.InferenceServerClient, picture: Any) -> None:
    def success() -> tuple[int, int]:
        (found,) = client.get_inference_statistics("tiny")["model_stats"]
        return found["inference_count"], found["inference_stats"]["success"]["count"]

    before = success()
    client.infer("tiny", [encoded([picture(0), picture(1)])])
    after = success()
    assert (after[0] - before[0], after[1] - before[1]) == (2, 1)


@pytest.mark.parametrize(
    ("ask", "status", "words"),
    [
        (lambda client, image: client.infer("tinny", [encoded([image])]), "404", "did you mean 'tiny'"),
        (lambda client, image: client.infer("tiny", [encoded([image])], "7"), "404", "version 7 is not served"),
        (lambda client, image: client.infer("tiny", [encoded([image, b"GIF89a"])]), "415", "images.1"),
        (lambda client, image: client.infer("tiny", [encoded([image] * 9)]), "413", "at most 8 images"),
        (
            lambda client, image: client.infer("tiny", [encoded([image])], outputs=[triton.InferRequestedOutput("x")]),
            "400",
            "expected each once of probabilities",
        ),
        (lambda client, image: client.infer("tiny", [encoded([image])], parameters={"top_k": 0}), "400", "top_k"),
        (lambda client, image: client.infer("tiny", [encoded([image])], sequence_id=3), "400", "have no state"),
    ],
)
def test_triton_client_is_told_what_is_wrong(
    client: triton.InferenceServerClient, picture: Any, ask: Any, status: str, words: str
) -> None:
    with pytest.raises(InferenceServerException, match=words) as caught:
        ask(client, picture(0))
    assert caught.value.status() == status


def test_body_that_is_an_image_alone_is_answered_binary(url: str, offline: Predictor, picture: Any) -> None:
    image = picture(4)
    headers = {"Inference-Header-Content-Length": "0"}
    answer = requests.post(f"{url}/v2/models/tiny/infer", data=image, headers=headers, timeout=30)
    assert answer.headers["content-type"] == "application/octet-stream"
    found = triton.InferenceServerClient.parse_response_body(
        answer.content, header_length=int(answer.headers["Inference-Header-Content-Length"])
    )
    np.testing.assert_allclose(found.as_numpy("probabilities"), probabilities(offline, [image]), atol=1e-5)


def test_client_made_of_the_protocols_own_description_is_answered(url: str, offline: Predictor, picture: Any) -> None:
    client = OpenInferenceClient(base_url=url)
    client.check_server_liveness()
    client.check_server_readiness()
    client.check_model_readiness("tiny")
    assert client.read_server_metadata().name == "ventral"
    assert client.read_model_metadata("tiny").inputs[0].datatype == "BYTES"
    images = [picture(seed) for seed in range(3)]
    texts = [base64.b64encode(data).decode() for data in images]
    image = {"name": "image", "shape": [3], "datatype": "BYTES", "data": texts}
    answer = client.model_infer("tiny", request=InferenceRequest(id="9", inputs=[image]))
    assert (answer.model_name, answer.id) == ("tiny", "9")
    found = {one.name: one for one in answer.outputs}["probabilities"]
    expected = probabilities(offline, images)
    np.testing.assert_allclose(np.reshape(found.data.__root__, found.shape), expected, atol=1e-5)
    with pytest.raises(ApiError, match="did you mean 'tiny'"):
        client.read_model_metadata("tinny")
    with pytest.raises(BadRequestError):
        client.model_infer("tiny", request=InferenceRequest(inputs=[image | {"shape": [4]}]))


def test_job_prints_the_classes_of_files(
    url: str, offline: Predictor, picture: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["a.jpg", "b.jpg", "c.jpg"]
    for seed, name in enumerate(names):
        (tmp_path / name).write_bytes(picture(seed))
    argv = [f"url={url}", "model=tiny", f"images=[{', '.join(names)}]", f"data_root={tmp_path}", "top_k=2"]
    assert call.main([*argv, "images_per_request=2"]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == [name for name in names for _ in range(2)]
    for row, expected in enumerate(probabilities(offline, [picture(seed) for seed in range(3)])):
        assert lines[2 * row][2] == f"class {expected.argmax()}"
        assert float(lines[2 * row][1]) == pytest.approx(expected.max(), abs=1e-4)
    assert call.main([*argv, "model=tinny"]) != 0
    assert "did you mean 'tiny'" in capsys.readouterr().err
    assert call.main([*argv, "images=[z.jpg]"]) != 0
    assert "z.jpg: cannot be read" in capsys.readouterr().err


def test_asyncio_client_asks_many_things_at_once(url: str, offline: Predictor, picture: Any) -> None:
    images = [picture(seed) for seed in range(12)]

    async def ask() -> list[Ranked]:
        async with AsyncClient(url) as client:
            return await asyncio.gather(*(client.predict("tiny", image, top_k=1) for image in images))

    best = [found.labels[0] for found in asyncio.run(ask())]
    assert best == probabilities(offline, images).argmax(axis=1).tolist()


def test_what_the_proxy_refuses_in_its_own_words_is_an_error_to_foreign_clients(url: str, picture: Any) -> None:
    """A head of 100 kB: HAProxy's 400, `text/html`."""
    too_long = {"x-long": "a" * 100_000}
    with triton.InferenceServerClient(url.removeprefix("http://")) as client:
        with pytest.raises(InferenceServerException) as refused:
            client.infer("tiny", [encoded([picture()])], headers=dict(too_long))  # it adds to them
        assert refused.value.status() == "400"
        assert client.infer("tiny", [encoded([picture()])]).as_numpy("probabilities").shape == (1, NUM_CLASSES)
    with httpx.Client(headers=too_long) as bare:
        openapi = OpenInferenceClient(base_url=url, httpx_client=bare)
        with pytest.raises(json.JSONDecodeError):  # it reads every 400 as JSON
            openapi.read_model_metadata("tiny")


class Dead(BaseHTTPRequestHandler):
    """Answers as HAProxy does in the endpoint's place (`jobs/_haproxy.py`)."""

    status = 503

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def do_GET(self) -> None:
        body = b'{"error": "The endpoint is not there; try again.", "code": "proxy", "request_id": "r1"}'
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""


@pytest.mark.parametrize("status", [408, 500, 503])
def test_an_endpoint_that_the_proxy_speaks_for_is_an_error_to_foreign_clients(
    picture: Any, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Dead, "status", status)
    with ThreadingHTTPServer(("127.0.0.1", 0), Dead) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            with triton.InferenceServerClient(f"127.0.0.1:{server.server_port}") as client:
                assert not client.is_server_ready()
                with pytest.raises(InferenceServerException) as failed:
                    client.infer("tiny", [encoded([picture()])])
                assert failed.value.status() == str(status)
            with pytest.raises(ApiError) as failed_too:
                OpenInferenceClient(base_url=f"http://127.0.0.1:{server.server_port}").read_model_metadata("tiny")
            assert failed_too.value.status_code == status
        finally:
            server.shutdown()
