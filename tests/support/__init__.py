"""What the tests share: running coroutines, processes, Node peers, servers behind a service."""
