"""Patches: how one is put in place and taken out, and what became of each."""
