"""kube-proxy as seen from outside: its configuration, its flags, and what it leaves on a node.

vcproxy takes kube-proxy's place on a node whose manifests, ConfigMaps and habits are kube-proxy's. So all that somebody
may have written for it is read here, in its own words and with its own meaning, and there is one way through:

    flags --\\
             KubeProxyConfiguration -> problems, warnings -> (BrainConfiguration, NodeConfiguration)
    file  --/

Facts about kube-proxy in this package are those of 1.37.
"""
