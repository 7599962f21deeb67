"""The C library: made once, kept where nobody else can write, and done without where it cannot be made."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from onebase.kernels.attention import select_attention
from onebase.kernels.low_rank_native import NativeRows
from onebase.kernels.native import build, library
from onebase.kernels.native.library import available
from onebase.kernels.tables import ProgramTables, SiteShape

needs_compiler = pytest.mark.skipif(not available(), reason="there is no C compiler")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "onebase" / "native"


@needs_compiler
def test_it_is_compiled_once_and_found_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.library()
    assert first is not None
    assert first.parent == home
    assert list(home.iterdir()) == [first]  # nothing is left of the compilation
    monkeypatch.setattr(build, "_compile", lambda compiler, target: pytest.fail("it was compiled again"))
    assert build.library() == first


@needs_compiler
def test_other_sources_or_another_processor_are_another_library(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = build._compiler()
    key = build._key(compiler)
    monkeypatch.setattr(build, "_features", lambda: "flags: none")
    assert build._key(compiler) != key


def test_without_a_compiler_there_is_none_and_why_is_said(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(home))
    monkeypatch.delenv("CC", raising=False)
    with caplog.at_level(logging.WARNING):
        assert build.library() is None
    assert "there is no C compiler" in caplog.text


def test_a_compiler_that_fails_leaves_nothing_behind(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho no such option >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert build.library() is None
    assert "no such option" in caplog.text
    assert list(home.iterdir()) == []


def test_a_folder_that_others_can_write_is_not_used(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    home.mkdir(parents=True)
    home.chmod(0o777)
    assert build.library() is None
    assert "another user" in caplog.text


def test_everything_goes_the_plain_way_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(library, "_loaded", lambda: None)
    assert not available()
    assert select_attention(torch.device("cpu")).name == "cpu"
    with pytest.raises(ValueError, match="native"):
        select_attention(torch.device("cpu"), "native")


@needs_compiler
@pytest.mark.parametrize(("capability", "body"), [("DEFAULT", "cpu"), ("AVX2", "cpu"), ("AVX512", "native")])
def test_attention_and_gathers_in_c_are_chosen_where_vectors_are_wide(
    monkeypatch: pytest.MonkeyPatch, capability: str, body: str
) -> None:
    import torch

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert select_attention(torch.device("cpu")).name == body
    rows = NativeRows.of(ProgramTables(torch.zeros(64), [SiteShape(4, 4)]))
    assert (rows is not None) is (body == "native")
