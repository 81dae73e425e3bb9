"""The machine that figures are taken on: what it is, and when it has nothing left to do.

The kernel frees what was deleted behind one's back (tables by a worker, namespaces by another), for seconds where there
were a million elements. What is measured next must not pay for that, so one waits until the processors rest. On a
machine that has other work they never do; then one goes on, and the load average beside the figures tells.
"""

import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_RESTING, _LOOK, _WITHIN = 0.1, 0.5, 20.0
_ROOT = Path(__file__).parents[1]


def facts() -> dict[str, Any]:
    """Where and of what a figure is taken. `load`: the load average of the last minute before."""
    cpus = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = next(int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    return {
        "kernel": platform.release(),
        "processor": cpus[0] if cpus else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**20, 1),
        "python": platform.python_version(),
        "commit": _commit(),
        "taken": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "load": round(os.getloadavg()[0], 1),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _commit() -> str:
    """The commit, with "+" if files differ from it."""
    git = ["git", "-C", str(_ROOT)]
    try:
        told = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ":!docs"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):  # no checkout
        return ""
    return told.stdout.strip() + ("+" if changed else "")


def rest() -> None:
    """Wait until all processors together are busy for less than a tenth of one, or it has taken too long."""
    deadline = time.monotonic() + _WITHIN
    while time.monotonic() < deadline:
        before = _busy()
        time.sleep(_LOOK)
        if _busy() - before < _RESTING * _LOOK:
            return


def _busy() -> float:
    """Seconds of processor time that were not idle, of all processors (proc_stat(5))."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, _lines("/proc/stat")[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
