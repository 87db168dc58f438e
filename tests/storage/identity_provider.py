"""An OIDC issuer on loopback, as a cluster's API server is one: it signs tokens for service accounts and publishes its key.

The object store's STS fetches the key and gives temporary credentials for such a token (AssumeRoleWithWebIdentity).
"""

import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa

AUDIENCE = "sts.amazonaws.com"
SUBJECT = "system:serviceaccount:team-a:trainer"
ROLE = "arn:aws:iam::123456789012:role/trainer"
KEY_ID = "key-1"


@dataclass(frozen=True)
class Issuer:
    """Where the issuer listens, and what it signs with."""

    url: str
    key: rsa.RSAPrivateKey

    def token(self, subject: str = SUBJECT, *, seconds: float = 600) -> str:
        """Return a token that is valid for so long from now."""
        now = int(time.time())
        claims = {"iss": self.url, "sub": subject, "aud": AUDIENCE, "iat": now, "exp": now + int(seconds)}
        return jwt.encode(claims, self.key, "RS256", headers={"kid": KEY_ID})

    def roles(self, session_seconds: int) -> dict[str, Any]:
        """Return the configuration of an STS that gives whoever is ``SUBJECT`` a session of so long with all rights."""
        trust = {
            "Effect": "Allow",
            "Principal": {"Federated": "cluster"},
            "Action": ["sts:AssumeRoleWithWebIdentity"],
            "Condition": {"StringEquals": {"oidc:sub": SUBJECT}},
        }
        provider = {"issuer": self.url, "clientId": AUDIENCE, "jwksUri": f"{self.url}/keys"}
        allowed = {"Effect": "Allow", "Action": ["s3:*"], "Resource": ["*"]}
        return {
            "sts": {
                "tokenDuration": f"{session_seconds}s",
                "maxSessionLength": "12h",
                "issuer": "sts",
                "signingKey": base64.b64encode(b"a key of the tests, 32 characters").decode(),
            },
            "providers": [{"name": "cluster", "type": "oidc", "enabled": True, "config": provider}],
            "policy": {"defaultEffect": "Deny", "storeType": "memory"},
            "roles": [
                {
                    "roleName": ROLE.rpartition("/")[2],
                    "roleArn": ROLE,
                    "trustPolicy": {"Version": "2012-10-17", "Statement": [trust]},
                    "attachedPolicies": ["everything"],
                }
            ],
            "policies": [{"name": "everything", "document": {"Version": "2012-10-17", "Statement": [allowed]}}],
        }


@contextmanager
def running_issuer() -> Iterator[Issuer]:
    """Publish a new key until the block is left."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.issuer = Issuer(f"http://127.0.0.1:{server.server_port}", key)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.issuer
        finally:
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    issuer: Issuer


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        body = json.dumps(self.documents().get(self.path, {})).encode()
        self.send_response_only(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def documents(self) -> dict[str, Any]:
        issuer = self.server.issuer
        public = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(issuer.key.public_key()))
        return {
            "/.well-known/openid-configuration": {"issuer": issuer.url, "jwks_uri": f"{issuer.url}/keys"},
            "/keys": {"keys": [{**public, "kid": KEY_ID, "use": "sig", "alg": "RS256"}]},
        }

    def log_message(self, *arguments: object) -> None:
        pass
