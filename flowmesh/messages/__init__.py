"""What the node says to others (`wire`), what it says to its own children (`job`), and how both are checked (`checking`)."""
