"""The cluster's own certificate authority, and what it signs: servers by address, people and programs by name and groups."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.process import run


@dataclass(frozen=True, slots=True)
class Authority:
    directory: Path

    @property
    def certificate(self) -> Path:
        return self.directory / "ca.crt"

    @property
    def key(self) -> Path:
        return self.directory / "ca.key"

    def create(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        run(
            [
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-days",
                "30",
                "-subj",
                "/CN=cluster-ca",
                "-keyout",
                str(self.key),
                "-out",
                str(self.certificate),
            ]
        )

    def issue(
        self, file: str, name: str, *, groups: Sequence[str] = (), addresses: Sequence[str] = ()
    ) -> tuple[Path, Path]:
        """A certificate and its key. To Kubernetes a client's common name is the user and its organisations are the groups."""
        key, request, certificate = (self.directory / f"{file}.{suffix}" for suffix in ("key", "csr", "crt"))
        subject = "".join(f"/O={group}" for group in groups) + f"/CN={name}"
        usage = "serverAuth" if addresses else "clientAuth"
        extensions = [f"extendedKeyUsage={usage}"] + ([f"subjectAltName={','.join(addresses)}"] if addresses else [])
        extension_file = self.directory / f"{file}.ext"
        extension_file.write_text("\n".join(extensions) + "\n")
        run(
            [
                "openssl",
                "req",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-subj",
                subject,
                "-keyout",
                str(key),
                "-out",
                str(request),
            ]
        )
        run(
            [
                "openssl",
                "x509",
                "-req",
                "-days",
                "30",
                "-in",
                str(request),
                "-CA",
                str(self.certificate),
                "-CAkey",
                str(self.key),
                "-set_serial",
                f"0x{os.urandom(16).hex()}",
                "-extfile",
                str(extension_file),
                "-out",
                str(certificate),
            ]
        )
        return certificate, key

    def service_account_keys(self) -> tuple[Path, Path]:
        """The pair that signs pods' tokens. RSA, as clusters have it: verifiers in the wild expect RS256."""
        private, public = self.directory / "service-accounts.key", self.directory / "service-accounts.pub"
        run(["openssl", "genrsa", "-out", str(private), "2048"])
        run(["openssl", "rsa", "-in", str(private), "-pubout", "-out", str(public)])
        return private, public
