"""`flowmesh top`."""
