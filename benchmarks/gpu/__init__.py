"""All GPU work as one command; see `__main__.py`."""
