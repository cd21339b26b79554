"""What a rank does not read, and does not fetch. Nothing of the rest leans on it."""
