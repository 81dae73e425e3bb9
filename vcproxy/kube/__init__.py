"""Reading API servers: credentials, requests, lists and watches, typed objects.

    kubeconfig -> Credentials -> client -> bytes -> decode -> objects -> reflector -> events

A consumer needs four names: `load_kubeconfig`, `Client`, a `Resource` such as `decode.SERVICES`, and `Reflector` with
its events. Everything here treats the other end as hostile; errors.py says what can go wrong and what that means.
"""
