"""How a server lets somebody in: whom it is trusted to be, a certificate of one's own, headers with a token.

Secrets are here alone: what is kept of a load names headers and never says what they hold.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from narrowcast.errors import DataError, UserError

__all__ = ["Access", "read_access"]

#: What RFC 9110, section 5.6.2, allows in a name, and section 5.5 in a value; the latter without what is not ASCII.
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\x21-\x7e]([\t\x20-\x7e]*[\x21-\x7e])?")
#: Headers that the client writes itself, because requests could not be understood otherwise.
_OWN = frozenset(
    {
        *("connection", "content-encoding", "content-length", "content-type", "expect"),
        *("inference-header-content-length", "te", "trailer", "transfer-encoding", "upgrade"),
    }
)
_HIDDEN = "***"
#: Characters of a secret at the least; what is shorter may be any word.
_SECRET = 6


@dataclass(frozen=True)
class Access:
    """What is needed to be let in.

    Attributes:
        headers: Names and values, sent with every request; with gRPC they are metadata.
        authorities: File with the certificates that may vouch for the server; empty for those of the system.
        certificate: File with a certificate of one's own, and those that vouch for it; empty for none.
        key: File with its private key; empty where it is in the same file.
        checked: Whether the server has to prove who it is.
    """

    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    authorities: str = ""
    certificate: str = ""
    key: str = ""
    checked: bool = True

    @classmethod
    def of(cls, document: dict[str, Any]) -> Access:
        """Return the access that `document` has described."""
        fields: dict[str, Any] = document | {"headers": tuple((name, value) for name, value in document["headers"])}
        return cls(**fields)

    def document(self) -> dict[str, Any]:
        """Return it in the types of JSON, secrets included, for another process."""
        return asdict(self)

    def hide(self, text: str) -> str:
        """Return a text without the secrets, should a server repeat them."""
        for _, value in self.headers:
            for secret in {value, value.rpartition(" ")[2]}:  # a token is also known without the word "Bearer"
                if len(secret) >= _SECRET:
                    text = text.replace(secret, _HIDDEN)
        return text

    @property
    def host(self) -> str:
        """What the server is called in requests; empty where nothing is said, so that it is called by its address."""
        return next((value for name, value in self.headers if name.lower() == "host"), "")

    @property
    def others(self) -> tuple[tuple[str, str], ...]:
        """The headers without the one that names the server."""
        return tuple((name, value) for name, value in self.headers if name.lower() != "host")

    def context(self) -> ssl.SSLContext:
        """Return what TLS connections are made with.

        Raises:
            DataError: A file holds no certificate, or no key.
        """
        try:
            context = ssl.create_default_context(cafile=self.authorities or None)
        except (OSError, ValueError) as error:
            raise _unreadable(self.authorities, error, "certificates in PEM") from error
        if not self.checked:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.certificate:
            try:
                context.load_cert_chain(self.certificate, self.key or None, password=_no_password)
            except (OSError, ValueError) as error:
                raise _unreadable(
                    self.key or self.certificate, error, "a certificate and its own key in PEM, the key not encrypted"
                ) from error
        return context

    def words(self) -> str:
        """Return who vouches for the server, for people."""
        who = "the system's authorities" if not self.authorities else Path(self.authorities).name
        proof = f"TLS, certificate checked against {who}" if self.checked else "TLS, certificate NOT checked"
        return proof + (", with a certificate of one's own" if self.certificate else "")


def read_access(
    headers: Sequence[str], *, authorities: Path | None, certificate: Path | None, key: Path | None, insecure: bool
) -> Access:
    """Return the access that options describe.

    Args:
        headers: ``NAME: VALUE`` each, or ``@FILE`` for a file with one a line.
        authorities: File with certificates.
        certificate: File with a certificate of one's own.
        key: File with its key.
        insecure: Whether the server need not prove who it is.

    Raises:
        UserError: Options contradict each other, or a header cannot be sent.
        DataError: A file cannot be read.
    """
    if insecure and authorities is not None:
        raise UserError("--insecure and --cacert contradict each other", next_step="leave one out")
    if key is not None and certificate is None:
        raise UserError("--key says nothing without --cert", next_step="name the certificate too: --cert FILE")
    named = tuple(_header(line) for text in headers for line in _lines(text))
    names = [name.lower() for name, _ in named]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"header {name!r} is given twice", next_step="leave one out")
    access = Access(
        headers=named,
        authorities=str(authorities or ""),
        certificate=str(certificate or ""),
        key=str(key or ""),
        checked=not insecure,
    )
    access.context()  # for its complaints
    return access


def _lines(text: str) -> list[str]:
    if not text.startswith("@"):
        return [text]
    try:
        lines = Path(text[1:]).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise DataError(
            f"headers {text} cannot be read: {why}", allowed="a file with NAME: VALUE on each line"
        ) from error
    return [line for line in lines if line.strip()]


def _header(text: str) -> tuple[str, str]:
    """Return name and value; an error does not repeat the value, which may be secret."""
    name, colon, value = text.partition(":")
    value = value.strip()
    if not colon or not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
        known = f" {name!r}" if colon and _NAME.fullmatch(name) else ""
        raise UserError(
            f"header{known} cannot be sent", allowed='"NAME: VALUE" in printable ASCII, or @FILE with one a line'
        )
    if name.lower() in _OWN or name.lower().startswith("grpc-"):
        raise UserError(f"header {name!r} is written by the client itself", next_step="leave it out")
    return name, value


def _no_password() -> str:
    """Refuse to ask for the password of a key: nobody may be there to answer."""
    raise ValueError("its key is encrypted")


def _unreadable(file: str, error: Exception, allowed: str) -> DataError:
    if isinstance(error, ssl.SSLError):  # it names a line of OpenSSL
        why = "it is something else"
    else:
        why = (error.strerror if isinstance(error, OSError) else "") or str(error)
    return DataError(f"{file} cannot be used: {why}", allowed=allowed)
