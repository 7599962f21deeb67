"""Whatever is asked for, the refusal names the field and repeats no secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from onebase.adapters.errors import AdapterError
from onebase.adapters.sources import SourceOptions, Sources

SECRET = "S3CR3T"
SOURCES = (
    f"https://user:{SECRET}@example.com/team/a",
    f"https://example.com/team/a?X-Amz-Signature={SECRET}",
    f"https://example.com/team/a#{SECRET}",
    f"https://example.com/other?sig={SECRET}",
    f"https:/example.com/team?sig={SECRET}",
    f"//user:{SECRET}@example.com/team",
    f"HTTPS://example.com/team/a?{SECRET}",
    f"ftp://user:{SECRET}@example.com/a",
    f"s3://key:{SECRET}@bucket/a",
    f"s3://bucket/a?sig={SECRET}",
    f"az://container/a?sv=1&sig={SECRET}",
    f"hf://org/name?token={SECRET}",
    f"file:///nowhere?token={SECRET}",
    f"file://user:{SECRET}@host/a",
    f"example.com/a?token={SECRET}",
)


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("source", SOURCES)
def test_messages_repeat_no_secret(source: str, on: bool, tmp_path: Path) -> None:
    everything = SourceOptions((tmp_path,), ("*",), ("s3://bucket", "az://container"), ("https://example.com/team",))
    with pytest.raises(AdapterError) as refusal:
        Sources(everything if on else SourceOptions()).check(source)
    assert SECRET not in refusal.value.message
    assert refusal.value.param == "source"
    assert len(refusal.value.message) < 600


@pytest.mark.parametrize(
    "source", ["", "x" * 100_000, "https://" + "x" * 100_000, "\0", "hf://\n", "/\udcff", "https://\udcff"]
)
def test_odd_texts_are_refused_alike(source: str, tmp_path: Path) -> None:
    everything = SourceOptions((tmp_path,), ("*",), ("s3://bucket",), ("https://example.com/team",))
    with pytest.raises(AdapterError) as refusal:
        Sources(everything).check(source)
    assert refusal.value.param == "source"
    assert len(refusal.value.message) < 600
