"""What several tests use: fakes, builders of tiny models, real servers and nodes."""
