"""What can be wrong with a run; one file a family of checks."""
