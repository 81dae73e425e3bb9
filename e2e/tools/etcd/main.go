// Command etcd is etcd's own main over its server module: the module that holds upstream's main package cannot be
// required by version, because its go.mod replaces its siblings with folders of its repository.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() { etcdmain.Main(os.Args) }
