"""autoprune.lut."""
