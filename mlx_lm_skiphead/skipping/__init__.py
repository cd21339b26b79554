"""How a head is skipped: what a reader comes for. Begin with sharing.py."""
