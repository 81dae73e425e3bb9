"""Child processes that never outlive the test run, and ports that stay theirs.

Two promises, kept by the kernel and not by clean-up code, because a test run may be killed at any moment:

- A child dies with this process (PR_SET_PDEATHSIG). The kernel sends that signal when the *thread* that forked the
  child ends, so all children are forked by one thread that lives as long as this process; a fixture may then start
  planes from any thread. `setpriv` sets it after the fork: running Python between fork and exec (preexec_fn) can
  deadlock in a process with threads.
- A port is claimed by binding an abstract Unix socket named after it. The claim belongs to this process, is visible to
  every other test run in the same network namespace, and vanishes with the process. The ports lie below the range for
  outgoing connections: an ephemeral port could be taken by any outgoing connection while a plane is down, even by a
  client that redials the dead server and, on loopback, connects to itself. They also lie below Kubernetes' NodePorts.
"""

import random
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PORTS = range(20000, 30000)

_FORKER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="e2e-forker")


class ProcessFailed(RuntimeError):
    """A child ended when it should run; the message has its name, status, log file and the log's end."""


class Port:
    """A TCP port that nothing listens on and that no other test run picks for as long as this object is open.

    number: the port, 20000..29999.
    """

    def __init__(self) -> None:
        for number in random.sample(PORTS, len(PORTS)):
            claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                claim.bind(f"\0vcproxy-e2e-port-{number}")
                with socket.socket() as probe:  # a program that knows nothing of claims may listen there
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("", number))
            except OSError:
                claim.close()
                continue
            self.number = number
            self._claim = claim
            return
        raise RuntimeError(f"no free TCP port in {PORTS.start}..{PORTS.stop - 1}: what listens there? (ss -ltnp)")

    def close(self) -> None:
        """Give the port back. Idempotent."""
        self._claim.close()


class Process:
    """One daemon with its output in a log file. Not started by the constructor; may be started again after it ended.

    name: for messages; command: argv; log: file appended to by every start; environment: all of the child's variables.
    """

    def __init__(self, name: str, command: Sequence[str], *, log: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.log = log
        self._command = ["setpriv", "--pdeathsig", "KILL", "--", *command]
        self._environment = dict(environment)
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.poll() is None

    @property
    def pid(self) -> int:
        """Process id of the running child (setpriv has become the daemon: exec keeps the id)."""
        if self._child is None:
            raise ProcessFailed(f"{self.name} was not started")
        return self._child.pid

    def start(self) -> None:
        if self.running:
            raise ProcessFailed(f"{self.name} already runs, as process {self.pid}: stop it first")
        self._child = _FORKER.submit(self._fork).result()

    def _fork(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,  # Ctrl-C in a terminal is pytest's business, not the planes'
            )

    def check(self) -> None:
        """Raise ProcessFailed, with the end of the log, if the child is not running."""
        if not self.running:
            status = "was not started" if self._child is None else f"ended with status {self._child.returncode}"
            raise ProcessFailed(f"{self.name} {status}; the end of {self.log}:\n{self.log_tail()}")

    def log_tail(self, lines: int = 20) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the child, which must be running."""
        self.check()
        if self._child is not None:
            self._child.send_signal(number)

    def terminate(self) -> None:
        """Ask the child to end (SIGTERM); does not wait."""
        if self._child is not None and self.running:
            self._child.send_signal(signal.SIGTERM)

    def wait(self, *, grace: float) -> None:
        """Wait until the child has ended; after `grace` seconds kill it. Does nothing if it was never started."""
        if self._child is None:
            return
        try:
            self._child.wait(timeout=grace)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def kill(self) -> None:
        """End the child at once (SIGKILL, which also ends a frozen process) and wait until it is gone."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
