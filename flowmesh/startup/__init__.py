"""What is checked and prepared before a node takes tasks."""
