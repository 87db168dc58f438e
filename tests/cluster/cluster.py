"""A real multi-node Kubernetes on one machine, up in seconds, gone without a trace.

Nothing is simulated: the API server, the kubelets, containerd and S3 are the programs that clusters run. A "machine" is a network
namespace with a containerd, a kubelet and a kube-proxy in a control group; cutting a node off is taking down its cable.

Life: packages, binaries and images are made sure of (cached, all of it), remains of a crash are cleared away, then network, control
plane, S3 and nodes start together, and ``start`` returns when the nodes are Ready and DNS and S3 answer. ``stop`` ends
everything in the control group, then undoes mounts, namespaces and folders, and says so if something is left.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from tests.cluster import image_build, images, kubeconfig, network, object_store, ownership
from tests.cluster.binaries import ensure_binaries, exclusive
from tests.cluster.console import ClusterError, say, step
from tests.cluster.control_plane import DNS_MANIFESTS, ControlPlane
from tests.cluster.debian import ensure_packages
from tests.cluster.image_build import OPERATOR, TRAINER
from tests.cluster.mounts import unmount_below
from tests.cluster.network import Network
from tests.cluster.node import Node
from tests.cluster.object_store import ObjectStore
from tests.cluster.places import CACHE, HOST_ADDRESS, MAX_NODES, RUN, SOCKETS
from tests.cluster.process import ControlGroup, Supervisor, run, wait_for

DEFAULT_NAME = "dev"
_RECIPES = (OPERATOR, TRAINER)


class Cluster:
    """A running cluster. Made by ``start`` or ``attach``."""

    def __init__(self, name: str, programs: Mapping[str, Path]) -> None:
        self.name = name
        self.programs = programs
        self.directory = RUN / name
        self.group = ControlGroup(f"finetune-cluster-{name}")
        self.supervisor = Supervisor(self.directory, ControlGroup(f"{self.group.name}/host"))
        self.network = Network(f"ft-{name}")
        self.control_plane = ControlPlane(self.directory, self.supervisor, programs, self.network.host)
        self._stop_lock = threading.RLock()

    # Life

    @classmethod
    def start(
        cls, nodes: int = 2, *, name: str = DEFAULT_NAME, load_images: bool = True, stays: bool = False
    ) -> Cluster:
        """Bring a cluster up. It ends with this process, unless it `stays`.

        `load_images` builds the project's images and has every node start with them; without it nodes have what earlier
        clusters had, and ``load_images()`` can be called later.
        """
        if not 1 <= nodes <= MAX_NODES:
            raise ClusterError(f"nodes: {nodes} is not between 1 and {MAX_NODES}")
        _prepare_machine()
        programs = ensure_binaries()
        object_store.find_program()
        with exclusive(CACHE / "locks" / "cluster", "starting or stopping a cluster"):
            _refuse_if_held()
            clear_remains()
            cluster = cls(name, programs)
            had_mount = network.had_namespace_mount()
            ownership.claim(name, stays=stays, complete=False, had_namespace_mount=had_mount)
            if not stays:
                cluster._stop_with_this_process()
            try:
                with _TerminationRaises():
                    cluster._bring_up(nodes, load_images)
            except BaseException:
                cluster._tell_why()
                clear_remains()
                raise
            ownership.claim(name, stays=stays, complete=True, had_namespace_mount=had_mount)
        return cluster

    @classmethod
    def attach(cls) -> Cluster:
        """The cluster that runs on this machine already. It is left running."""
        owner = ownership.current()
        if owner is None or not owner.holds or not owner.complete:
            raise ClusterError("no cluster is up: start one with `python -m tests.cluster up`")
        return cls(owner.name, ensure_binaries())

    def stop(self) -> None:
        """Take it down, once; safe to call again, and after somebody else did."""
        with self._stop_lock, exclusive(CACHE / "locks" / "cluster", "starting or stopping a cluster"):
            owner = ownership.current()
            if owner is not None and owner.name == self.name:
                clear_remains()

    def _bring_up(self, nodes: int, load_images: bool) -> None:
        with images.lock():
            recipes = _RECIPES if load_images else ()
            loaded = images.ensure(recipes, self.programs)
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._remember_images(loaded)
            with step(f"control plane, S3 and {nodes} nodes started"):
                self._start_host()
                with ThreadPoolExecutor() as pool:
                    started = [pool.submit(self._start_node, index) for index in range(1, nodes + 1)]
                    self.control_plane.wait_until_ready()
                    for future in started:
                        future.result()
        with step("nodes Ready, DNS and S3 answer"):
            self.apply(list(DNS_MANIFESTS))
            self._wait_for_nodes([f"node{index}" for index in range(1, nodes + 1)])
            self.control_plane.wait_until_dns_is_ready()
            object_store.wait_until_ready(self.s3, self.supervisor)
            wait_for("namespace default has no service account", self._look_at_service_account(), 30)

    def _start_host(self) -> None:
        self.group.create()
        self.supervisor.group.create()
        self.network.create_host()
        self.control_plane.prepare()
        self.control_plane.start()
        store = object_store.start(self.directory, self.supervisor, self.network.host)
        kubeconfig.write_secret(self.directory / "s3.json", json.dumps(asdict(store)))

    def _start_node(self, index: int) -> None:
        self._sockets.mkdir(parents=True, exist_ok=True)
        self._node(index).start(images.TEMPLATE)

    def _look_at_service_account(self) -> Iterator[bool]:
        """Pods are refused until the controllers have made it."""
        while True:
            yield bool(self.kubectl("get", "serviceaccount", "default", "--ignore-not-found", "-o", "name").strip())

    def _tell_why(self) -> None:
        """What had ended before everything else was ended."""
        for name in self.supervisor.names():
            if not self.supervisor.find(name).alive:
                say(f"{name} has ended; its last words:\n{self.supervisor.last_words(name)}")

    def _stop_with_this_process(self) -> None:
        """At exit, and on SIGTERM, which Python otherwise dies of without running exit handlers. SIGINT is an exception already.

        A forked child (multiprocessing) inherits the handlers but not the cluster.
        """
        owner = os.getpid()

        def stop_if_ours() -> None:
            if os.getpid() == owner:
                self.stop()

        atexit.register(stop_if_ours)
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _exit_on_signal)

    # What it offers

    @property
    def kubeconfig(self) -> Path:
        return self.control_plane.admin

    @property
    def s3(self) -> ObjectStore:
        return ObjectStore(**json.loads((self.directory / "s3.json").read_text()))

    @property
    def operator_image(self) -> str:
        return self._image("operator")

    @property
    def trainer_image(self) -> str:
        return self._image("trainer")

    def _image(self, name: str) -> str:
        loaded = self.images()
        if name not in loaded:
            raise ClusterError(f"the {name} image is not loaded: call load_images() or `python -m tests.cluster build`")
        return loaded[name]

    def images(self) -> dict[str, str]:
        """The project's images on the nodes: `operator` and `trainer` → name."""
        loaded: dict[str, str] = json.loads((self.directory / "images.json").read_text())
        return loaded

    def _remember_images(self, loaded: Mapping[str, str]) -> None:
        (self.directory / "images.json").write_text(json.dumps(dict(loaded)))

    def environment(self) -> dict[str, str]:
        """For programs that are to use the cluster: kubectl and helm first on PATH, KUBECONFIG, S3 credentials."""
        directories = dict.fromkeys(str(self.programs[program].parent) for program in ("kubectl", "helm"))
        helm = {
            f"HELM_{kind}_HOME": str(self.directory / "helm" / kind.lower()) for kind in ("CACHE", "CONFIG", "DATA")
        }
        path = os.pathsep.join([*directories, os.environ.get("PATH", "")])
        return {"KUBECONFIG": str(self.kubeconfig), "PATH": path, **helm, **self.s3.environment()}

    def kubectl(self, *arguments: str, input: str | None = None, check: bool = True) -> str:
        return run(
            [self.programs["kubectl"], *arguments], input=input, env={"KUBECONFIG": str(self.kubeconfig)}, check=check
        )

    def helm(self, *arguments: str, check: bool = True) -> str:
        return run([self.programs["helm"], *arguments], env=self.environment(), check=check)

    def get(self, kind: str, name: str, namespace: str = "default") -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.kubectl("get", kind, name, "--namespace", namespace, "-o", "json"))
        return document

    def wait_for_crd(self, name: str) -> None:
        """Wait until objects of a kind can be made. Not by ``kubectl wait``, which fails while the CRD has no conditions at all."""

        def looks() -> Iterator[bool]:
            while True:
                conditions = self.get("customresourcedefinition", name).get("status", {}).get("conditions") or ()
                established = any((one["type"], one["status"]) == ("Established", "True") for one in conditions)
                yield established and self._serves(name)

        wait_for(f"the CRD {name} is served", looks(), 60)

    def _serves(self, resource: str) -> bool:
        """Tell whether the API server answers for a kind, which it does a moment after it has called it established."""
        try:
            self.kubectl("get", resource, "--all-namespaces", "--ignore-not-found")
        except ClusterError:
            return False
        return True

    def apply(self, manifest: str | Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Server-side apply of YAML text, of one object or of several."""
        documents = [manifest] if isinstance(manifest, Mapping) else manifest
        text = (
            documents if isinstance(documents, str) else yaml.safe_dump_all([dict(document) for document in documents])
        )
        self.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", input=text)

    def user_kubeconfig(self, name: str, groups: Sequence[str] = ()) -> Path:
        """A kubeconfig for a person, who has no rights until somebody binds a role to them or their groups."""
        file = "user-" + "-".join([name, *groups]).replace(":", "_").replace("/", "_")
        certificate, key = self.control_plane.authority.issue(file, name, groups=groups)
        data = {"client-certificate-data": kubeconfig.encoded(certificate), "client-key-data": kubeconfig.encoded(key)}
        return kubeconfig.write(self.control_plane.component(file), self.control_plane.authority.certificate, data)

    def load_images(self) -> None:
        """Build the project's images if their inputs changed, and bring them to every node. Their names change with them."""
        with images.lock():
            loaded = images.ensure(_RECIPES, self.programs)
            nodes = self.nodes()
            with ThreadPoolExecutor() as pool:
                list(
                    pool.map(lambda pair: images.load_on_node(*pair), [(i, n) for i in loaded.values() for n in nodes])
                )
        self._remember_images(loaded)

    # Nodes, and faults

    def nodes(self) -> list[Node]:
        indexes = sorted(int(path.name.removeprefix("node")) for path in self.directory.glob("node[0-9]*"))
        return [self._node(index) for index in indexes]

    def node(self, name: str) -> Node:
        for node in self.nodes():
            if node.name == name:
                return node
        raise ClusterError(f"there is no node {name!r}; there are {', '.join(node.name for node in self.nodes())}")

    def add_node(self) -> str:
        """One more node; returns its name when it is Ready."""
        index = max(node.index for node in self.nodes()) + 1
        if index > MAX_NODES:
            raise ClusterError(f"there are {MAX_NODES} nodes already")
        with images.lock():
            self._start_node(index)
        self._wait_for_nodes([f"node{index}"])
        return f"node{index}"

    def cut_node(self, name: str) -> None:
        """Pull its network cable: everything on it runs on, and nobody hears of it."""
        self.network.cut(self.node(name).index)

    def heal_node(self, name: str) -> None:
        self.network.heal(self.node(name).index)

    def slow_node(self, name: str, rate: str) -> None:
        """Its cable carries so many bits a second, such as "1mbit"."""
        self.network.slow(self.node(name).index, rate)

    def fast_node(self, name: str) -> None:
        self.network.fast(self.node(name).index)

    def drop_forwarded(self, port: int, *names: str) -> None:
        """Nobody reaches a pod at this TCP port any more, from these nodes (all by default); open connections fall silent too."""
        for node in self.nodes():
            if not names or node.name in names:
                self.network.drop_forwarded(node.index, port)

    def forward_again(self, port: int, *names: str) -> None:
        for node in self.nodes():
            if not names or node.name in names:
                self.network.forward_again(node.index, port)

    @contextmanager
    def without_apiserver(self, namespace: str, pod: str) -> Iterator[None]:
        """While this lasts a pod cannot reach the API server; its node and everybody else can."""
        document = self.get("pod", pod, namespace)
        index, address = self.node(document["spec"]["nodeName"]).index, document["status"]["podIP"]
        self.network.drop(index, address, str(HOST_ADDRESS))
        try:
            yield
        finally:
            self.network.drop(index, address, str(HOST_ADDRESS), heal=True)

    def kill_kubelet(self, name: str) -> None:
        self.node(name).kubelet().end()

    def start_kubelet(self, name: str) -> None:
        node = self.node(name)
        if not node.kubelet().alive:
            node.start_kubelet()

    def kill_container(self, namespace: str, pod: str, container: str) -> None:
        """SIGKILL to the container's first process, as the kernel's out-of-memory killer would."""
        document = self.get("pod", pod, namespace)
        status = document["status"]
        statuses = [*status.get("containerStatuses", []), *status.get("initContainerStatuses", [])]
        found = next((entry for entry in statuses if entry["name"] == container), None)
        if found is None or "running" not in found["state"]:
            raise ClusterError(f"pod {namespace}/{pod} has no running container {container!r}")
        identifier = found["containerID"].removeprefix("containerd://")
        self.node(document["spec"]["nodeName"]).ctr("tasks", "kill", "--signal", "SIGKILL", identifier)

    @contextmanager
    def without_store(self) -> Iterator[None]:
        """While this lasts the S3 server takes connections and answers nothing."""
        server = self.supervisor.find("s3")
        server.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            server.signal(signal.SIGCONT)

    def stop_apiserver(self) -> None:
        """SIGKILL: an orderly end would wait for watches to go, and tests are about the disorderly one."""
        self.supervisor.find("kube-apiserver").end()

    def start_apiserver(self) -> None:
        if not self.supervisor.find("kube-apiserver").alive:
            self.control_plane.start_apiserver()
        self.control_plane.wait_until_ready()

    def wait_for_ready(self, name: str, *, ready: bool = True, seconds: float = 90) -> None:
        """Wait until a node is Ready, or until it is not."""
        wanted = "node is not Ready" if ready else "node is still Ready"
        wait_for(f"{name}: {wanted}", self._look_at_node(name, ready), seconds)

    def _wait_for_nodes(self, names: Sequence[str]) -> None:
        for name in names:
            what = f"{name} is not Ready"
            wait_for(what, self._look_at_node(name, True), 90, self.supervisor, f"{name}-kubelet")

    def _look_at_node(self, name: str, ready: bool) -> Iterator[bool]:
        """Whether it is as it should be; a node that has just become ready is tainted for a moment longer, and gets no pods."""
        path = "jsonpath={.status.conditions[?(@.type=='Ready')].status} {.spec.taints[*].key}"
        while True:
            said, _, taints = self.kubectl("get", "node", name, "--ignore-not-found", "-o", path).partition(" ")
            is_tainted = any(why in taints for why in ("not-ready", "unreachable"))
            yield said == "True" and not is_tainted if ready else said not in ("", "True")

    @property
    def _sockets(self) -> Path:
        return SOCKETS / self.name

    def _node(self, index: int) -> Node:
        return Node(
            index=index,
            directory=self.directory / f"node{index}",
            sockets=self._sockets,
            group=ControlGroup(f"{self.group.name}/node{index}"),
            network=self.network,
            supervisor=self.supervisor,
            programs=self.programs,
            authority=self.control_plane.authority.certificate,
            kubeconfigs=self.control_plane.directory / "kubeconfigs",
        )


def _refuse_if_held() -> None:
    owner = ownership.current()
    if owner is None or not owner.holds:
        return
    if owner.complete and not ControlGroup(f"finetune-cluster-{owner.name}").members():
        return  # the machine has been started anew since
    raise ClusterError(
        f"there is {owner} already, and one machine holds one; use Cluster.attach() or `python -m tests.cluster down`"
    )


def clear_remains() -> None:
    """Remove everything of the current or a crashed cluster. Holding the cluster lock is the caller's part."""
    owner = ownership.current()
    names = {owner.name} if owner else set()
    names |= {path.name for path in RUN.glob("*/")} if RUN.exists() else set()
    for name in sorted(names):
        with step(f"cluster {name!r} removed"):
            _remove_cluster(name)
    if names:
        if owner is not None and not owner.had_namespace_mount:
            network.remove_namespace_mount()
        with suppress(OSError):
            SOCKETS.rmdir()
        ownership.release()
        with suppress(OSError):
            RUN.rmdir()


def _remove_cluster(name: str) -> None:
    group = ControlGroup(f"finetune-cluster-{name}")
    group.kill()
    unmount_below(RUN / name, SOCKETS / name)
    Network(f"ft-{name}").remove()
    group.remove()
    for directory in (RUN / name, SOCKETS / name):
        shutil.rmtree(directory, ignore_errors=True)
        if directory.exists():
            shutil.rmtree(directory)


def take_down() -> None:
    """`down`: whoever has the cluster. A process that still runs and has it is told by its failing calls."""
    with exclusive(CACHE / "locks" / "cluster", "starting or stopping a cluster"):
        clear_remains()


def _prepare_machine() -> None:
    """Refuse what would fail after minutes, and install what Debian has."""
    object_store.refuse_place(CACHE)
    ensure_packages()


def build_images() -> dict[str, str]:
    """Build the project's images; on the nodes too, if a cluster runs."""
    owner = ownership.current()
    if owner is not None and owner.holds and owner.complete:
        cluster = Cluster.attach()
        cluster.load_images()
        return cluster.images()
    _prepare_machine()
    programs = ensure_binaries()
    with images.lock():
        return images.ensure(_RECIPES, programs)


def clear_builds() -> None:
    """Remove what interrupted builds have left, unless one is under way."""
    with exclusive(CACHE / "locks" / "images", "building or loading images"):
        images.remove_template_containerd()
        image_build.clean()


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


class _TerminationRaises:
    """While a cluster comes up, SIGTERM raises like Ctrl-C does, so that what has been started is taken down again."""

    def __enter__(self) -> None:
        self._is_main = threading.current_thread() is threading.main_thread()
        if self._is_main:
            self._previous = signal.signal(signal.SIGTERM, _exit_on_signal)

    def __exit__(self, *_: object) -> None:
        if self._is_main:
            signal.signal(signal.SIGTERM, self._previous)
