"""What confines the code that agents run: a script of its own, of the standard library alone."""
