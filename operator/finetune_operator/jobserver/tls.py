"""The job server's own certificate authority: made at the first start, kept in a Secret beside the operator.

Agents trust the authority, not the certificate, so the certificate is renewed without their noticing. The Secret survives an uninstall of
the operator, so that running gangs still trust the next one.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from finetune_operator.kube_object import KubeObject

AUTHORITY_DAYS = 3650
SERVER_DAYS = 365
RENEW_BEFORE_DAYS = 120
_SKEW = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM texts: the authority that agents trust, and what the server shows."""

    authority: str
    authority_key: str
    server: str
    server_key: str

    def as_secret(self, namespace: str, name: str) -> KubeObject:
        """Return the Secret that keeps them."""
        return {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "namespace": namespace},
            "type": "Opaque",
            "stringData": {
                "ca.crt": self.authority,
                "ca.key": self.authority_key,
                "tls.crt": self.server,
                "tls.key": self.server_key,
            },
        }


def make_certificates(host: str, now: datetime) -> Certificates:
    """Make a new authority, and a certificate of it for ``host``."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "finetune-operator job server authority")])
    certificate = (
        _builder(name, name, key.public_key(), now, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_authority_usage(), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _with_server_certificate(certificate, key, host, now)


def renewed(certificates: Certificates, host: str, now: datetime) -> Certificates:
    """Return the certificates, with a new one for the server when the old one ends soon or names another host."""
    server = x509.load_pem_x509_certificate(certificates.server.encode())
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    fresh = server.not_valid_after_utc - now > timedelta(days=RENEW_BEFORE_DAYS)
    if fresh and host in names.get_values_for_type(x509.DNSName):
        return certificates
    authority = x509.load_pem_x509_certificate(certificates.authority.encode())
    key = serialization.load_pem_private_key(certificates.authority_key.encode(), password=None)
    return _with_server_certificate(authority, cast("ec.EllipticCurvePrivateKey", key), host, now)


def _with_server_certificate(
    authority: x509.Certificate, authority_key: ec.EllipticCurvePrivateKey, host: str, now: datetime
) -> Certificates:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "finetune-operator job server")])
    alternatives = [x509.DNSName(host), x509.DNSName(f"{host}.cluster.local")]
    certificate = (
        _builder(name, authority.subject, key.public_key(), now, SERVER_DAYS)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    return Certificates(
        authority=_certificate_pem(authority),
        authority_key=_key_pem(authority_key),
        server=_certificate_pem(certificate),
        server_key=_key_pem(key),
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now.astimezone(UTC) - _SKEW)
        .not_valid_after(now.astimezone(UTC) + timedelta(days=days))
    )


def _authority_usage() -> x509.KeyUsage:
    return x509.KeyUsage(
        key_cert_sign=True,
        crl_sign=True,
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _certificate_pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
