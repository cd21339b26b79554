"""Programs that people run, by subject."""
