"""Data, checkpoint and tables of the embedded default."""
