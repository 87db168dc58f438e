"""Where the job server's certificates are kept: one Secret in the operator's own namespace."""

import base64
import ssl
import tempfile
from datetime import datetime
from pathlib import Path

from finetune_operator.jobserver.tls import Certificates, make_certificates, renewed
from finetune_operator.kube.api import SECRETS, KubeApi
from finetune_operator.kube.errors import Conflict, NotFound
from finetune_operator.kube_object import KubeObject
from finetune_operator.settings import Settings


async def load_certificates(
    api: KubeApi, settings: Settings, now: datetime, *, known: Certificates | None = None, may_write: bool = True
) -> Certificates:
    """Return the certificates of this installation, renewed in time; the first operator ever to ask makes them.

    Two may do so at once: each write is conditional, and whoever loses takes what the other has written. A Secret that was deleted is
    made again from what is ``known``, for the agents of running jobs trust no other authority.
    """
    name, namespace = f"{settings.service}-job-server", settings.namespace
    try:
        secret = await api.get(SECRETS, namespace, name)
    except NotFound:
        certificates = known or make_certificates(settings.job_server_host, now)
        if may_write:
            try:
                await api.create(SECRETS, namespace, certificates.as_secret(namespace, name))
            except Conflict:  # another replica was faster: its authority is the one
                return await load_certificates(api, settings, now)
        return certificates
    certificates = _from_secret(secret)
    fresh = renewed(certificates, settings.job_server_host, now) if may_write else certificates
    if fresh is not certificates:
        body = fresh.as_secret(namespace, name)
        body["metadata"]["resourceVersion"] = secret["metadata"]["resourceVersion"]
        try:
            await api.replace(SECRETS, namespace, body)
        except Conflict:  # another replica has renewed them
            return await load_certificates(api, settings, now)
    return fresh


def server_context(certificates: Certificates) -> ssl.SSLContext:
    """Return the TLS context of the server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    show(context, certificates)
    return context


def show(context: ssl.SSLContext, certificates: Certificates) -> None:
    """Show these to whoever connects from now on."""
    with tempfile.TemporaryDirectory() as folder:  # the ssl module reads keys from files only; mode 0700
        chain, key = Path(folder, "tls.crt"), Path(folder, "tls.key")
        chain.write_text(certificates.server)
        key.write_text(certificates.server_key)
        context.load_cert_chain(chain, key)


def _from_secret(secret: KubeObject) -> Certificates:
    data = {key: base64.b64decode(value).decode() for key, value in secret["data"].items()}
    return Certificates(
        authority=data["ca.crt"], authority_key=data["ca.key"], server=data["tls.crt"], server_key=data["tls.key"]
    )
