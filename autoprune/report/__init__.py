"""The report of a run: its figures as words, tables and plots in one HTML file."""
