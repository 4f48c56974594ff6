"""A transformers model's folder, and what of it and of the options does not depend on the model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from logitstore.spec.errors import TeacherError
from logitstore.teachers.base import TeacherOptions

__all__ = ["dtype_of", "folder_of", "weights_sha256"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of(options: TeacherOptions, device: str) -> Any:
    """The dtype of the forward pass, as `from_pretrained` takes it."""
    return _DTYPES.get(options.dtype, torch.float32 if device == "cpu" else "auto")


def folder_of(name: str) -> Path:
    """The model's folder: the one named, or the hub's snapshot of that id.

    Raises: TeacherError teacher-load.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise TeacherError(
                "teacher-load",
                "no such folder",
                where=f"hf:{name}",
                expected="a transformers folder or a hub id (owner/model)",
            )
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.json", "*.jinja", "*.model"]
        try:
            folder = Path(snapshot_download(name, allow_patterns=patterns))
        except Exception as error:
            raise TeacherError(
                "teacher-load",
                f"neither a folder nor a model the hub gives: {str(error).splitlines()[0]}",
                where=f"hf:{name}",
                hint="download it first and name its folder: hf:FOLDER",
            ) from error
    if not any(folder.glob("*.safetensors")):
        raise TeacherError(
            "teacher-load",
            "the folder holds no safetensors weights",
            where=folder,
            got=", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "an empty folder",
            expected="*.safetensors (pickled weights are never loaded)",
            hint="load the model once with transformers and save_pretrained it",
        )
    return folder


def weights_sha256(folder: Path) -> str:
    """SHA-256 over names and contents of configuration and weights."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").digest()
        digest.update(path.name.encode() + b"\0" + content)
    return digest.hexdigest()
