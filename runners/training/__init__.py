"""Training: TRL's trainers and our own PPO behind one core, in one process or as a group of ranks."""
