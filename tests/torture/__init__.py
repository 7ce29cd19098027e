"""A seeded campaign of faults in real launches, and fuzzing of all inputs."""
