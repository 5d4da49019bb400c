"""Diagnosis of checkpoints and runs: reading, checks, verdict, report."""
