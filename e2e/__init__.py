"""End-to-end tests: vcproxy against real etcd, kube-apiserver, kube-controller-manager and kube-proxy."""
