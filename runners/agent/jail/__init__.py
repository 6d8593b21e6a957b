"""What confines the code that agents run. Started as a script of its own; imports the standard library and nothing else."""
