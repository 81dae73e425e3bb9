"""What no proxy that starts can undercut: to be sent all Services and EndpointSlices, by a reader that only counts."""

import http.client
import time
from concurrent.futures import ThreadPoolExecutor

from benchmarks import results
from e2e.controlplane import ControlPlane

_PATHS = ("/api/v1/services", "/apis/discovery.k8s.io/v1/endpointslices")
_RUNS = 3


def lists(plane: ControlPlane) -> results.Document:
    """Seconds until both lists have been read side by side, as JSON from the API server's cache; and their octets."""
    taken, octets = [], 0
    with ThreadPoolExecutor(len(_PATHS)) as pool:
        for _ in range(_RUNS):
            began = time.monotonic()
            octets = sum(pool.map(lambda path: _read(plane, path), _PATHS))
            taken.append(time.monotonic() - began)
    return {**results.spread(taken), "octets": octets}


def _read(plane: ControlPlane, path: str) -> int:
    """How many octets there were."""
    host, count = plane.url.removeprefix("https://"), 0
    connection = http.client.HTTPSConnection(host, context=plane.client.tls)
    try:
        connection.request("GET", f"{path}?resourceVersion=0", headers={"Accept": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200, answer.status
        while octets := answer.read(1 << 20):
            count += len(octets)
    finally:
        connection.close()
    return count
