"""Training: TRL's trainers and a PPO of our own behind one core; alone, or as a group of ranks."""
