"""What every HTTP client of the node has in common: origins of credentials, trusted certificates, sessions."""
