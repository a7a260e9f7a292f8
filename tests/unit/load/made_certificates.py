"""Certificates for tests: an authority of one's own, and what it vouches for."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

__all__ = ["Authority", "Certified", "server_context"]

_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Certified:
    """Files of a certificate and its key, in PEM."""

    certificate: Path
    key: Path


class Authority:
    """Vouches for others.

    Args:
        folder: Where to write files.
        name: Of the authority.

    Attributes:
        file: Its certificate.
    """

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        self._name = name
        self._key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._signed(name, self._key, ()).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        self._certificate = certificate.sign(self._key, hashes.SHA256())
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def certify(self, name: str, *, address: str = "127.0.0.1", password: bytes = b"") -> Certified:
        """Return a certificate for a name and an address, with a key that a password may keep."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = (x509.IPAddress(ipaddress.ip_address(address)),)
        signed = self._signed(name, key, names).sign(self._key, hashes.SHA256())
        made = Certified(self._folder / f"{self._name}-{name}.pem", self._folder / f"{self._name}-{name}.key")
        made.certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        hidden = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
        text = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden)
        made.key.write_bytes(text)
        return made

    def _signed(
        self, name: str, key: ec.EllipticCurvePrivateKey, names: tuple[x509.GeneralName, ...]
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        subject, issuer = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, one)]) for one in (name, self._name))
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _DAY)
            .not_valid_after(now + _DAY)
        )
        return builder.add_extension(x509.SubjectAlternativeName(names), critical=False) if names else builder


def server_context(own: Certified, trusted: Path | None = None) -> ssl.SSLContext:
    """Return what a server takes TLS connections with; with a file of authorities, clients have to prove who they are."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own.certificate, own.key)
    if trusted is not None:
        context.load_verify_locations(trusted)
        context.verify_mode = ssl.CERT_REQUIRED
    return context
