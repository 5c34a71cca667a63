"""Generates the pages on the commands and on the Python interface from the code, so that they always match it."""
