"""A real Kubernetes cluster on one machine, without a container engine: for upstream's own Service tests.

`machine` what makes a node believe that it is one, `addresses` the network, `control`, `node`, `proxies`, `loadbalancer`
the parts, `images` and `rootfs` what containers run from, `cluster` all of it together, `upstream` the tests.
`python -m e2e.cluster` is for people.
"""
