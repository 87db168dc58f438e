"""The store fails in the middle of saves: training goes on with the same numbers, later saves commit, and a resume is exact.

Real processes, two ranks, a real S3 server behind a proxy. What a rank has at each step is compared with an undisturbed run.
"""

import itertools
import os
import random
import threading

import pytest

from finetune_api.contract import ExitCode
from tests.storage.faulty_proxy import Fault, Proxy, faulty_proxy
from tests.trainer.checkpoint.gangs import Gang, Prefix, written_more_than_once
from tests.trainer.checkpoint.site import COMMIT, Remains

UPLOAD = "POST ?uploads"
"""The first request of a save."""
ROUGH = [
    Fault.SLOW_DOWN,
    Fault.UNAVAILABLE,
    Fault.INTERNAL_ERROR,
    Fault.RESET,
    Fault.REQUEST_LOST,
    Fault.ANSWER_LOST,
    Fault.CONFLICT,
    Fault.TRUNCATED,
]
SEED = int(os.environ.get("FINETUNE_FAULT_SEED", random.randrange(10**6) if os.environ.get("FINETUNE_RANDOM") else 1))


class Outage:
    """From the first save on, requests that match fail, in turn with these faults, so many of them."""

    def __init__(self, faults, requests, pattern=""):
        self.faults, self.pattern = itertools.cycle(faults), pattern
        self.left, self.is_on = requests, False

    def __call__(self, request):
        self.is_on |= request.matches(UPLOAD)
        if not self.is_on or self.left == 0 or (self.pattern and not request.matches(self.pattern)):
            return None
        self.left -= 1
        return next(self.faults)


class Weather:
    """A fifth of all requests fails in some way, the whole time."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def __call__(self, request):
        return self.random.choice(ROUGH) if self.random.random() < 0.2 else None


TROUBLE = {
    "it throttles for a while": lambda: Outage([Fault.SLOW_DOWN], 8),
    "it breaks down for a while": lambda: Outage([Fault.INTERNAL_ERROR, Fault.RESET, Fault.UNAVAILABLE], 15),
    "answers are lost and cut for a while": lambda: Outage([Fault.ANSWER_LOST, Fault.TRUNCATED], 12),
    "it reports errors as success when an upload ends": lambda: Outage([Fault.ERROR_IN_OK], 4, "POST ?uploadId="),
    "a fifth of all requests goes wrong somehow": lambda: Weather(SEED),
}


def run(site, prefix: Prefix, proxy: Proxy, **drill) -> Gang:
    """Generation 2 in new pods: resumes step 2, and saves steps 3 to 6."""
    return site.start(proxy, prefix, 2, site.new_pod(), saves=[1, 2, 3, 4], until=5, **drill)


@pytest.mark.parametrize("trouble", TROUBLE.values(), ids=TROUBLE.keys())
def test_a_store_in_trouble_delays_commits_and_nothing_else(site, remains, trouble):
    prefix = site.new_prefix(like=remains)
    with faulty_proxy(site.server.endpoint) as proxy:
        proxy.before = trouble()
        gang = run(site, prefix, proxy)
        assert gang.wait() == [0, 0], f"FINETUNE_FAULT_SEED={SEED}\n{gang.story()}"
        assert getattr(proxy.before, "left", 0) == 0, "not all of the trouble came"
    site.check(gang)
    assert gang.committed == [3, 4, 5, 6], f"FINETUNE_FAULT_SEED={SEED}\n{gang.story()}"
    assert prefix.check() == [6]
    site.go_on(Remains(prefix, site.new_pod()), generation=3, committed=6)


def test_a_commit_takes_five_requests_beside_the_uploads(site, remains):
    """The first of a generation looks for remains too."""
    prefix = site.new_prefix(like=remains)
    with faulty_proxy(site.server.endpoint) as proxy:
        gang = run(site, prefix, proxy)
        assert gang.wait() == [0, 0], gang.story()
    begins = [request.number for request in proxy.requests if request.matches("PUT manifest.json")]
    asked = [request for request in proxy.requests[begins[1] - 1 : begins[2] - 1] if "/rank-" not in request.path]
    wanted = ["PUT manifest.json", "GET /HEAD", COMMIT, "GET list-type=2", "POST ?delete"]
    assert len(asked) == len(wanted), asked
    assert all(request.matches(pattern) for request, pattern in zip(asked, wanted, strict=True)), asked


def test_a_slow_store_and_clocks_that_differ_delay_commits_and_nothing_else(site, remains):
    """One node's clock is 20 s ahead: requests are signed with it, and S3 servers allow minutes."""
    prefix = site.new_prefix(like=remains)
    with faulty_proxy(site.server.endpoint) as proxy:
        proxy.delay_seconds = 0.05
        gang = run(site, prefix, proxy, clock_seconds=20.0)
        assert gang.wait() == [0, 0], gang.story()
        assert written_more_than_once(proxy) == {}
    site.check(gang)
    assert gang.committed == [3, 4, 5, 6]
    assert prefix.check() == [6]


LOST = {
    "the store stays away": (Fault.UNAVAILABLE, "StorageUnavailable", "did not answer"),
    "access is revoked for a while": (Fault.FORBIDDEN, "NoPermission", "refused access"),
    "the bucket is gone for a while": (Fault.NO_BUCKET, "NoBucket", "does not exist"),
    "something answers that is no S3 server": (Fault.NONSENSE, "BadConfig", "GatewayIsBeingReplaced"),
}


@pytest.mark.parametrize(("fault", "error", "says"), LOST.values(), ids=LOST.keys())
def test_a_save_that_cannot_be_made_is_told_on_all_ranks_and_the_next_one_commits(site, remains, fault, error, says):
    """One rank alone fails to upload its shard of step 4, and the manifest of step 5 cannot be written."""
    prefix = site.new_prefix(like=remains)

    def before(request):
        fails = [("/step-4/", "rank-00001"), ("/step-5/", "manifest.json")]
        return fault if any(step in request.path and name in request.path for step, name in fails) else None

    with faulty_proxy(site.server.endpoint) as proxy:
        proxy.before = before
        gang = run(site, prefix, proxy, retry_seconds=0.0)
        assert gang.wait() == [0, 0], gang.story()
    site.check(gang)
    for rank in range(2):
        told = {said["step"]: said for said in gang.told("saved", rank)}
        assert {step: said["error"] for step, said in told.items()} == {3: None, 4: error, 5: error, 6: None}
        assert says in told[4]["message"]
        assert says in told[5]["message"]
    assert prefix.check() == [6]
    assert prefix.folders() == prefix.listed_folders(), "what failed goes with the next commit"


def test_a_bucket_that_is_deleted_gets_no_checkpoint_any_more_not_even_if_it_is_made_anew(site, remains):
    """Training goes on, since what it holds is the only copy there is; but no later generation starts from the beginning."""
    bucket = "deleted-in-the-middle"
    site.server.create_bucket(bucket)
    prefix = Prefix(site.server, bucket, "job", site.client)
    with faulty_proxy(site.server.endpoint) as proxy:
        changes, lock = {"/step-3/": delete, "/step-5/": create}, threading.Lock()

        def before(request):
            with lock:
                for path in [path for path in changes if path in request.path]:
                    changes.pop(path)(site.client, bucket)

        proxy.before = before
        gang = site.start(proxy, prefix, 1, site.new_pod(), saves=[1, 2, 3, 4, 5, 6], until=6, retry_seconds=0.0)
        assert gang.wait() == [0, 0], gang.story()
        assert proxy.count("PUT /step-6/") == 0, "nothing is uploaded that could not be committed"
    site.check(gang)
    for rank in range(2):
        errors = [(said["step"], said["error"]) for said in gang.told("saved", rank)]
        assert errors[:2] == [(1, None), (2, None)], gang.story()
        assert errors[3] == (4, "NoBucket"), gang.story()
        assert errors[4:] == [(5, "CheckpointsLost"), (6, "CheckpointsLost")], gang.story()
    assert "HEAD" not in prefix.objects()
    refuse_to_start(site, prefix, says="it is gone, although there is")


def refuse_to_start(site, prefix: Prefix, *, says: str) -> None:
    """Start a generation that knows of a commit; it ends before training, and has not made ``HEAD`` anew."""
    with faulty_proxy(site.server.endpoint) as proxy:
        gang = site.start(proxy, prefix, 9, site.new_pod(), until=1, has_checkpoint=True)
        assert gang.wait() == [ExitCode.CHECKPOINTS_LOST, ExitCode.CHECKPOINTS_LOST], gang.story()
    for rank in range(2):
        (failed,) = gang.told("failed", rank)
        assert says in failed["message"]
    assert "HEAD" not in prefix.objects()


def test_a_prefix_that_is_emptied_and_put_back_costs_the_saves_between(site, remains):
    """It is emptied while step 5 is uploaded, and put back, as it was, when that was found out."""
    prefix, taken = site.new_prefix(like=remains), {}
    with faulty_proxy(site.server.endpoint) as proxy:

        def before(request):
            if "/step-5/" in request.path and request.matches("PUT manifest.json") and not taken:
                taken.update({key: prefix.get(key) for key in prefix.objects()})
                prefix.delete(taken)

        proxy.before = before
        gang = site.start(proxy, prefix, 2, site.new_pod(), saves=[1, 2, 3], until=3, retry_seconds=0.0)
        assert gang.wait() == [0, 0], gang.story()
        assert [said["error"] for said in gang.told("saved")] == [None, None, "CheckpointsLost"], gang.story()
    refuse_to_start(site, prefix, says="it is gone, although there is")
    prefix.delete(prefix.objects())
    refuse_to_start(site, prefix, says="everything is gone")
    for key, body in taken.items():
        prefix.put(key, body)
    site.go_on(Remains(prefix, site.new_pod()), generation=10, committed=4)


def delete(client, bucket):
    for item in client.list_objects_v2(Bucket=bucket).get("Contents", ()):
        client.delete_object(Bucket=bucket, Key=item["Key"])
    client.delete_bucket(Bucket=bucket)


def create(client, bucket):
    client.create_bucket(Bucket=bucket)


def test_a_step_that_is_saved_twice_is_written_to_two_places(site, remains):
    """A step that was resumed from memory is committed, and saved again at once, as a stop right then would."""
    prefix = site.new_prefix(like=remains)
    pod = site.new_pod(remains, prefix)
    with faulty_proxy(site.server.endpoint) as proxy:
        gang = site.start(proxy, prefix, 2, pod, twice=True, until=1)
        assert gang.wait() == [0, 0], gang.story()
        assert written_more_than_once(proxy) == {}
    site.check(gang)
    assert [said["step"] for said in gang.told("saved")] == [3, 3]
    assert prefix.check() == [3]
    site.go_on(Remains(prefix, site.new_pod()), generation=3, committed=3)
