"""Confines the code that agents run: a separate script that uses only the standard library and `flowmesh.files`."""
