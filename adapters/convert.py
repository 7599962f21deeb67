"""Folders with pickled weights (.bin) -> folders that can be loaded: ``onebase adapters convert SOURCE TARGET``.

Offline. Pickles are opened by a process of its own, under limits and without running code (see unpickle.py). The target
appears whole, checked as an upload is, or not at all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from onebase.adapters.check import CONFIG_FILE, check_finite, check_folder, read_config
from onebase.adapters.errors import AdapterRejected, AdapterTooLarge
from onebase.adapters.family_names import family_of
from onebase.adapters.registry.blobs import DEFAULT_MAX_BYTES

PICKLES = {
    "adapter_model.bin": "adapter_model.safetensors",
    "pytorch_adapter.bin": "adapter.safetensors",
    "pytorch_model_head.bin": "model_head.safetensors",
}
_FUSION = ("adapter_fusion_config.json", "pytorch_model_adapter_fusion.bin")
TIMEOUT_SECONDS = 900


@dataclass(frozen=True, slots=True)
class Converted:
    """family: as the register names it; num_tensors and nbytes: of what was written."""

    family: str
    num_tensors: int
    nbytes: int


def convert(source: Path, target: Path, *, max_bytes: int = DEFAULT_MAX_BYTES) -> Converted:
    """Write ``target``, which must not exist. Raises AdapterRejected or AdapterTooLarge, and then leaves nothing."""
    if target.exists():
        raise AdapterRejected(f"{str(target)!r} exists; give the name of a new folder.", param="target")
    pickles = _pickles(source)
    config = read_config(source / CONFIG_FILE)
    family_of(config, CONFIG_FILE)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        folder = Path(temporary) / "adapter"
        folder.mkdir()
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2))
        for pickle in pickles:
            _unpickle(pickle, folder / PICKLES[pickle.name], max_bytes)
        checked = check_folder(folder)
        check_finite(checked)
        os.rename(folder, target)
    nbytes = sum(info.nbytes for info in checked.tensors.values())
    return Converted(checked.family, len(checked.tensors), nbytes)


def _pickles(source: Path) -> list[Path]:
    """The weights' files. Raises AdapterRejected where the folder is none that training left."""
    if source.is_symlink() or not source.is_dir():
        raise AdapterRejected(f"{str(source)!r} is not a folder (links are not followed).", param="source")
    names = {entry.name for entry in source.iterdir()}
    if fusion := sorted(names.intersection(_FUSION)):
        reason = "AdapterFusion mixes the outputs of several adapters by attention, which is not served"
        raise AdapterRejected(f"{fusion[0]!r}: {reason}; convert them one by one.", param="files")
    files = [source / name for name in PICKLES if name in names]
    if not any(file.name != "pytorch_model_head.bin" for file in files):
        known = ", ".join(PICKLES)
        raise AdapterRejected(f"{str(source)!r} has no weights to convert; known are {known}.", param="source")
    for file in [*files, source / CONFIG_FILE]:
        if file.is_symlink() or not file.is_file():
            raise AdapterRejected(f"{file.name!r} is missing, or not a regular file.", param="files")
    return files


def _unpickle(source: Path, target: Path, max_bytes: int) -> None:
    size = source.stat().st_size
    if size > max_bytes:
        raise AdapterTooLarge(f"{source.name!r} has {size} bytes; at most {max_bytes} are allowed.", param="files")
    command = [sys.executable, "-I", "-m", "onebase.adapters.unpickle", str(source), str(target), str(max_bytes)]
    environment = {"PATH": os.defpath, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(  # noqa: S603
            command,
            env=environment,
            capture_output=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise AdapterRejected(f"{source.name!r} took over {TIMEOUT_SECONDS} seconds to read.", param="files") from None
    if done.returncode == 0:
        return
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    reason = lines[-1][:400] if done.returncode == 1 and lines else f"reading it ended with status {done.returncode}"
    raise AdapterRejected(f"{source.name!r} is refused: {reason}.", param="files")
