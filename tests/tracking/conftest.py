from __future__ import annotations

import os
import socket

import pytest
import wandb

from tests.cli.test_cli import world  # noqa: F401 (a fixture)
from tests.support.tracked_runs import whole
from tests.support.wandb_server import Server


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    whole(folder)
    return folder


def dead_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(autouse=True)
def _nobody_is_logged_in(tmp_path, monkeypatch):
    """No test finds a key, reaches a server, or writes into the home of whoever runs it."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{dead_port()}")
    yield
    wandb.teardown()  # it keeps the settings and the keys that it finds first


@pytest.fixture
def server(monkeypatch):
    made = Server()
    monkeypatch.setenv("WANDB_BASE_URL", made.url)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    yield made
    made.close()
