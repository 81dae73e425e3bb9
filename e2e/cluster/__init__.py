"""A real Kubernetes cluster on one machine, without a container engine: for upstream's own tests, and for vcproxy as users
deploy it.

`machine` what makes a node believe that it is one, `addresses` the network, `control`, `node`, `proxies`, `deployed`,
`loadbalancer` the parts, `images`, `dockerfile` and `rootfs` what containers run from, `cluster` all of it together;
`pods` and `scene` for tests in it, `upstream` and `comparison` Kubernetes' tests. `python -m e2e.cluster` is for people.
"""
