"""The HTTP contract: from a request to its answer."""
