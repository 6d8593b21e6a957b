"""What the node says to others (`wire`) and to its own children (`job`), and how both are checked (`checking`)."""
