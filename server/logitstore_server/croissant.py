"""GET /v1/stores/NAME/croissant: the store described for dataset search engines and loaders.

Source: Croissant format specification 1.0, https://docs.mlcommons.org/croissant/docs/croissant-spec.html
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from logitstore_server.routing import ServedByName, problems
from logitstore_server.stores import Opened

__all__ = ["add_routes", "describe"]

# Of the files that are listed one by one; the index lists all.
_MAX_FILES = 1000
_SPECIFICATION = "http://mlcommons.org/croissant/1.0"

_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}


def add_routes(app: FastAPI) -> None:
    """Add the route of the description."""
    content = {"application/ld+json": {"schema": {"type": "object"}}}
    app.add_api_route(
        "/v1/stores/{store}/croissant",
        croissant,
        methods=["GET"],
        tags=["stores"],
        response_model=None,
        response_class=JSONResponse,
        responses={200: {"description": "JSON-LD.", "content": content}, **problems(404)},
    )


def croissant(request: Request, served: ServedByName) -> JSONResponse:
    """The store as Croissant JSON-LD: its objects with sizes and hashes, and its shards as rows."""
    base = f"{str(request.base_url).rstrip('/')}/v1/stores/{served.name}"
    return JSONResponse(
        describe(served.opened(), served.name, base),
        media_type="application/ld+json",
        headers={"Cache-Control": served.cache_control(immutable=False)},
    )


def describe(opened: Opened, name: str, base: str) -> dict[str, Any]:
    """The JSON-LD document; `base` is the store's URL."""
    header, index = opened.store.header, opened.index
    shards = index.shards[:_MAX_FILES]
    form = "application/zip" if header.container == "zarr" else "application/vnd.apache.arrow.file"
    files = [
        {
            "@type": "cr:FileObject",
            "@id": row.object,
            "name": row.object,
            "contentUrl": f"{base}/shards/{row.object}",
            "contentSize": f"{row.object_bytes} B",
            "encodingFormat": form,
            "sha256": row.object_sha256,
        }
        for row in shards
    ]
    listed = "" if len(shards) == len(index.shards) else f" The first {len(shards)} are listed."
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "name": name,
        "conformsTo": _SPECIFICATION,
        "description": (
            f"Distributions of the teacher {header.teacher.name}, kept as {header.signal} over "
            f"{header.vocab_size} ids: {index.positions} positions in {index.samples} samples and "
            f"{len(index.shards)} shards.{listed}"
        ),
        "url": base,
        "datePublished": header.created,
        "version": "1.0.0",
        "isLiveDataset": not opened.sealed,
        "distribution": files,
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "shards",
                "name": "shards",
                "description": "One row for each shard.",
                "key": {"@id": "shards/shard"},
                "field": [
                    _field("shard", "sc:Text", "Name of the shard."),
                    _field("object", "sc:Text", "File that holds it."),
                    _field("samples", "sc:Integer", "Samples in it."),
                    _field("positions", "sc:Integer", "Predicted distributions in it."),
                ],
                "data": [
                    {
                        "shards/shard": row.shard,
                        "shards/object": row.object,
                        "shards/samples": row.samples,
                        "shards/positions": row.positions,
                    }
                    for row in shards
                ],
            }
        ],
    }


def _field(name: str, data_type: str, description: str) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": f"shards/{name}",
        "name": name,
        "description": description,
        "dataType": data_type,
    }
