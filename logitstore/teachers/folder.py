"""A transformers model from its folder: what does not depend on what the model is for."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from logitstore.spec.errors import TeacherError, UsageError
from logitstore.spec.header import TeacherInfo
from logitstore.teachers.base import TeacherOptions, device_of

__all__ = ["LoadedFolder", "load_folder"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class LoadedFolder:
    """A model that was loaded from a folder.

    Attributes:
        name: what the user called it, without `hf:`.
        path: the folder.
        model: on its device, without gradients, in evaluation mode.
        tokenizer: of transformers.
        threads: CPU threads it runs with.
    """

    name: str
    path: Path
    model: Any
    tokenizer: Any
    threads: int

    def describe(self, masked_rows: int = 0) -> TeacherInfo:
        """Provenance; reads the weights' files for their digest."""
        import transformers

        parts = self.path.parts
        return TeacherInfo(
            name=f"hf:{self.name}",
            revision=parts[-1] if "snapshots" in parts else None,
            fingerprint=_weights_sha256(self.path),
            engine="transformers",
            engine_version=f"{transformers.__version__} torch {torch.__version__}",
            compute_dtype=str(self.model.dtype).removeprefix("torch."),
            device_type=self.model.device.type,
            threads_per_worker=self.threads,
            masked_rows=masked_rows,
        )


def load_folder(
    name: str, options: TeacherOptions, *, architecture: str, expected: str, otherwise: str
) -> LoadedFolder:
    """Load weights and tokenizer from a folder, or from the hub's cache or the hub.

    Only safetensors, no code from the model's folder.

    Args:
        architecture: the class of transformers, such as "AutoModelForCausalLM".
        expected: what the folder should hold, in words.
        otherwise: what to do with a folder that holds something else.

    Raises: TeacherError teacher-load; UsageError bad-argument, missing-dependency.
    """
    try:
        import transformers
        from transformers.utils import logging
    except ImportError:
        raise UsageError(
            "missing-dependency",
            "an hf: teacher needs transformers",
            hint="pip install 'logitstore[hf]'",
        ) from None
    device = device_of(options)
    dtype = _DTYPES.get(options.dtype, torch.float32 if device == "cpu" else "auto")
    path = _folder_of(name)
    logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model, loading = getattr(transformers, architecture).from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        raise TeacherError(
            "teacher-load",
            f"transformers cannot load it: {type(error).__name__}: {error}",
            where=f"hf:{name}",
            expected=f"{expected} with safetensors weights and a tokenizer",
        ) from error
    # A model whose head was never trained is loaded with a warning only.
    if missing := sorted(loading["missing_keys"]):
        raise TeacherError(
            "teacher-load",
            "its weights lack a part, which would be random",
            where=f"hf:{name}",
            got=f"no {', '.join(missing[:4])}",
            expected=f"{expected} that was trained",
            hint=otherwise,
        )
    model.requires_grad_(False).eval()
    return LoadedFolder(
        name=name,
        path=path,
        model=nn.Module.to(model, device),
        tokenizer=tokenizer,
        threads=options.threads,
    )


def _folder_of(name: str) -> Path:
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


def _weights_sha256(folder: Path) -> str:
    """SHA-256 over names and contents of configuration and weights."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").digest()
        digest.update(path.name.encode() + b"\0" + content)
    return digest.hexdigest()
