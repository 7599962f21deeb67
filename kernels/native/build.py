"""Compiles the C kernels for this machine, once: the library is kept in the user's cache folder between starts.

It takes a second. Any C compiler with OpenMP does (gcc or clang; Triton wants one as well). Where there is none, or it
fails, there is no library, and why is logged: everything works without it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

_SOURCES = Path(__file__).parent
_FLAGS = ("-std=gnu11", "-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_TUNED = ("-march=native", "-mprefer-vector-width=512")  # not known to every compiler: plain flags are tried after them
_SECONDS = 60
_log = logging.getLogger("onebase.native")


class BuildFailed(Exception):
    """No library, and why."""


def library() -> Path | None:
    """The compiled library, from the cache or made now; None where it cannot be made."""
    try:
        return _library(_cache_folder())
    except (BuildFailed, OSError) as error:
        _log.warning("no native CPU kernels, the plain ones serve: %s", error)
        return None


def _library(folder: Path) -> Path:
    compiler = _compiler()
    target = folder / f"kernels-{_key(compiler)}.so"
    if not target.exists():
        _compile(compiler, target)
    return target


def _compiler() -> str:
    names = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        raise BuildFailed("there is no C compiler (cc, gcc, clang, or $CC)")
    return found


def _cache_folder() -> Path:
    """A folder that nobody else can write: what lies in it is loaded into this process.

    Raises BuildFailed where the user's is not of that kind.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "onebase" / "native"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildFailed(f"{folder} belongs to, or can be written by, another user")
    return folder


def _key(compiler: str) -> str:
    """Of the sources, the flags, the compiler and the processor: a home folder may be shared by machines."""
    digest = hashlib.sha256()
    for file in sorted(_SOURCES.glob("*.[ch]")):
        digest.update(file.read_bytes())
    version = _run([compiler, "--version"])
    for part in (*_FLAGS, *_TUNED, compiler, platform.machine(), _features()):
        digest.update(part.encode() + b"\0")
    digest.update(version.encode())
    return digest.hexdigest()[:32]


def _features() -> str:
    """What the processor can do, as Linux lists it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(compiler: str, target: Path) -> None:
    """Into a file of its own, renamed when it is whole: several processes may start at once."""
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        made = Path(name) / target.name
        errors = [_attempt(compiler, flags, made) for flags in ((*_FLAGS, *_TUNED), _FLAGS) if not made.exists()]
        if not made.exists():
            raise BuildFailed(f"{compiler} failed: {errors[-1][-500:]}")
        made.replace(target)


def _attempt(compiler: str, flags: tuple[str, ...], made: Path) -> str:
    return _run([compiler, *flags, str(_SOURCES / "kernels.c"), "-o", str(made), "-lm"])


def _run(command: list[str]) -> str:
    """What it says."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_SECONDS)  # noqa: S603
    except subprocess.TimeoutExpired:
        return f"it took more than {_SECONDS} seconds"
    return done.stdout + done.stderr
