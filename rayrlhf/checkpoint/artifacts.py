"""What a stage leaves behind: a folder named by the hash of everything that went into it.

    <output>/artifacts/<stage>-<key>/
        artifact.json     stage, key, inputs, parents (stage -> key), result
        model/            Hugging Face format, tokenizer included
        ...               what else the stage wrote

The folder appears under its name only when it is complete, so a folder that is there can be used. A stage whose
inputs have not changed finds its folder and is not run again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrlhf.checkpoint.disk import flush, flush_tree

__all__ = ["Artifact", "ArtifactStore", "content_key", "hash_model_folder"]

RECORD = "artifact.json"


@dataclass(frozen=True, slots=True)
class Artifact:
    stage: str
    key: str
    folder: Path
    result: Mapping[str, Any]
    parents: Mapping[str, str]

    @property
    def model(self) -> str:
        return str(self.folder / "model")


class ArtifactStore:
    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, stage: str, key: str) -> Artifact | None:
        """The finished artifact of that name, if there is one."""
        folder = self.root / f"{stage}-{key}"
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            return Artifact(stage, key, folder, dict(record["result"]), dict(record["parents"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # not there, or not written by us
            return None

    def workspace(self, stage: str, key: str) -> Path:
        """An empty folder of this process to build the artifact in: two runs may be at the same stage at once."""
        self.root.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{stage}-{key}-", suffix=".partial", dir=self.root))
        folder.chmod(0o755)  # mkdtemp's is for one user; artifacts are shared
        return folder

    def finish(
        self,
        workspace: Path,
        stage: str,
        key: str,
        inputs: Mapping[str, Any],
        parents: Mapping[str, str],
        result: Mapping[str, Any],
    ) -> Artifact:
        """Write the record, flush all there is, and give the folder its name in one rename."""
        record = {"stage": stage, "key": key, "parents": dict(parents), "inputs": inputs, "result": dict(result)}
        (workspace / RECORD).write_text(json.dumps(record, indent=2, default=str), encoding="utf-8")
        flush_tree(workspace)  # the model too: the stage's checkpoints are let go next
        final = self.root / f"{stage}-{key}"
        shutil.rmtree(final, ignore_errors=True)
        workspace.rename(final)
        flush(self.root)
        return Artifact(stage, key, final, result, parents)


def content_key(inputs: Mapping[str, Any]) -> str:
    """12 hex digits of the SHA-256 of the inputs as canonical JSON."""
    text = json.dumps(inputs, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def hash_model_folder(path: str) -> str:
    """Identifies a model given from outside: a hash of its files, or its name when it is not a folder."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.iterdir() if p.is_file()):
        digest.update(file.name.encode())
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:12]
