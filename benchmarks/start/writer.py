"""Rewrites EndpointSlices at a pace: `python -m benchmarks.start.writer KUBECONFIG SERVICES ENDPOINTS RATE SECONDS`.

A process of its own, so that it does not share an interpreter with who measures. Each change gives the last endpoint of
a Service another address. Says {} when it begins, and at its end how many changes the API server took in which time.
"""

import json
import random
import sys
import time
from pathlib import Path

from benchmarks.start import filling
from e2e.apiclient import ApiClient


def main() -> None:
    """Write."""
    services, endpoints, rate = map(int, sys.argv[2:5])
    seconds = float(sys.argv[5])
    api, chance, count = ApiClient(Path(sys.argv[1])), random.Random(2), 0
    numbers = sorted(set(range(services)) - set(filling.sampled(services)))
    print("{}", flush=True)
    began = time.monotonic()
    while (now := time.monotonic()) < began + seconds:
        ahead = began + count / rate - now
        if ahead > 0:
            time.sleep(ahead)
        number = chance.choice(numbers)
        members = filling.targets(number, endpoints, 1 + count % 5)
        body = {"endpoints": filling.endpoints(number, members)}
        api.patch("EndpointSlice", f"svc-{number}-x", body, filling.NAMESPACE)
        count += 1
    print(json.dumps({"changes": count, "seconds": time.monotonic() - began}))


if __name__ == "__main__":
    main()
