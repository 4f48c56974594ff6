"""Three tiny stores, one of them public, and the service in front of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from logitstore_server.keys import create_key
from logitstore_server.settings import ServerSettings, StoreEntry
from tests.data_stores import make_store, random_samples


@pytest.fixture(scope="session")
def entries(tmp_path_factory: pytest.TempPathFactory) -> tuple[StoreEntry, ...]:
    """Stores `alpha` and `beta`, which need a key, and `open`, which needs none."""
    folder = tmp_path_factory.mktemp("stores")
    for seed, name in enumerate(["alpha", "beta", "open"]):
        make_store(folder / name, random_samples(8, seed=seed), shards=2).close()
    return tuple(
        StoreEntry(name=name, location=str(folder / name), public=name == "open")
        for name in ["alpha", "beta", "open"]
    )


class Keys:
    """A file of keys and the texts of those in it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.alpha = self.add("alpha")
        self.all = self.add("*")
        self.metrics = self.add(metrics=True)

    def add(self, *stores: str, metrics: bool = False) -> str:
        return create_key(self.file, label="test", stores=stores, metrics=metrics, expires=None)[0]


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys.json")


@pytest.fixture
def settings(entries: tuple[StoreEntry, ...], keys: Keys) -> ServerSettings:
    return ServerSettings(stores=entries, keys_file=keys.file)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}
