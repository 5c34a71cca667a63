"""A job before it runs, and its handle. Start with ``request``."""
