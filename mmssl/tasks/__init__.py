"""What `mmssl evaluate` measures: a task is a function of an embedder and manifests."""
