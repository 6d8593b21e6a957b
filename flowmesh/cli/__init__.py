"""The commands `flowmesh` and `flowmesh-supervisor`."""
