"""What a node counts, in Prometheus' text format."""
