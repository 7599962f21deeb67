from __future__ import annotations

import ipaddress

import pytest

from onebase.adapters.errors import AdapterRejected, SourceFailed
from onebase.adapters.sources.addresses import addresses_of, is_public
from onebase.adapters.sources.location import Url


@pytest.mark.parametrize("text", ["8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses(text: str) -> None:
    assert is_public(ipaddress.ip_address(text))


@pytest.mark.parametrize(
    "text",
    [
        "0.0.0.0",
        "10.1.2.3",
        "100.64.0.1",
        "127.0.0.1",
        "169.254.169.254",
        "172.16.0.1",
        "192.0.2.1",
        "192.168.0.1",
        "198.18.0.1",
        "224.0.0.1",
        "224.0.1.1",
        "239.1.1.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",
        "::8.8.8.8",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "::ffff:0:127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::808:808",
        "2001:0:53aa:64c:0:0:80ff:fffe",
        "2001:db8::1",
        "2002:7f00:1::",
        "2002:808:808::",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fec0::1",
        "ff02::1",
        "ff0e::1",
    ],
)
def test_addresses_that_nobody_is_sent_to(text: str) -> None:
    assert not is_public(ipaddress.ip_address(text))


def test_one_private_address_among_public_ones_refuses_the_host() -> None:
    url = Url.parse("https://example.com/a")
    with pytest.raises(AdapterRejected, match="public internet") as refusal:
        addresses_of(url, lambda host, port: ["8.8.8.8", "169.254.169.254"], named=False)
    assert refusal.value.param == "source"
    found = addresses_of(url, lambda host, port: ["8.8.8.8", "8.8.4.4", "8.8.8.8"], named=False)
    assert [str(address) for address in found] == ["8.8.8.8", "8.8.4.4"]


def test_a_literal_private_address_needs_an_entry_that_names_it() -> None:
    url = Url.parse("https://10.0.0.7/a")
    assert [str(found) for found in addresses_of(url, _never, named=True)] == ["10.0.0.7"]
    with pytest.raises(AdapterRejected):
        addresses_of(url, _never, named=False)


def test_localhost_is_this_machine_or_nothing() -> None:
    url = Url.parse("http://localhost/a")
    assert addresses_of(url, lambda host, port: ["::1", "127.0.0.1"], named=True)
    with pytest.raises(AdapterRejected):
        addresses_of(url, lambda host, port: ["127.0.0.1", "10.0.0.1"], named=True)


@pytest.mark.parametrize("answer", [[], ["not an address"]])
def test_look_ups_that_say_nothing(answer: list[str]) -> None:
    with pytest.raises(SourceFailed):
        addresses_of(Url.parse("https://example.com/a"), lambda host, port: answer, named=False)


def _never(host: str, port: int) -> list[str]:
    raise AssertionError("an address is not looked up")
