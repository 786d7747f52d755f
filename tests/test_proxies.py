from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from django.test import override_settings
from hypothesis import given
from hypothesis import strategies as st
from tornado.httputil import HTTPHeaders

from tests.serving import serving
from tornjango.application import Application
from tornjango.conf import Config
from tornjango.exceptions import ConfigurationError
from tornjango.proxies import Origin, Proxies
from tornjango.server import Server
from tornjango.testing import RawClient

TRUSTED = ["10.0.0.0/8", "2001:db8::/32", "192.0.2.1"]
PEER = "10.0.0.1"


def told(headers: list[tuple[str, str]], *, peer: str = PEER, kind: str = "x-forwarded") -> Any:
    return Proxies(TRUSTED, kind).origin(peer, _lines(headers))


def _lines(pairs: list[tuple[str, str]]) -> HTTPHeaders:
    headers = HTTPHeaders()
    for name, value in pairs:
        headers.add(name, value.strip(" \t"))
    return headers


# Who is trusted


@pytest.mark.parametrize(
    ("peer", "trusted"),
    [
        ("10.255.0.1", True),
        ("11.0.0.1", False),
        ("192.0.2.1", True),
        ("192.0.2.2", False),
        ("::ffff:10.0.0.1", True),
        ("2001:db8::1", True),
        ("2001:db9::1", False),
        ("fe80::1%eth0", False),
        ("", False),
        ("unix", False),
        ("10.0.0.1.evil.example", False),
    ],
)
def test_a_peer_is_trusted_by_its_address(peer: str, trusted: bool) -> None:
    origin = told([("X-Forwarded-Proto", "https")], peer=peer)
    assert origin == (Origin(scheme="https") if trusted else None)


def test_a_unix_socket_is_trusted_by_its_name() -> None:
    headers = _lines([("X-Forwarded-For", "1.2.3.4")])
    assert Proxies(["unix"]).origin("", headers, unix=True) == Origin(client="1.2.3.4")
    assert Proxies(["unix"]).origin("127.0.0.1", headers) is None
    assert Proxies(["127.0.0.1"]).origin("127.0.0.1", headers, unix=True) is None


@pytest.mark.parametrize(
    "trusted", [["10.0.0.1/8"], ["proxy.example"], [""], ["*"], [1], ["10.0.0.0/33"], "10.0.0.1"]
)
def test_what_is_no_network_is_told_of_when_the_settings_are_read(trusted: Any) -> None:
    with pytest.raises(ConfigurationError, match="TRUSTED_PROXIES"):
        Config.from_dict({"TRUSTED_PROXIES": trusted})


def test_the_settings_take_addresses_networks_and_unix() -> None:
    trusted = ["127.0.0.1", "::1", "10.0.0.0/8", "unix"]
    config = Config.from_dict({"TRUSTED_PROXIES": trusted})
    assert trusted == config.TRUSTED_PROXIES


# X-Forwarded-*


@pytest.mark.parametrize(
    ("lines", "client"),
    [
        (["1.2.3.4"], "1.2.3.4"),
        (["6.6.6.6, 1.2.3.4"], "1.2.3.4"),
        (["6.6.6.6, 1.2.3.4, 10.0.0.2"], "1.2.3.4"),
        (["6.6.6.6", "1.2.3.4"], "1.2.3.4"),
        (["1.2.3.4", "10.0.0.2"], "1.2.3.4"),
        (["10.0.0.9,10.0.0.2"], "10.0.0.9"),
        (["1.2.3.4:5678"], "1.2.3.4"),
        (["[2001:DB9::1]:5678"], "2001:db9::1"),
        (["[2001:db9::1]"], "2001:db9::1"),
        (["2001:db9::1"], "2001:db9::1"),
        (["::ffff:1.2.3.4, ::ffff:10.0.0.2"], "1.2.3.4"),
        ([" \t1.2.3.4 , , "], "1.2.3.4"),
        # What cannot be read says nothing; what is left of an address that is not trusted is not looked at.
        (["<script>, 1.2.3.4"], "1.2.3.4"),
        (["1.2.3.4, unknown"], None),
        (["1.2.3.4, _hidden, 10.0.0.2"], None),
        (["fe80::1%<script>"], None),
        (["1.2.3.4:"], None),
        (["1.2.3"], None),
        (["1.2.3.4 5.6.7.8"], None),
        (["\xb9.2.3.4"], None),
        ([""], None),
        ([","], None),
        ([], None),
    ],
)
def test_the_client_is_the_last_who_is_no_proxy(lines: list[str], client: str | None) -> None:
    assert told([("X-Forwarded-For", line) for line in lines]).client == client


@pytest.mark.parametrize(
    ("values", "scheme"),
    [
        (["https"], "https"),
        (["HTTPS"], "https"),
        (["http"], "http"),
        (["wss"], "https"),
        (["http, https"], "https"),
        (["https", "http"], "http"),
        (["gopher"], None),
        (["https;"], None),
        ([""], None),
    ],
)
def test_the_scheme_is_the_nearest_proxys_word(values: list[str], scheme: str | None) -> None:
    assert told([("X-Forwarded-Proto", value) for value in values]).scheme == scheme


@pytest.mark.parametrize(
    ("value", "port"),
    [
        *(("443", "443"), ("80, 8443", "8443"), ("0", "0"), ("65536", None), ("-1", None)),
        *(("44\xb3", None), ("443x", None), ("9" * 5000, None)),
    ],
)
def test_the_port_is_a_number(value: str, port: str | None) -> None:
    assert told([("X-Forwarded-Port", value)]).port == port


def test_the_host_is_the_nearest_proxys_word() -> None:
    headers = [("X-Forwarded-Host", "evil.example, shop.example:8443")]
    assert told(headers).host == "shop.example:8443"


# Forwarded


@pytest.mark.parametrize(
    ("lines", "origin"),
    [
        (["for=1.2.3.4"], Origin("1.2.3.4")),
        (['For="1.2.3.4:5678"'], Origin("1.2.3.4")),
        (["for=1.2.3.4;proto=https;host=shop.example"], Origin("1.2.3.4", "https", "shop.example")),
        (['for="[2001:DB9::17]:4711";proto=http'], Origin("2001:db9::17", "http")),
        (['for="[2001:db9::17]:_port"'], Origin("2001:db9::17")),
        (["for=6.6.6.6;proto=http, for=1.2.3.4;proto=https"], Origin("1.2.3.4", "https")),
        (
            ["for=6.6.6.6;host=evil.example", "for=1.2.3.4;proto=https, for=10.0.0.2;proto=http"],
            Origin("1.2.3.4", "https"),
        ),
        (["for=10.0.0.9;proto=https"], Origin("10.0.0.9", "https")),
        (["for=_hidden;proto=https, for=10.0.0.2"], Origin(None, "https")),
        (["for=1.2.3.4, for=unknown;host=shop.example"], Origin(None, None, "shop.example")),
        (["proto=https;by=_me"], Origin(None, "https")),
        (['for=1.2.3.4 ; host="a\\"b" ;; proto=https;'], Origin("1.2.3.4", "https", 'a"b')),
        (['for=1.2.3.4;host="a\\\\b"'], Origin("1.2.3.4", None, "a\\b")),
        # What cannot be read says nothing; what is left of a client's own element is not looked at.
        (['for="6.6.6.6, for=1.2.3.4'], Origin("1.2.3.4")),
        (['for="6.6.6.6', "for=1.2.3.4"], Origin("1.2.3.4")),
        (['"""=;,,, for=1.2.3.4'], Origin("1.2.3.4")),
        (['for=1.2.3.4;host="a, for=6.6.6.6"'], Origin()),
        (["for=1.2.3.4;for=6.6.6.6"], Origin()),
        (["for=1.2.3.4 proto=https"], Origin()),
        (["for = 1.2.3.4"], Origin()),
        (["for=[2001:db9::17]"], Origin()),
        (["1.2.3.4"], Origin()),
        (['for="1.2.3.4'], Origin()),
        ([""], Origin()),
        ([], Origin()),
    ],
)
def test_forwarded_is_read_as_far_as_trust_reaches(lines: list[str], origin: Origin) -> None:
    assert told([("Forwarded", line) for line in lines], kind="forwarded") == origin


@pytest.mark.parametrize("kind", ["x-forwarded", "forwarded"])
def test_the_other_headers_say_nothing(kind: str) -> None:
    headers = (
        [("X-Forwarded-For", "1.2.3.4")] if kind == "forwarded" else [("Forwarded", "for=1.2.3.4")]
    )
    assert told(headers, kind=kind) == Origin()


@given(st.text(st.sampled_from('for=";,\\ []:.1_a%\t'), max_size=60))
def test_whatever_a_client_sends_a_proxys_word_stands(garbage: str) -> None:
    headers = [
        ("Forwarded", f"{garbage}, for=1.2.3.4;proto=https"),
        ("X-Forwarded-For", f"{garbage}, 1.2.3.4"),
    ]
    assert told(headers, kind="forwarded") == Origin("1.2.3.4", "https")
    assert told(headers).client == "1.2.3.4"


@given(st.text(st.sampled_from('for=";,\\ []:.1_a%\t'), max_size=60))
def test_a_client_is_an_address_or_not_known(value: str) -> None:
    for kind, name in (("forwarded", "Forwarded"), ("x-forwarded", "X-Forwarded-For")):
        client = told([(name, value)], kind=kind).client
        assert client is None or ipaddress.ip_address(client)


# Through the server


FORWARDED = [
    ("X-Forwarded-For", "1.2.3.4"),
    ("X-Forwarded-Proto", "https"),
    ("X-Forwarded-Host", "localhost:8443"),
    ("X-Forwarded-Port", "8443"),
]


@pytest.mark.gen_test
async def test_a_trusted_proxys_word_is_djangos_view_of_a_request() -> None:
    async with serving(TORNJANGO={"TRUSTED_PROXIES": ["127.0.0.1"]}) as site:
        known = json.loads((await site.request("/whole/", headers=FORWARDED)).body)
    assert (known["scheme"], known["host"]) == ("https", "localhost:8443")
    meta = known["META"]
    assert (meta["REMOTE_ADDR"], meta["REMOTE_HOST"]) == ("1.2.3.4", "1.2.3.4")
    assert (meta["SERVER_PORT"], meta["wsgi.url_scheme"]) == ("8443", "https")
    assert meta["HTTP_X_FORWARDED_FOR"] == "1.2.3.4"


@pytest.mark.parametrize("trusted", [[], ["10.0.0.0/8"]])
@pytest.mark.gen_test
async def test_others_change_nothing_but_are_seen(trusted: list[str]) -> None:
    async with serving(TORNJANGO={"TRUSTED_PROXIES": trusted}) as site:
        known = json.loads((await site.request("/whole/", headers=FORWARDED)).body)
    assert (known["scheme"], known["host"]) == ("http", "localhost")
    meta = known["META"]
    assert (meta["REMOTE_ADDR"], meta["SERVER_PORT"]) == ("127.0.0.1", str(site.port))
    assert {meta[f"HTTP_X_FORWARDED_{name}"] for name in ("FOR", "PROTO", "HOST", "PORT")} == {
        value for _, value in FORWARDED
    }


@pytest.mark.gen_test
async def test_a_proxys_host_that_cannot_be_one_is_ignored() -> None:
    headers = [("X-Forwarded-Host", "evil example/"), ("X-Forwarded-For", "1.2.3.4")]
    async with serving(TORNJANGO={"TRUSTED_PROXIES": ["127.0.0.1"]}) as site:
        known = json.loads((await site.request("/whole/", headers=headers)).body)
    assert (known["host"], known["META"]["REMOTE_ADDR"]) == ("localhost", "1.2.3.4")


@pytest.mark.gen_test
async def test_forwarded_is_read_where_the_settings_say_so() -> None:
    options = {"TRUSTED_PROXIES": ["127.0.0.1"], "PROXY_HEADERS": "forwarded"}
    headers = [("Forwarded", 'for="[2001:db8::1]:99";proto=https;host=localhost'), *FORWARDED[:1]]
    async with serving(TORNJANGO=options) as site:
        known = json.loads((await site.request("/whole/", headers=headers)).body)
    assert (known["scheme"], known["META"]["REMOTE_ADDR"]) == ("https", "2001:db8::1")


@pytest.mark.parametrize(("trusted", "client"), [(["unix"], "1.2.3.4"), (["127.0.0.1"], "")])
@pytest.mark.gen_test
async def test_whoever_connects_to_a_unix_socket_can_be_trusted(
    trusted: list[str], client: str, tmp_path: Path
) -> None:
    with (
        override_settings(ROOT_URLCONF="tests.http_views", TORNJANGO={"TRUSTED_PROXIES": trusted}),
        socket.socket(socket.AF_UNIX) as listener,
    ):
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        server = Server(Application(), [listener])
        serving = asyncio.create_task(server.serve())
        async with RawClient(*await asyncio.open_unix_connection(tmp_path / "socket")) as raw:
            known = json.loads((await raw.request("/whole/", headers=FORWARDED)).body)
        server.stop()
        await serving
    assert known["META"]["REMOTE_ADDR"] == client
    assert known["scheme"] == ("https" if client else "http")
