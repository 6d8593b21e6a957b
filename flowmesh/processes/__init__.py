"""Fork servers and their children: pipes, limits, cgroups, process trees."""
