"""Worker processes of one node. Start with ``elastic_agent``."""
