"""Three artefacts, and hubs of every kind to put them into."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from huggingface_hub import HfApi, constants
from tests.hub.hugging_face import serving
from torch import nn

from deltatune import api
from deltatune.core.artefact import save
from deltatune.hub import Hub
from deltatune.testing.case import move
from deltatune.testing.families import FAMILIES

FACTS = {"task": "trec", "test": {"accuracy": 0.9, "note": "x", "nan": None}, "backbone": "tiny"}


@pytest.fixture(scope="session")
def model() -> nn.Module:
    return FAMILIES["bert"].build()


@pytest.fixture(scope="session")
def folders(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two LoRAs and an adapter."""
    root, made = tmp_path_factory.mktemp("deltas"), []
    for seed, method in enumerate(("lora(rank=2)", "lora(rank=2)", "adapter(bottleneck=2)")):
        delta = api.attach(model, method)
        move(delta, seed)
        made.append(save(delta, root / str(seed), facts=FACTS))
        delta.detach()
    return made


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """Address of an S3 of this machine."""
    pytest.importorskip("s3fs", reason="s3fs, of the extra `s3`, is not installed")
    server = pytest.importorskip("moto.server", reason="moto is not installed")
    made = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    made.start()
    try:
        yield "http://{}:{}".format(*made.get_host_and_port())
    finally:
        made.stop()


@pytest.fixture(params=["folder", "memory"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Hub]:
    """Hubs of files that a test may look into."""
    url = str(tmp_path / "hub") if request.param == "folder" else "memory://hub"
    yield Hub(url, store=tmp_path / "store")
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(params=["folder", "memory", "s3", "image", "hugging face"])
def hub(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    """Hubs of all kinds."""
    store = tmp_path / "store"
    if request.param == "hugging face":
        with serving() as (address, _):
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
            api = functools.partial(HfApi, endpoint=address)
            monkeypatch.setattr("deltatune.hub.hugging_face.HfApi", api)
            monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
            yield Hub("hf://team", store=store)
    elif request.param == "s3":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("s3"))
        fsspec.filesystem("s3").mkdir("bucket")
        yield Hub("s3://bucket/deltas", store=store)
        fsspec.filesystem("s3").rm("bucket", recursive=True)
        fsspec.filesystem("s3").clear_instance_cache()
    else:
        places = {"folder": tmp_path / "hub", "memory": "memory://hub", "image": "oci:"}
        place = places[request.param]
        yield Hub(f"oci:{tmp_path / 'image'}" if place == "oci:" else place, store=store)
        fsspec.filesystem("memory").store.clear()
