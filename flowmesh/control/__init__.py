"""What can be asked of a running node over its control socket."""
