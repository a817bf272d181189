"""Processes that serve: from listening sockets to the last answer."""
