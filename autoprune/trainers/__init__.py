"""autoprune.trainers."""
