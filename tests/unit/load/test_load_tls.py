"""Servers that have to prove who they are, and that want proof of who asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from fake_oip_server import FakeServer, Plan
from made_certificates import Authority, Certified, server_context
from planted_grpc import Planted, serving

from narrowcast.errors import DataError, UserError
from narrowcast.load.access import Access, read_access
from narrowcast.load.arrivals import Constant
from narrowcast.load.fleet import Options
from narrowcast.load.running import Subject
from narrowcast.load.session import Asked, Content, Measured, Session
from narrowcast.load.target import read_target

ASKED = Asked(seconds=0.5, warmup=0.0, lateness=60.0)
PROTOCOLS = ["https", "grpcs"]
HEADERS = (("Authorization", "Bearer secret-token"), ("Host", "model.example.com"), ("X-Tenant", "blue"))


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@contextmanager
def secured(protocol: str, own: Certified, trusted: Path | None = None) -> Iterator[str]:
    """Serve over TLS, and yield the URL."""
    if protocol == "https":
        with FakeServer(tls=server_context(own, trusted)) as server:
            yield server.url
        return
    pair = (own.key.read_bytes(), own.certificate.read_bytes())
    roots = None if trusted is None else trusted.read_bytes()
    credentials = grpc.ssl_server_credentials([pair], roots, require_client_auth=trusted is not None)
    with serving(Planted(), credentials) as url:
        yield url


def load(url: str, access: Access) -> Measured:
    with Session(read_target(url, access), "fake", "", Content(), Options(timeout=5.0)) as session:
        return session.open_loop(Constant(40.0), ASKED, lambda progress: False)


def all_answered(measured: Measured) -> bool:
    return measured.run.counts.ok == measured.run.counts.due == 20


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_server_whose_authority_is_named_is_loaded(protocol: str, authority: Authority) -> None:
    with secured(protocol, authority.certify("server")) as url:
        assert all_answered(load(url, Access(authorities=str(authority.file))))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_authorities_of_the_system_are_those_of_both_protocols(
    protocol: str, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    with secured(protocol, authority.certify("server")) as url:
        assert all_answered(load(url, Access()))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_server_that_nobody_vouches_for_is_refused(protocol: str, authority: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "stranger")
    with secured(protocol, stranger.certify("server")) as url, pytest.raises(UserError, match="cannot prove who it is"):
        load(url, Access(authorities=str(authority.file)))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_certificate_for_somebody_else_is_refused(protocol: str, authority: Authority) -> None:
    other = authority.certify("server", address="192.0.2.1")
    with secured(protocol, other) as url, pytest.raises(UserError, match="mismatch"):
        load(url, Access(authorities=str(authority.file)))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("address", ["127.0.0.1", "192.0.2.1"])
def test_without_proof_any_server_is_loaded(protocol: str, address: str, authority: Authority) -> None:
    with secured(protocol, authority.certify("server", address=address)) as url:
        assert all_answered(load(url, Access(checked=False)))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("checked", [True, False])
def test_a_server_may_want_a_certificate(protocol: str, checked: bool, authority: Authority) -> None:
    own = authority.certify("client")
    roots = str(authority.file) if checked else ""
    with secured(protocol, authority.certify("server"), authority.file) as url:
        shown = Access(authorities=roots, certificate=str(own.certificate), key=str(own.key), checked=checked)
        assert all_answered(load(url, shown))
        with pytest.raises(UserError, match="to know who asks"):
            load(url, Access(authorities=roots, checked=checked))


@pytest.mark.parametrize(("secure", "plain"), [("https", "http"), ("grpcs", "grpc")])
def test_a_server_without_tls_is_said(secure: str, plain: str, authority: Authority) -> None:
    with FakeServer() as server:
        url = server.url.replace("http", secure)
        with pytest.raises(UserError, match=f"no TLS connection(?s:.*){plain}://"):
            load(url, Access())
    with secured("https", authority.certify("server")) as url, pytest.raises(UserError, match="check scheme"):
        load(url.replace("https", "http"), Access())


def test_what_speaks_no_grpc_over_tls_is_said(authority: Authority) -> None:
    with (
        secured("https", authority.certify("server")) as url,
        pytest.raises(UserError, match="does not speak gRPC"),
    ):
        load(url.replace("https", "grpcs"), Access(authorities=str(authority.file)))


@pytest.mark.parametrize("broken", ["absent", "text", "password", "foreign"])
def test_files_without_what_they_should_hold_are_named(broken: str, authority: Authority, tmp_path: Path) -> None:
    own = authority.certify("client", password=b"secret" if broken == "password" else b"")
    given = {"authorities": authority.file, "certificate": own.certificate, "key": own.key}
    if broken == "absent":
        given["authorities"] = tmp_path / "absent.pem"
    if broken == "text":
        given["authorities"] = tmp_path / "text.pem"
        given["authorities"].write_text("no certificate")
    if broken == "foreign":
        given["key"] = authority.certify("other").key
    with pytest.raises(DataError, match="cannot be used"):
        read_access((), **given, insecure=False)


# Headers --------------------------------------------------------------------------------------------------------------


def test_headers_go_with_every_request(authority: Authority) -> None:
    with FakeServer(Plan(token="Bearer secret-token")) as server:
        assert all_answered(load(server.url, Access(headers=HEADERS)))
        assert len(server.heads) > 20
        for head in server.heads:
            assert (head["host"], head["x-tenant"]) == ("model.example.com", "blue")
    planted = Planted()
    with serving(planted) as url:
        assert all_answered(load(url, Access(headers=HEADERS)))
    assert {(head["authorization"], head["x-tenant"]) for head in planted.heads} == {("Bearer secret-token", "blue")}


def test_who_is_not_let_in_is_told_how() -> None:
    with FakeServer(Plan(token="Bearer other")) as server, pytest.raises(UserError, match="lets nobody in") as caught:
        load(server.url, Access(headers=HEADERS))
    assert "secret" not in str(caught.value)


def test_secrets_are_not_in_texts_about_them(tmp_path: Path) -> None:
    access = Access(headers=HEADERS)
    assert "secret" not in repr(Subject(read_target("http://127.0.0.1:1", access), "m"))
    assert access.hide("no such token: secret-token; blue") == "no such token: ***; blue"
    file = tmp_path / "headers"
    file.write_text("Authorization: Bearer secret-token\n\nX-Tenant:blue\n")
    read = read_access([f"@{file}"], authorities=None, certificate=None, key=None, insecure=False)
    assert read.headers == (HEADERS[0], HEADERS[2])


@pytest.mark.parametrize(
    "header",
    [
        "Authorization Bearer secret",
        "Authorization:",
        "Authorization: secret\r\nX: y",
        "Author ization: secret",
        "X: sécret",
        "Content-Length: 5",
        "transfer-encoding: chunked",
        "grpc-timeout: 1S",
        "@absent",
    ],
    ids=["colon", "empty", "break", "space", "letter", "length", "chunks", "grpc", "file"],
)
def test_headers_that_cannot_be_sent_are_refused_without_repeating_them(header: str) -> None:
    with pytest.raises(UserError) as caught:
        read_access([header], authorities=None, certificate=None, key=None, insecure=False)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "access", "said"),
    [
        ("http://127.0.0.1:1", Access(checked=False), "without TLS"),
        ("grpc://127.0.0.1:1", Access(certificate="own.pem"), "without TLS"),
        ("https://user:secret@127.0.0.1:1", Access(), "together with a password"),
        ("grpc://127.0.0.1:1/path", Access(), "named with a path"),
        ("grpc://127.0.0.1:1", Access(headers=(("key-bin", "AA"),)), "cannot be sent over gRPC"),
    ],
)
def test_urls_and_access_that_do_not_fit_are_refused(url: str, access: Access, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        read_target(url, access)
    assert "secret" not in str(caught.value)
