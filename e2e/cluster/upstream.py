"""Upstream's own end-to-end tests against a cluster, and what they said, as data.

The tests are Kubernetes' (e2e/tools/upstream), run by its own runner, several at a time. `SKIP` leaves out what this
cluster cannot have whoever the proxy is; everything else of SIG Network runs.
"""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster.cluster import Cluster

SIG_NETWORK = r"\[sig-network\]"

SKIP = (
    r"\[Disruptive\]",  # restarts nodes or the control plane
    r"\[Serial\]",
    r"\[Feature:NetworkPolicy\]",  # wants a policy engine
    r"\[Provider:",  # a certain cloud
    r"\[Feature:Networking-",  # the world outside
    r"\[Feature:PerformanceDNS\]",
    r"\[Feature:KubeProxyNFAcct\]",  # nfacct counters of iptables mode
    r"\[Feature:SCTPConnectivity\]",  # this kernel may lack SCTP
    r"IPerf2",  # measures the machine
)


@dataclass(frozen=True)
class Result:
    """One test. status: passed, skipped (by its own decision) or failed; seconds: its run time, others beside it."""

    test: str
    status: str
    seconds: float
    message: str


class SuiteFailed(RuntimeError):
    """The suite did not run to its end; the message has the log's end."""


def run(
    cluster: Cluster,
    directory: Path,
    *,
    focus: Sequence[str] = (SIG_NETWORK,),
    skip: Sequence[str] = (),
    processes: int = 10,
    minutes: int = 60,
) -> list[Result]:
    """Run every test whose name matches one of `focus` (regular expressions) and none of `skip` and SKIP.

    directory: for log and report. Returns results by name. Raises SuiteFailed if no test ran or the suite broke off.
    """
    directory.mkdir(parents=True, exist_ok=True)
    report, log = directory / "report.json", directory / "log"
    programs, admin = cluster.assets.programs, cluster.control.admin
    command = [
        str(programs["ginkgo"]),
        f"--procs={processes}",
        "--no-color",
        f"--timeout={minutes}m",
        *(f"--focus={expression}" for expression in focus),
        *(f"--skip={expression}" for expression in (*SKIP, *skip)),
        f"--json-report={report}",
        str(programs["upstream.test"]),
        "--",
        "--provider=skeleton",
        f"--kubeconfig={admin}",
        f"--kubectl-path={programs['kubectl']}",
        f"--num-nodes={len(cluster.nodes)}",
        f"--report-dir={directory}",
        "--minStartupPods=0",
        "--disable-log-dump",
        "--dump-logs-on-failure=false",
    ]
    with log.open("wb") as output:
        inside = cluster.control.machine.inside("nice", "-n", "5", *command)
        subprocess.run(inside, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False)
    results = read(report) if report.exists() else []
    if not results:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        raise SuiteFailed(f"no test ran; the end of {log}:\n{end}")
    return results


def read(report: Path) -> list[Result]:
    """The results in a report of ginkgo's, by name; tests that were not selected are not in it."""
    results = []
    for suite in json.loads(report.read_text()):
        for spec in suite["SpecReports"] or ():
            message = " ".join((spec.get("Failure") or {}).get("Message", "").split())
            if spec["LeafNodeType"] != "It" or (spec["State"] == "skipped" and not message):
                continue
            test = " ".join([*(spec["ContainerHierarchyTexts"] or ()), spec["LeafNodeText"]])
            status = spec["State"] if spec["State"] in ("passed", "skipped") else "failed"
            results.append(Result(test, status, spec["RunTime"] / 1e9, message))
    return sorted(results, key=lambda result: result.test)
