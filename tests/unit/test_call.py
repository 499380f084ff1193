"""`jobs.call` over a real socket: which images go together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import call
from tests.asgi import Client, on_socket, ranked

MIB = 2**20


@pytest.fixture(scope="module")
def asked() -> Client:
    """Answers about whatever comes; takes what an endpoint takes by default."""
    return Client(ranked(1))


@pytest.fixture(scope="module")
def url(asked: Client) -> Iterator[str]:
    with on_socket(asked.app) as url:
        yield url


@pytest.mark.parametrize(
    ("sizes", "most", "together"),
    [
        ([3 * MIB] * 5, 16, [2, 2, 1]),  # photos of a phone: 8 MiB at most
        ([4 * MIB, 4 * MIB, 1, 9 * MIB, 1], 16, [2, 1, 1, 1]),  # one that is larger goes alone
        ([1] * 5, 2, [2, 2, 1]),
        ([1], 16, [1]),
    ],
)
def test_images_go_together_as_far_as_their_bytes_and_their_number_allow(
    url: str,
    asked: Client,
    sizes: list[int],
    most: int,
    together: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked.models.asked.clear()
    names = [f"{number}.jpg" for number in range(len(sizes))]
    for number, (name, size) in enumerate(zip(names, sizes, strict=True)):
        (tmp_path / name).write_bytes(bytes([number + 1]) * size)
    argv = [f"url={url}", "model=digits", f"images=[{', '.join(names)}]", f"data_root={tmp_path}"]
    assert call.main([*argv, f"images_per_request={most}"]) == 0
    sent = [images for _, images, _ in asked.models.asked]
    assert [len(images) for images in sent] == together
    assert [(image[0] - 1, len(image)) for images in sent for image in images] == list(enumerate(sizes))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == names
