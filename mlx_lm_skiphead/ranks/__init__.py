"""What ranks tell each other, and a watch for a step that does not end."""
