from __future__ import annotations

import pytest

from onebase.adapters.errors import AdapterNameInvalid
from onebase.adapters.names import Reference, check_name, parse_reference

BAD = ["", ".", "..", "../e", "a/b", "a,b", "a b", "a\n", "a\0", "-a", "_a", "a@1", "é", "ａ", "x" * 129, "x" * 5000]


BAD_DIGESTS = [f"a@sha256:{text}" for text in ("", "0" * 11, "0" * 65, "A" * 12, "g" * 12, "0" * 12 + "\n")]
BAD_DIGESTS += ["a@sha512:" + "0" * 12, "a@sha256" + "0" * 12, "a@SHA256:" + "0" * 12]


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "9", "x" * 128])
def test_good_names(name: str) -> None:
    assert check_name(name) == name
    assert parse_reference(name) == Reference(name)
    assert parse_reference(f"{name}@12") == Reference(name, version=12)
    digest = "0123456789ab" + "f" * 52
    for some in (digest, digest[:12]):
        assert parse_reference(f"{name}@sha256:{some}") == Reference(name, digest=some)


@pytest.mark.parametrize("name", BAD)
def test_bad_names(name: str) -> None:
    with pytest.raises(AdapterNameInvalid) as refusal:
        check_name(name)
    assert refusal.value.param == "name"
    assert len(refusal.value.message) < 500


@pytest.mark.parametrize(
    "reference", ["a@", "a@0", "a@-1", "a@x", "a@1\n", "a@1@2", "a@٣", "@1", "a@" + "9" * 10, *BAD_DIGESTS]
)
def test_bad_references(reference: str) -> None:
    with pytest.raises(AdapterNameInvalid):
        parse_reference(reference)
