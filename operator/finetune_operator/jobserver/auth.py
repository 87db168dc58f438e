"""Who is asking: a projected service account token with our audience, verified against the cluster's published keys.

No TokenReview: it is cluster-scoped and costs the API server a write for each check. What a signature cannot say, that the pod still
exists, is known from the cache: the token names the pod's uid, which is never given twice.

An agent shows one token for most of an hour, every few seconds. What has been verified is remembered by its digest until it expires, or the
keys are read anew: to verify it (0.2 ms) takes longer than the rest of an answer.
"""

import asyncio
import hashlib
import time
from dataclasses import dataclass
from typing import Any

import jwt

from finetune_api.contract import TOKEN_AUDIENCE
from finetune_operator.kube.api import KubeApi
from finetune_operator.kube.errors import KubeError

JWKS_PATH = "/openid/v1/jwks"
DISCOVERY_PATH = "/.well-known/openid-configuration"
ALGORITHMS = ["RS256", "ES256"]
REFRESH_SECONDS = 10.0  # unknown key ids cause no more than one fetch in this time
TOKENS_AT_HAND = 16384
RETRY_SECONDS = 1.0  # and no more than one in this time after a fetch that failed
LEEWAY_SECONDS = 60.0  # by which our clock may be off: as much as the API server itself allows tokens


class Unauthorized(Exception):
    """The request carries no token that we accept. The message says why, and never quotes the token."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The pod that a token was made for."""

    namespace: str
    pod_name: str
    pod_uid: str


class TokenVerifier:
    """Verifies tokens without asking the API server, but for its keys."""

    def __init__(self, api: KubeApi) -> None:
        self._api = api
        self._keys: dict[str, jwt.PyJWK] = {}
        self._issuer = ""
        self._next_fetch = float("-inf")
        self._failure: KubeError | None = None
        self._lock = asyncio.Lock()
        self._verified: dict[bytes, tuple[Caller, float]] = {}  # by digest: whose, and until when; the oldest first

    async def verify(self, authorization: str | None) -> Caller:
        """Return whose token an ``Authorization`` header carries.

        Raises:
            Unauthorized: there is none, or it is forged, expired, or made for somebody else.
            KubeError: the cluster's keys cannot be read, so nobody can tell.
        """
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthorized("a bearer token is required")
        digest = hashlib.sha256(token.encode()).digest()
        caller, expires = self._verified.get(digest, (None, 0.0))
        if caller is not None and time.time() < expires:
            return caller
        claims = await self._claims(token)
        caller = _caller(claims)
        self._verified[digest] = caller, float(claims["exp"])
        while len(self._verified) > TOKENS_AT_HAND:
            del self._verified[next(iter(self._verified))]
        return caller

    async def _claims(self, token: str) -> dict[str, Any]:
        try:
            key = await self._key(jwt.get_unverified_header(token).get("kid", ""))
            claims: dict[str, Any] = jwt.decode(
                token,
                key=key,
                algorithms=[key.algorithm_name],  # the key's own: what the token says of it is not believed
                audience=TOKEN_AUDIENCE,
                issuer=self._issuer,
                leeway=LEEWAY_SECONDS,
                options={"require": ["exp", "iss", "aud"]},
            )
        except jwt.PyJWTError as error:
            raise Unauthorized(f"the token is not accepted: {error}") from error
        return claims

    async def _key(self, kid: str) -> jwt.PyJWK:
        async with self._lock:
            if kid not in self._keys and asyncio.get_running_loop().time() >= self._next_fetch:
                await self._fetch()
        if kid in self._keys:
            return self._keys[kid]
        if self._failure is not None:
            raise self._failure
        raise Unauthorized("the token is signed by no key of this cluster")

    async def _fetch(self) -> None:
        now = asyncio.get_running_loop().time()
        try:
            keys = jwt.PyJWKSet.from_dict(await self._api.read(JWKS_PATH)).keys
            issuer = (await self._api.read(DISCOVERY_PATH))["issuer"]
        except KubeError as error:
            self._failure, self._next_fetch = error, now + RETRY_SECONDS
        else:
            self._keys = {key.key_id or "": key for key in keys if key.algorithm_name in ALGORITHMS}
            self._verified.clear()
            self._issuer, self._failure, self._next_fetch = issuer, None, now + REFRESH_SECONDS


def _caller(claims: dict[str, Any]) -> Caller:
    bound = claims.get("kubernetes.io", {})
    pod = bound.get("pod", {})
    if not pod.get("uid") or not bound.get("namespace"):
        raise Unauthorized("the token is bound to no pod")
    return Caller(namespace=bound["namespace"], pod_name=pod.get("name", ""), pod_uid=pod["uid"])
