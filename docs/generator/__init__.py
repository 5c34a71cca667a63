"""Generates what is said of the commands and of the Python interface from the code, so that it cannot lie."""
