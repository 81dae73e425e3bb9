// Command coredns is CoreDNS with the plugins that the cluster's Corefile names. A module of its own: its dependencies
// are newer than those that Kubernetes pins, and must not change what the control plane is built from.
package main

import (
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"

	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/forward"
	_ "github.com/coredns/coredns/plugin/health"
	_ "github.com/coredns/coredns/plugin/hosts"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/loadbalance"
	_ "github.com/coredns/coredns/plugin/log"
	_ "github.com/coredns/coredns/plugin/ready"
	_ "github.com/coredns/coredns/plugin/reload"
)

func main() {
	// The order in which a query meets them.
	dnsserver.Directives = []string{
		"reload", "health", "ready", "errors", "log", "cache", "loadbalance", "hosts", "kubernetes", "forward",
	}
	coremain.Run()
}
