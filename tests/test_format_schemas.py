"""The specification, the JSON Schemas and the shared cases say what the code does."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from pydantic import BaseModel

from logitstore.containers.protocol import MAX_ARRAY_BYTES
from logitstore.containers.zarr_layout import ALLOWED_CODECS
from logitstore.record.random import bits, key_of, uniform
from logitstore.spec import commit, header, index, plan, schema, signals, statistics
from logitstore.spec.document import MAX_DOCUMENT_BYTES, canonical_json, sha256_hex
from logitstore.spec.errors import FormatError, IntegrityError, LogitstoreError
from logitstore.spec.export_schemas import DOCUMENTS, schema_files
from logitstore.spec.paths import check_key

SCHEMAS = Path(__file__).resolve().parent.parent / "schemas"
SPEC = (SCHEMAS / "format-v1.md").read_text(encoding="utf-8")


def _models() -> Iterator[type[BaseModel]]:
    """Every model that a document is made of."""
    for module in (header, schema, signals, plan, commit, statistics, index):
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, type) and issubclass(value, BaseModel):
                yield value


MODELS = list(_models())


def section(title: str) -> str:
    """Text under a heading, up to the next one of any level."""
    match = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", SPEC, re.DOTALL | re.MULTILINE)
    assert match, f"no section {title!r}"
    return match[1]


def table(text: str) -> list[list[str]]:
    """Cells of the first table's rows, without its heading."""
    lines = text[text.index("|") :].split("\n\n")[0].splitlines()
    assert set(lines[1]) <= set("| -")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_json_schemas_are_those_of_the_models() -> None:
    for name, text in schema_files().items():
        found = (SCHEMAS / name).read_text(encoding="utf-8")
        assert found == text, "run: python -m logitstore.spec.export_schemas schemas"
    assert {p.name for p in SCHEMAS.glob("*.schema.json")} == set(schema_files())


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_table_lists_the_fields_of_its_model(model: type[BaseModel]) -> None:
    kind = model.model_fields.get("kind")
    is_signal = model.__module__ == signals.__name__
    title = kind.default if is_signal and kind is not None else model.__name__
    listed = [row[0].strip("`") for row in table(section(title))]
    assert listed == [field.alias or name for name, field in model.model_fields.items()]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_optional_fields_are_called_optional(model: type[BaseModel]) -> None:
    if model.__module__ == signals.__name__:
        rows = table(section(model.model_fields["kind"].default))
    else:
        rows = table(section(model.__name__))
    for row in rows:
        name = row[0].strip("`")
        field = next(f for n, f in model.model_fields.items() if name in (n, f.alias))
        nullable = not field.is_required() and field.default is None
        assert nullable == ("optional" in row[1]), name


def test_limits_and_names_in_the_text_are_those_of_the_code() -> None:
    assert f"{MAX_DOCUMENT_BYTES:,} bytes" in SPEC
    assert MAX_ARRAY_BYTES == 2**30
    assert "2^30 bytes a chunk" in SPEC
    features = {row[0].strip("`") for row in table(section("10. Versions"))}
    assert features == header.READER_FEATURES
    for codec in ALLOWED_CODECS:
        assert f"`{codec}`" in SPEC
    fixed = {row[0].strip("`") for row in table(section("Columns with a fixed meaning"))}
    assert set(header.AUX_FIELDS) <= fixed


def test_the_random_function_gives_the_printed_vectors() -> None:
    rows = table(section("11. Random function"))
    assert len(rows) >= 8
    for name, key, seed, position, draw, expected, in_unit in rows:
        sample_key = "" if name == "(empty)" else name.strip("`")
        assert key_of(sample_key) == int(key.strip("`"), 16)
        arguments = (int(seed), key_of(sample_key), int(position), int(draw))
        assert int(bits(*arguments)) == int(expected.strip("`"), 16)
        assert float(uniform(*arguments)) == float(in_unit)


def test_the_random_function_broadcasts_and_is_uniform() -> None:
    draws = uniform(7, key_of("x"), np.arange(500)[:, None], np.arange(40))
    assert draws.shape == (500, 40)
    assert draws[3, 5] == uniform(7, key_of("x"), 3, 5)
    assert 0 <= draws.min() < draws.max() < 1
    counts, _ = np.histogram(draws, bins=10, range=(0, 1))
    assert np.all(np.abs(counts - 2000) < 5 * np.sqrt(2000 * 0.9))


def cases(name: str) -> list[Any]:
    found = json.loads((SCHEMAS / "cases" / f"{name}.json").read_text(encoding="utf-8"))
    return [pytest.param(case, id=f"{name}: {case['name']}") for case in found]


def file_of(case: dict[str, Any]) -> bytes:
    if "file_hex" in case:
        return bytes.fromhex(case["file_hex"])
    if "file" in case:
        return case["file"].encode()
    return framed(canonical_json(case["body"]))


def framed(body: bytes) -> bytes:
    return b'{"sha256":"%s","body":%s}\n' % (sha256_hex(body).encode(), body)


@pytest.mark.parametrize("case", [case for name in ("frame", *DOCUMENTS) for case in cases(name)])
def test_document_cases(case: dict[str, Any]) -> None:
    decode = DOCUMENTS[case["document"]].decode
    if case["expect"] is None:
        document = decode(file_of(case), where="here")
        assert decode(document.encode(), where="again") == document
        validate(case)
        return
    with pytest.raises((FormatError, IntegrityError)) as caught:
        decode(file_of(case), where="here")
    assert caught.value.kind == case["expect"]
    assert "here" in str(caught.value)


_TOKENS = [
    *(
        "null",
        "true",
        "-1",
        "1e999",
        "NaN",
        "9" * 30,
        "9" * 5000,
        '"\\ud800"',
        '"../x"',
        "[" * 3000,
    ),
    *('"sha256"', "{}", "[]", ",", ":", '"', "\\", "\x00", "\ufeff", "0.5", "18446744073709551616"),
]


@pytest.mark.parametrize(
    "runs",
    [
        3_000,
        pytest.param(1_000_000, marks=[pytest.mark.soak, pytest.mark.timeout(7_200)]),
    ],
)
def test_any_body_gives_a_document_or_a_named_error(runs: int) -> None:
    rng = random.Random(0)
    valid = [
        (case["document"], canonical_json(case["body"]).decode())
        for name in DOCUMENTS
        for case in json.loads((SCHEMAS / "cases" / f"{name}.json").read_text())
        if case["expect"] is None
    ]
    refused = 0
    for _ in range(runs):
        name, text = rng.choice(valid)
        for _ in range(rng.choice([1, 1, 2, 8])):
            start = rng.randrange(len(text))
            stop = start + rng.choice([0, 0, 1, 1, 2, 5, 40])
            text = text[:start] + rng.choice([*_TOKENS, text[stop : stop + 9]]) + text[stop:]
        body = text.encode()
        if rng.random() < 0.1:
            body = body[: rng.randrange(len(body))] + bytes([rng.randrange(256)])
        try:
            DOCUMENTS[name].decode(framed(body), where="here")
        except FormatError:
            refused += 1
    assert refused > runs / 2


def validate(case: dict[str, Any]) -> None:
    exported = json.loads((SCHEMAS / f"{case['document']}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(exported)
    jsonschema.validate(case["body"], exported, jsonschema.Draft202012Validator)


@pytest.mark.parametrize("case", cases("paths"))
def test_path_cases(case: dict[str, Any]) -> None:
    if case["expect"] is None:
        assert check_key(case["key"], where="here") == case["key"]
        return
    with pytest.raises(LogitstoreError) as caught:
        check_key(case["key"], where="here")
    assert caught.value.kind == case["expect"]


def test_every_kind_of_case_is_a_kind() -> None:
    from logitstore.spec.errors import KINDS

    for name in ("frame", "paths", *DOCUMENTS):
        for case in cases(name):
            assert case.values[0]["expect"] in {None, *KINDS}
