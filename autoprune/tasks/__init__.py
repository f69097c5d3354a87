"""autoprune.tasks."""
