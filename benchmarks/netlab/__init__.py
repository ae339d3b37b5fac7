"""A laboratory for several nodes on one machine: network namespaces joined by slow links."""
