"""Nodes for tests: each with network, processes, host name and hosts file of its own, as a pod has.

Made of Linux namespaces on a bridge of this machine, which needs root and iproute2.
"""

import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

NETWORK = "10.213.77"
GATEWAY = f"{NETWORK}.1"
TOOLS = ("ip", "unshare")
# In a mount namespace, so that the machine's own hosts file stays.
_ENTER = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


def missing() -> str | None:
    """Why no nodes can be made here; None if they can."""
    if os.geteuid() != 0:
        return "needs root"
    if lost := [name for name in TOOLS if shutil.which(name) is None]:
        return f"needs {lost[0]}"
    name = f"fj{os.getpid()}"
    done = subprocess.run(["ip", "link", "add", name, "type", "bridge"], capture_output=True)
    subprocess.run(["ip", "link", "del", name], capture_output=True)
    return f"needs network namespaces: {done.stderr.decode().strip()}" if done.returncode else None


class Nodes:
    """Several nodes by their host names, the first at .11; use it in a `with`.

    All of them reach `forwarded`, a port of this machine's loopback, as `endpoint`.
    """

    def __init__(self, names: Sequence[str], forwarded: int, directory: Path) -> None:
        self._names, self._directory = list(names), directory
        self._mark = f"fj{os.getpid()}"
        self._target = ("127.0.0.1", forwarded)
        self.endpoint = f"http://{GATEWAY}:{forwarded}"

    def __enter__(self) -> "Nodes":
        hosts = ["127.0.0.1 localhost"]
        hosts += [f"{self.address(each)} {each} {each}.job" for each in self._names]
        (self._directory / "hosts").write_text("\n".join(hosts) + "\n")
        try:
            _ip(f"link add {self._mark} type bridge")
            _ip(f"address add {GATEWAY}/24 dev {self._mark}")
            _ip(f"link set {self._mark} up")
            for name in self._names:
                self._add(name)
            self._server = socket.create_server((GATEWAY, self._target[1]))
            threading.Thread(target=self._accept, daemon=True).start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "del", self._space(name)], capture_output=True)
        subprocess.run(["ip", "link", "del", self._mark], capture_output=True)
        with suppress(AttributeError, OSError):
            self._server.close()

    def address(self, name: str) -> str:
        return f"{NETWORK}.{11 + self._names.index(name)}"

    def start(
        self,
        name: str,
        command: Sequence[str],
        environ: Mapping[str, str],
        said: IO[str],
        cwd: Path,
    ) -> subprocess.Popen[str]:
        """Starts a command on a node; killing it kills all processes of the node."""
        enter = ["ip", "netns", "exec", self._space(name), "unshare", "--mount", "--uts", "--pid"]
        enter += ["--fork", "--kill-child", "--mount-proc", "sh", "-c", _ENTER, "sh", name]
        return subprocess.Popen(
            [*enter, str(self._directory / "hosts"), *command],
            env=dict(environ),
            stderr=said,
            stdout=subprocess.DEVNULL,
            text=True,
            cwd=cwd,
        )

    def _space(self, name: str) -> str:
        return f"{self._mark}-{self._names.index(name)}"

    def _add(self, name: str) -> None:
        space, outer = self._space(name), f"{self._mark}v{self._names.index(name)}"
        _ip(f"netns add {space}")
        _ip(f"link add {outer} type veth peer name eth0 netns {space}")
        _ip(f"link set {outer} master {self._mark} up")
        _ip(f"-n {space} address add {self.address(name)}/24 dev eth0")
        _ip(f"-n {space} link set eth0 up")
        _ip(f"-n {space} link set lo up")

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._server.accept()
                server = socket.create_connection(self._target)
                for one, other in ((client, server), (server, client)):
                    threading.Thread(target=_copy, args=(one, other), daemon=True).start()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _ip(arguments: str) -> None:
    done = subprocess.run(["ip", *arguments.split()], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {arguments}: {done.stderr}"
