"""The job server's certificates: made once, renewed without the agents' noticing, the same for all replicas."""

import ssl
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509

from finetune_operator.jobserver.certificate_store import load_certificates, server_context, show
from finetune_operator.jobserver.tls import Certificates, make_certificates, renewed
from finetune_operator.kube.api import SECRETS
from finetune_operator.kube.errors import Forbidden
from tests.operator.documents import NOON, settings
from tests.operator.fake_api import FakeKubeApi

HOST = "finetune-operator.finetune-system.svc"
SECRET = ("secrets", "finetune-system", "finetune-operator-job-server")


@pytest.fixture(scope="module")
def certificates() -> Certificates:
    return make_certificates(HOST, NOON)


def server_of(certificates: Certificates) -> x509.Certificate:
    return x509.load_pem_x509_certificate(certificates.server.encode())


def test_the_server_s_certificate_names_the_service_in_both_spellings(certificates: Certificates) -> None:
    names = server_of(certificates).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [HOST, f"{HOST}.cluster.local"]


def test_the_server_s_certificate_is_signed_by_the_authority_and_is_none_itself(certificates: Certificates) -> None:
    authority = x509.load_pem_x509_certificate(certificates.authority.encode())
    server_of(certificates).verify_directly_issued_by(authority)
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(
        ca=True, path_length=0
    )
    usage = server_of(certificates).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert [oid.dotted_string for oid in usage] == ["1.3.6.1.5.5.7.3.1"]


def test_certificates_are_valid_a_little_before_they_are_made(certificates: Certificates) -> None:
    """Clocks of nodes differ."""
    assert server_of(certificates).not_valid_before_utc == NOON - timedelta(minutes=10)


@pytest.mark.parametrize("flags", [0, ssl.VERIFY_X509_STRICT], ids=["leniently", "as strictly as Python 3.13"])
def test_a_client_that_trusts_the_authority_accepts_the_server(flags: int) -> None:
    certificates = make_certificates(HOST, datetime.now(UTC))
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.verify_flags |= flags
    client.load_verify_locations(cadata=certificates.authority)
    shake_hands(client, server_context(certificates))


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext) -> int:
    """Let two ends of TLS talk in memory, and return the serial number of what the server has shown."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=HOST),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(6):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    shown = ends[0].getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown).serial_number


RENEWALS = {
    "a new certificate is kept": (timedelta(days=1), HOST, True),
    "one that ends within 120 days is renewed": (timedelta(days=246), HOST, False),
    "one that has ended is renewed": (timedelta(days=1000), HOST, False),
    "one for another host is renewed": (timedelta(days=1), "other.ns.svc", False),
}


@pytest.mark.parametrize(("age", "host", "kept"), RENEWALS.values(), ids=RENEWALS.keys())
def test_renewal_keeps_the_authority(certificates: Certificates, age: timedelta, host: str, kept: bool) -> None:
    fresh = renewed(certificates, host, NOON + age)
    assert (fresh is certificates) == kept
    assert (fresh.authority, fresh.authority_key) == (certificates.authority, certificates.authority_key)
    server_of(fresh).verify_directly_issued_by(x509.load_pem_x509_certificate(fresh.authority.encode()))
    names = server_of(fresh).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert host in names.get_values_for_type(x509.DNSName)
    if not kept:
        assert server_of(fresh).not_valid_after_utc == NOON + age + timedelta(days=365)
        assert fresh.server_key != certificates.server_key


async def test_the_first_operator_makes_them_and_the_next_finds_them() -> None:
    api = FakeKubeApi()
    first = await load_certificates(api, settings(), NOON)
    assert SECRET in api.objects
    assert await load_certificates(api, settings(), NOON) == first
    assert len(api.writes) == 1


async def test_of_two_operators_at_once_one_makes_them_for_both() -> None:
    api = FakeKubeApi()
    rival = make_certificates(HOST, NOON)
    looked = api.get

    async def get(resource, namespace, name):
        if SECRET not in api.objects:
            try:
                return await looked(resource, namespace, name)
            finally:
                await api.create(SECRETS, namespace, rival.as_secret(namespace, name))
        return await looked(resource, namespace, name)

    api.get = get
    assert await load_certificates(api, settings(), NOON) == rival


async def test_renewed_certificates_replace_the_old_ones() -> None:
    api = FakeKubeApi()
    first = await load_certificates(api, settings(), NOON)
    later = await load_certificates(api, settings(), NOON + timedelta(days=300))
    assert (later.authority, later.server == first.server) == (first.authority, False)
    assert await load_certificates(api, settings(), NOON + timedelta(days=301)) == later


async def test_of_two_operators_that_renew_at_once_one_does_it_for_both() -> None:
    api = FakeKubeApi()
    first = await load_certificates(api, settings(), NOON)
    later = NOON + timedelta(days=300)
    rival = renewed(first, HOST, later)
    replace = api.replace

    async def slow(resource, namespace, body):
        api.replace = replace
        winner = rival.as_secret(namespace, SECRET[2])
        winner["metadata"]["resourceVersion"] = api.objects[SECRET]["metadata"]["resourceVersion"]
        await replace(resource, namespace, winner)
        return await replace(resource, namespace, body)

    api.replace = slow
    assert await load_certificates(api, settings(), later) == rival


async def test_who_does_not_lead_renews_nothing() -> None:
    api = FakeKubeApi()
    first = await load_certificates(api, settings(), NOON)
    later = NOON + timedelta(days=300)
    assert await load_certificates(api, settings(), later, known=first, may_write=False) == first
    assert len(api.writes) == 1
    renewed_by_leader = await load_certificates(api, settings(), later, known=first)
    assert await load_certificates(api, settings(), later, known=first, may_write=False) == renewed_by_leader != first


@pytest.mark.parametrize("may_write", [True, False], ids=["the leader puts it back", "others wait"])
async def test_a_secret_that_was_deleted_is_no_reason_for_another_authority(may_write: bool) -> None:
    api = FakeKubeApi()
    first = await load_certificates(api, settings(), NOON)
    del api.objects[SECRET]
    assert await load_certificates(api, settings(), NOON, known=first, may_write=may_write) == first
    assert (SECRET in api.objects) == may_write
    if may_write:
        assert await load_certificates(api, settings(), NOON) == first


def test_a_server_that_runs_shows_new_certificates_to_who_connects_next() -> None:
    now = datetime.now(UTC)
    first = make_certificates(HOST, now - timedelta(days=300))
    server = server_context(first)
    fresh = renewed(first, HOST, now)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.load_verify_locations(cadata=first.authority)
    assert shake_hands(client, server) == server_of(first).serial_number
    show(server, fresh)
    assert shake_hands(client, server) == server_of(fresh).serial_number


async def test_an_operator_that_may_not_read_the_secret_says_so() -> None:
    api = FakeKubeApi()

    async def get(resource, namespace, name):
        raise Forbidden("secrets is forbidden", status=403)

    api.get = get
    with pytest.raises(Forbidden):
        await load_certificates(api, settings(), NOON)
    assert api.writes == []
