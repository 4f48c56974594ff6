"""`/metrics` of a running service with two workers, and what alerts and dashboard ask of it."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from logitstore_server.settings import ServerSettings, StoreEntry
from tests.server_security.live import Live, running
from tests.source_tree import REPOSITORY

PATIENCE_S = 30
SAMPLES = 24

Labels = dict[str, str]


@dataclass
class Scrape:
    """One answer of /metrics: what every sample is named, labelled and worth."""

    samples: list[tuple[str, Labels, float]]

    def sum(self, name: str, **labels: str) -> float:
        wanted = labels.items()
        return sum(value for n, held, value in self.samples if n == name and wanted <= held.items())

    def label_names(self, name: str) -> set[str]:
        return {label for n, labels, _ in self.samples if n == name for label in labels}


@dataclass
class Scraped:
    """A service, and what it says after the traffic of the fixture."""

    live: Live
    metrics_key: str
    reader_key: str

    def scrape(self) -> Scrape:
        answer = self.get("/metrics", self.metrics_key)
        assert answer.status_code == 200
        return Scrape(
            [
                (sample.name, sample.labels, sample.value)
                for family in text_string_to_metric_families(answer.text)
                for sample in family.samples
            ]
        )

    def get(self, path: str, key: str, **headers: str) -> httpx2.Response:
        # A new connection each: the kernel hands them to either worker.
        headers["Authorization"] = f"Bearer {key}"
        return httpx2.get(self.live.url + path, headers=headers, timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory,
    stores: Path,
    entries: tuple[StoreEntry, ...],
    keys_file: Path,
    reader_key: str,
    metrics_key: str,
) -> Iterator[Scraped]:
    damaged = tmp_path_factory.mktemp("damaged") / "damaged"
    shutil.copytree(stores / "private", damaged)
    last = sorted((damaged / "shards").iterdir())[-1]
    data = bytearray(last.read_bytes())
    data[: len(data) // 2] = bytes(len(data) // 2)
    last.chmod(0o644)
    last.write_bytes(data)
    settings = ServerSettings(
        stores=(*entries, StoreEntry(name="damaged", location=str(damaged))),
        keys_file=keys_file,
        port=0,
        workers=2,
        head_timeout_s=0.3,
        shutdown_delay_s=0,
    )
    with running(settings, toy=False) as live:
        yield Scraped(live, metrics_key, reader_key)


@pytest.fixture(scope="module")
def scrape(service: Scraped, stores: Path) -> Scrape:
    """After traffic that every kind of metric has something to say about."""
    with socket.create_connection(("127.0.0.1", service.live.port), PATIENCE_S) as silent:
        silent.recv(1)  # until the guard drops it
    assert service.get("/v1/stores", "ls_aaaaaaaa_wrong").status_code == 401
    name = sorted((stores / "private" / "shards").iterdir())[0].name
    for _ in range(6):
        assert service.get(f"/v1/stores/private/shards/{name}", service.reader_key).content
        commits = "/v1/stores/private/commits/0001-000000.1.json"
        assert service.get(commits, service.reader_key).status_code == 200
        rows = service.get("/v1/stores/private/samples?start=3&stop=10", service.reader_key)
        assert rows.headers["logitstore-rows"] == "7"
    # The last shard is damaged: refused where it comes first, cut where it comes later.
    for _ in range(3):
        refused = service.get(f"/v1/stores/damaged/samples?ids={SAMPLES - 1}", service.reader_key)
        assert refused.json()["kind"] == "chunk-checksum-mismatch"
        with pytest.raises(httpx2.RemoteProtocolError):
            service.get("/v1/stores/damaged/samples", service.reader_key)
    return service.scrape()


def test_every_count_is_true_with_two_workers(service: Scraped, scrape: Scrape) -> None:
    assert scrape.sum("logitstore_rows_total", store="private") == 6 * 7
    assert scrape.sum("logitstore_verify_failures_total", kind="chunk-checksum-mismatch") == 6
    assert scrape.sum("logitstore_verify_failures_total") == 6
    # A request looks for the document and for its compressed form; each worker's first finds none.
    hits = scrape.sum("logitstore_cache_reads_total", result="hit")
    misses = scrape.sum("logitstore_cache_reads_total", result="miss")
    assert hits + misses == 6 * 2
    assert 2 <= misses <= 4
    # One shard of `private`, two of `damaged`, in one worker or in both.
    assert 3 <= scrape.sum("logitstore_open_shards") <= 2 * 2 * 3
    assert scrape.sum("logitstore_refusals_total", kind="key-invalid") == 1
    assert scrape.sum("logitstore_dropped_connections_total", reason="head-timeout") == 1
    assert scrape.sum("logitstore_requests_in_flight") == 1  # the scrape
    # Whichever worker answers.
    for _ in range(6):
        again = service.scrape()
        for name in ("rows_total", "verify_failures_total", "cache_reads_total", "open_shards"):
            assert again.sum(f"logitstore_{name}") == scrape.sum(f"logitstore_{name}")


def test_clients_cannot_make_series(service: Scraped, scrape: Scrape) -> None:
    def count() -> int:
        return len(service.scrape().samples)

    def disturb(name: str) -> None:
        for path in [f"/{name}", f"/v1/stores/{name}/store.json", f"/v1/stores/private/{name}"]:
            httpx2.request(f"X{name}".upper(), service.live.url + path)
            service.get(path, service.reader_key)
            service.get(path, f"ls_{name}_wrong", Host=name)

    # The first of each sort adds the series "none", "other" and such; who comes after adds none.
    disturb("first")
    before = count()
    for number in range(4):
        disturb(f"other{number}")
    assert count() == before


def expressions() -> list[str]:
    """Everything that alerts and dashboard ask of Prometheus."""
    rules = yaml.safe_load((REPOSITORY / "deploy/prometheus/alerts.yml").read_text())
    alerts = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    assert 3 <= len(alerts) <= 5
    dashboard = json.loads((REPOSITORY / "deploy/grafana/dashboards/logitstore.json").read_text())
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(panels) > 10
    return alerts + panels


def test_alerts_and_dashboard_ask_for_what_there_is(scrape: Scrape) -> None:
    there = {name for name, _, _ in scrape.samples}
    asked = set()
    for expression in expressions():
        names = re.findall(r"\blogitstore_\w+", expression)
        selectors = re.findall(r"\b(logitstore_\w+)\{([^}]*)\}", expression)
        assert names or re.search(r'\bup\{job="logitstore"\}', expression), expression
        for name in names:
            assert name in there, f"{name} of {expression}"
            asked.add(name)
        for name, selector in selectors:
            used = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
            assert used <= scrape.label_names(name), expression
        for grouped in re.findall(r"\bby \(([^)]*)\)", expression):
            wanted = {label.strip() for label in grouped.split(",")}
            assert wanted <= set.union(*map(scrape.label_names, names)), expression
    # And everything there is can be seen somewhere.
    families = {re.sub(r"_(bucket|count|sum|created)$", "", name) for name in there}
    shown = {re.sub(r"_bucket$", "", name) for name in asked}
    assert families - shown == set()


def test_alerts_filter_routes_and_statuses_that_exist(scrape: Scrape) -> None:
    routes = {labels.get("route", "") for _, labels, _ in scrape.samples}
    assert [route for route in routes if re.fullmatch(".*/shards/.*", route)]
    statuses = {labels.get("status", "") for _, labels, _ in scrape.samples}
    assert [status for status in statuses if re.fullmatch("5..|cut", status)]


def test_prometheus_scrapes_what_compose_runs() -> None:
    config = yaml.safe_load((REPOSITORY / "deploy/prometheus/prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["job_name"] == "logitstore"
    assert job["static_configs"] == [{"targets": ["api:8640"]}]
    compose = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
    assert compose["services"]["serve"]["networks"]["inside"]["aliases"] == ["api"]
    assert job["authorization"]["credentials_file"] == "/run/secrets/metrics_key"
    assert "metrics_key" in compose["services"]["prometheus"]["secrets"]
    sources = yaml.safe_load(
        (REPOSITORY / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text()
    )
    dashboard = json.loads((REPOSITORY / "deploy/grafana/dashboards/logitstore.json").read_text())
    used = {panel["datasource"]["uid"] for panel in dashboard["panels"]}
    assert used == {source["uid"] for source in sources["datasources"]}
