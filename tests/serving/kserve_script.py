"""What KServe's own client gets from an endpoint, as JSON: python kserve_script.py URL MODEL PIXELS.npy IMAGES...

Run by an interpreter that has `kserve` and nothing of this project; so it knows the address, a tensor and files only.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

TOP_K = 3


def pixels_as_json(path: str) -> InferInput:
    """FP32 [N, H, W, 3] of a NumPy file, as numbers inside the JSON."""
    pixels = np.load(path).astype(np.float32)
    tensor = InferInput("image", list(pixels.shape), "FP32")
    tensor.set_data_from_numpy(pixels, binary_data=False)
    return tensor


def files_behind_json(paths: list[str]) -> InferInput:
    """BYTES [N], as they are, in the protocol's binary extension."""
    tensor = InferInput("image", [len(paths)], "BYTES")
    tensor.set_data_from_numpy(np.array([Path(path).read_bytes() for path in paths], np.object_), binary_data=True)
    return tensor


async def refusal(client: InferenceRESTClient, url: str, model: str, image: InferInput) -> str:
    """What the client says of a model that is not there."""
    try:
        await client.infer(url, InferRequest(model, [image]), model_name=model)
    except httpx.HTTPStatusError as error:
        return str(error)
    return ""


async def ask(url: str, model: str, pixels: str, files: list[str]) -> dict[str, Any]:
    """Everything that the client can ask, each once; inference with answers in JSON and in binary."""
    found: dict[str, Any] = {"answers": []}
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        found["live"] = await client.is_server_live(url)
        found["ready"] = await client.is_server_ready(url)
        found["models_ready"] = {name: await client.is_model_ready(url, name) for name in (model, f"no-{model}")}
        found["refusal"] = await refusal(client, url, f"no-{model}", files_behind_json(files))
        for name, image in (("pixels", pixels_as_json(pixels)), ("files", files_behind_json(files))):
            for binary in (False, True):
                parameters = {"top_k": TOP_K, "binary_data_output": binary}
                request = InferRequest(model, [image], request_id=f"{name}-{binary}", parameters=parameters)
                headers: dict[str, str] = {}
                answer = await client.infer(url, request, model_name=model, response_headers=headers)
                outputs = {one.name: one.as_numpy().tolist() for one in answer.outputs}
                said = {"id": answer.id, "model": answer.model_name, "type": headers["content-type"]}
                found["answers"].append({"of": name, "binary": binary, **said, "outputs": outputs})
    return found


if __name__ == "__main__":
    address, served, tensor, *images = sys.argv[1:]
    json.dump(asyncio.run(ask(address, served, tensor, images)), sys.stdout)
