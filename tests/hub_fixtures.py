"""The loopback Hub and a worker that uses it, one of each for all test modules that name this module as a plugin."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_client import Worker, client_environment, running_worker
from hub_server import WRITE_TOKEN, HubServer, running_hub


@pytest.fixture(scope="session")
def hub_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with running_hub(tmp_path_factory.mktemp("hub") / "server") as server:
        yield server


@pytest.fixture
def hub(hub_process: HubServer) -> Iterator[HubServer]:
    """The Hub, without faults and with an empty log. It keeps its repositories: each test names its own."""
    hub_process.reset()
    yield hub_process
    hub_process.reset()


@pytest.fixture(scope="session")
def worker(hub_process: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """Calls pull and push, each in a process of its own, logged in with a token that may write."""
    folder = tmp_path_factory.mktemp("client")
    environment = client_environment(
        hub_process.endpoint, folder / "home", WRITE_TOKEN, HF_HUB_DOWNLOAD_TIMEOUT="2", HF_HUB_ETAG_TIMEOUT="2"
    )
    with running_worker(environment, folder / "worker") as running:
        yield running


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A fresh HF_HOME."""
    return tmp_path / "home"
