"""Every page's address, in one place. A page's data is at the same address with `.json` added."""

from __future__ import annotations

from urllib.parse import quote, urlencode

__all__ = ["Links"]


class Links:
    """Builds addresses below the path where the viewer is mounted.

    Args:
        root: that path, without a final slash.
    """

    # Whether a server answers: searches, further ids, checks.
    live = True

    def __init__(self, root: str = "") -> None:
        self.root = root.rstrip("/")

    def home(self) -> str:
        """The list of stores."""
        return f"{self.root}/"

    def static(self, name: str) -> str:
        """A file of the viewer's own."""
        return f"{self.root}/static/{name}"

    def login(self) -> str:
        """Where a key is exchanged for a session."""
        return f"{self.root}/login"

    def logout(self) -> str:
        """Where a session ends."""
        return f"{self.root}/logout"

    def store(self, name: str, **query: object) -> str:
        """A store's overview."""
        return self._at("stores", name, "overview", **query)

    def shard(self, name: str, shard: str, **query: object) -> str:
        """One shard."""
        return self._at("stores", name, "shards", shard, **query)

    def sample(self, name: str, sample: int, **query: object) -> str:
        """One sample."""
        return self._at("stores", name, "samples", sample, **query)

    def tokens(self, name: str, sample: int) -> str:
        """A sample's text in pieces; for the script, which fills in the {names}."""
        return self.sample(name, sample) + "/tokens.json?from={from}&count={count}"

    def kept(self, name: str, sample: int) -> str:
        """What positions of a sample keep; for the script, which fills in the {names}."""
        return self.sample(name, sample) + "/kept.json?from={from}&count={count}&top={top}"

    def compared_tokens(self, sample: int, **query: object) -> str:
        """A sample's text with measures of two stores' disagreement, in pieces."""
        address = self._at("compare", "samples", sample, "tokens.json", **query)
        return address + "&from={from}&count={count}"

    def picture(self, name: str, sample: int, **query: object) -> str:
        """The picture of one sample."""
        return self._at("stores", name, "samples", sample, "image.png", **query)

    def find(self, name: str, **query: object) -> str:
        """A search in one store."""
        return self._at("stores", name, "find", **query)

    def compare(self, **query: object) -> str:
        """Two stores over the same corpus."""
        return self._at("compare", **query)

    def compare_sample(self, sample: int, **query: object) -> str:
        """One sample of two stores."""
        return self._at("compare", "samples", sample, **query)

    def json(self, address: str) -> str:
        """The data of a page."""
        path, mark, query = address.partition("?")
        return f"{path}.json{mark}{query}"

    def _at(self, *parts: object, **query: object) -> str:
        path = "/".join(quote(str(part), safe="") for part in parts)
        kept = {name: value for name, value in query.items() if value not in (None, "")}
        return f"{self.root}/{path}" + (f"?{urlencode(kept)}" if kept else "")
