"""New policy weights from the trainer into an engine."""
