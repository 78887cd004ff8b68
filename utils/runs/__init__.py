"""A run's folder, its checkpoints and its result files."""
