"""`flowmesh run` of a document with several stages."""
