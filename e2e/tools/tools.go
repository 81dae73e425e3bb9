//go:build tools

// Package tools pins the real control plane and the real peer that vcproxy is tested against: the imports below make
// go.mod name exactly what the build script compiles, so that `go mod tidy` neither drops nor adds a module.
package tools

import (
	_ "go.etcd.io/etcd/server/v3/etcdmain"
	_ "k8s.io/kubernetes/cmd/kube-apiserver"
	_ "k8s.io/kubernetes/cmd/kube-controller-manager"
	_ "k8s.io/kubernetes/cmd/kube-proxy"
)
