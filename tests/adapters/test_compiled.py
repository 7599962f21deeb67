"""Compiled forms on disk: damage is noticed, a full disk costs nothing, a new compiler reads nothing of the old one's.

That every family survives the way to the disk and back: tests/families/test_compiled_forms.py.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from onebase.adapters.packing import PackedProgram, pack
from onebase.adapters.program import AdapterProgram, LowRank, SiteOps
from onebase.adapters.tiers import codec, compiled
from onebase.adapters.tiers.compiled import CompiledForms, compiler_version
from onebase.kernels.ops.shared import SharedLowRank
from onebase.kernels.ops.vector import ScaleOut

DIGEST = "ab" * 32


def _packed(digest: str = DIGEST, dtype: torch.dtype = torch.bfloat16) -> PackedProgram:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    shared = SharedLowRank(draw(4, 16), draw(4, 24), draw(4), draw(24))
    sites = {"one": SiteOps(LowRank(draw(3, 16), draw(3, 24), 0.1), extra=(shared, ScaleOut(draw(24))))}
    return pack(AdapterProgram(digest, "TEST", sites), dtype)


@pytest.fixture
def forms(tmp_path: Path) -> CompiledForms:
    return CompiledForms(tmp_path, "base", torch.bfloat16)


def _file(forms: CompiledForms) -> Path:
    return forms._folder(DIGEST) / forms._name


def _assert_read(forms: CompiledForms) -> None:
    packed, expected = forms.read(DIGEST), _packed()
    assert packed is not None
    assert torch.equal(packed.data, expected.data)
    assert packed.operands == expected.operands


def test_written_and_read(forms: CompiledForms) -> None:
    assert forms.read(DIGEST) is None
    forms.write(_packed())
    _assert_read(forms)
    counts = forms.counts
    assert (counts.files, counts.hits, counts.misses, counts.failures) == (1, 1, 1, 0)
    assert counts.nbytes == _file(forms).stat().st_size
    assert [path.name for path in forms._folder(DIGEST).iterdir()] == [forms._name]
    forms.write(_packed())
    assert (counts.files, counts.nbytes) == (1, _file(forms).stat().st_size)


def test_damage_anywhere_is_noticed(forms: CompiledForms, tmp_path: Path) -> None:
    """One bit of the padded header may flip unseen where it is a space or a tensor's name: never a value."""
    forms.write(_packed())
    whole, draw = _file(forms).read_bytes(), random.Random(3)
    start = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(start, len(whole), 7), *draw.sample(range(start), 60), len(whole) - 1]
    expected = _packed()
    for at in places:
        broken = bytearray(whole)
        broken[at] ^= 1 << draw.randrange(8)
        _file(forms).write_bytes(broken)
        packed = forms.read(DIGEST)
        assert packed is None or (at < start and torch.equal(packed.data, expected.data)), at


@pytest.mark.parametrize("length", [0, 7, 100, 5000, -1])
def test_truncated_forms_are_not_read(length: int, forms: CompiledForms) -> None:
    forms.write(_packed())
    whole = _file(forms).read_bytes()
    _file(forms).write_bytes(whole[:length])
    assert forms.read(DIGEST) is None
    assert forms.counts.failures == 1
    forms.write(_packed())
    _assert_read(forms)


def test_a_form_of_another_adapter_is_not_read(forms: CompiledForms) -> None:
    forms.write(_packed("cd" * 32))
    shutil.copytree(forms._folder("cd" * 32), forms._folder(DIGEST))
    assert forms.read(DIGEST) is None


def test_it_shrinks_while_it_is_read(forms: CompiledForms, monkeypatch: pytest.MonkeyPatch) -> None:
    forms.write(_packed())
    monkeypatch.setattr(compiled.os, "preadv", lambda file, buffers, at: 0)
    assert forms.read(DIGEST) is None


def test_short_reads_are_gone_on_with(forms: CompiledForms, monkeypatch: pytest.MonkeyPatch) -> None:
    forms.write(_packed())
    preadv = os.preadv
    monkeypatch.setattr(compiled.os, "preadv", lambda file, buffers, at: preadv(file, [buffers[0][:13]], at))
    _assert_read(forms)


@pytest.mark.parametrize("call", ["fsync", "write"])
def test_a_full_disk_costs_a_compilation(
    call: str, forms: CompiledForms, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((compiled.os, "fsync") if call == "fsync" else (compiled, "_header")), full)
    forms.write(_packed())
    assert list(forms._folder(DIGEST).iterdir()) == []
    assert forms.read(DIGEST) is None
    assert (forms.counts.files, forms.counts.nbytes, forms.counts.failures) == (0, 0, 1)
    assert "No space left" in caplog.text
    monkeypatch.undo()
    forms.write(_packed())
    _assert_read(forms)


def test_what_a_crash_left_is_written_over(forms: CompiledForms) -> None:
    forms._folder(DIGEST).mkdir(parents=True)
    _file(forms).with_name(f".{forms._name}").write_bytes(b"half")
    forms.write(_packed())
    assert [path.name for path in forms._folder(DIGEST).iterdir()] == [forms._name]


def test_each_base_dtype_and_compiler_has_its_own(
    forms: CompiledForms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms.write(_packed())
    CompiledForms(tmp_path, "other", torch.bfloat16).write(_packed())
    CompiledForms(tmp_path, "base", torch.float32).write(_packed(dtype=torch.float32))
    assert len(list(forms._folder(DIGEST).iterdir())) == 3
    monkeypatch.setattr(compiled, "compiler_version", lambda: "f" * 64)
    newer = CompiledForms(tmp_path, "base", torch.bfloat16)
    assert newer.read(DIGEST) is None
    newer.write(_packed())
    assert newer.read(DIGEST) is not None
    assert len(list(forms._folder(DIGEST).iterdir())) == 3, "the older compiler's went, the others' stay"
    assert not _file(forms).exists()


def test_names_do_not_lead_out_of_the_folder(forms: CompiledForms, tmp_path: Path) -> None:
    for digest in ("../x", "/etc/passwd", "a/b", "AB" * 32, ""):
        assert forms._folder(digest).parent == tmp_path


def test_the_survey_counts_what_is_there(forms: CompiledForms, tmp_path: Path) -> None:
    forms.write(_packed())
    forms.write(_packed("cd" * 32))
    shutil.rmtree(forms._folder("cd" * 32))
    CompiledForms(tmp_path, "other", torch.bfloat16).write(_packed())
    again = CompiledForms(tmp_path, "base", torch.bfloat16)
    again.survey()
    total = sum(path.stat().st_size for path in tmp_path.glob("*/*.safetensors"))
    assert (again.counts.files, again.counts.nbytes) == (1, total), "bytes of other bases count as well"
    assert total > _file(forms).stat().st_size
    forms.survey()
    assert forms.counts.files == 1


def test_the_version_is_the_same_in_every_process() -> None:
    code = "from onebase.adapters.tiers.compiled import compiler_version; print(compiler_version())"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == compiler_version()


def test_what_formats_are_read_with_is_part_of_the_version() -> None:
    files = compiled.compiler_files()
    assert {"family_names.py", "strict_json.py", "formats/patterns.py", "tiers/codec.py", "ops/reft.py"} <= files.keys()
    assert not any(name.startswith(("registry/", "sources/", "tiers/cache")) for name in files)


def test_a_nearly_full_disk_is_left_alone(forms: CompiledForms, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 1 << 30
    usage = SimpleNamespace(total=1 << 40, used=0, free=free)
    monkeypatch.setattr(compiled.shutil, "disk_usage", lambda path: usage)
    forms.write(_packed())
    assert forms.read(DIGEST) is None
    assert (forms.counts.files, forms.counts.failures) == (0, 1)
    usage.free = free + (1 << 20)
    forms.write(_packed())
    _assert_read(forms)
    usage.total, usage.free = 10 << 20, 1 << 20
    forms.write(_packed())
    assert forms.counts.failures == 1, "on a small disk a share is left"


@pytest.mark.parametrize("error", [RecursionError, MemoryError, RuntimeError, OverflowError])
def test_whatever_a_damaged_form_raises_is_a_compilation(
    error: type[Exception], forms: CompiledForms, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise error("too deep")

    forms.write(_packed())
    monkeypatch.setattr(compiled, "from_plain", broken)
    assert forms.read(DIGEST) is None
    assert forms.counts.failures == 1


def _edited(forms: CompiledForms, edit: Callable[[dict[str, Any]], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a form whose JSON is another one, with a right checksum."""

    def other(packed: PackedProgram) -> dict[str, Any]:
        plain = codec.to_plain(packed)
        edit(plain)
        return plain

    monkeypatch.setattr(compiled, "to_plain", other)
    forms.write(_packed())


@pytest.mark.parametrize(
    "edit",
    [
        lambda plain: plain["extra"]["one"][0].__setitem__(0, "Path"),
        lambda plain: plain["extra"]["one"][0].__setitem__(0, "Instruction"),
        lambda plain: plain["extra"]["one"][1][1].__setitem__("colour", 3),
        lambda plain: plain["extra"]["one"][0][2].pop("mid"),
        lambda plain: plain["extra"]["one"][0][2]["a"].__setitem__(2, "float3"),
        lambda plain: plain["extra"]["one"].append(None),
        lambda plain: plain["operands"]["one"].append(3),
        lambda plain: plain["operands"]["one"].__setitem__(2, 100_000),
        lambda plain: plain["operands"]["one"].__setitem__(3, -8),
        lambda plain: plain["operands"]["one"].__setitem__(4, 100_000),
        lambda plain: plain["extra"]["one"][1][2]["gain"].__setitem__(0, 100_000),
        lambda plain: plain["extra"]["one"][0][2]["a"].__setitem__(1, [400, 16]),
        lambda plain: plain["extra"]["one"][0][2]["a"].__setitem__(3, "another"),
        lambda plain: plain["traits"].__setitem__("mood", 1),
        lambda plain: plain.pop("head"),
        lambda plain: plain.__setitem__("operands", 5),
    ],
)
def test_what_this_version_does_not_know_is_compiled_again(
    edit: Callable[[dict[str, Any]], object], forms: CompiledForms, monkeypatch: pytest.MonkeyPatch
) -> None:
    _edited(forms, edit, monkeypatch)
    assert _file(forms).exists()
    assert forms.read(DIGEST) is None
    assert forms.counts.failures == 1


def test_the_edit_alone_is_not_what_makes_it_unreadable(forms: CompiledForms, monkeypatch: pytest.MonkeyPatch) -> None:
    _edited(forms, lambda plain: plain.__setitem__("family", "OTHER"), monkeypatch)
    packed = forms.read(DIGEST)
    assert packed is not None
    assert packed.family == "OTHER"


def _limited(root: Path, forms: int) -> CompiledForms:
    """Room for so many of them, before a tenth has to be free."""
    one = CompiledForms(root / "measure", "base", torch.bfloat16)
    one.write(_packed())
    return CompiledForms(root / "limited", "base", torch.bfloat16, most_bytes=int(one.counts.nbytes * forms * 1.01))


def _names(forms: CompiledForms) -> set[str]:
    return {path.parent.name[:2] for path in forms._root.glob("*/*.safetensors")}


def _age(forms: CompiledForms, digest: str, seconds: int) -> None:
    path = forms._folder(digest) / forms._name
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - seconds))


def test_over_the_limit_the_forms_go_that_were_read_longest_ago(tmp_path: Path) -> None:
    forms = _limited(tmp_path, 4)
    digests = [f"{number}{number}" * 32 for number in range(6)]
    for number, digest in enumerate(digests[:4]):
        forms.write(_packed(digest))
        _age(forms, digest, 100 - number)
    assert _names(forms) == {"00", "11", "22", "33"}
    assert forms.read(digests[0]) is not None
    forms.write(_packed(digests[4]))
    assert _names(forms) == {"00", "33", "44"}, "two go: not every write looks at every file"
    forms.write(_packed(digests[5]))
    assert _names(forms) == {"00", "33", "44", "55"}
    before = forms.counts.nbytes, forms.counts.files
    forms.survey()
    assert (forms.counts.nbytes, forms.counts.files) == before
    assert forms.counts.failures == 0


def test_a_form_that_is_larger_than_the_limit_is_not_written(tmp_path: Path) -> None:
    forms = CompiledForms(tmp_path, "base", torch.bfloat16, most_bytes=100)
    forms.write(_packed())
    assert not _names(forms)
    assert forms.counts.failures == 1
