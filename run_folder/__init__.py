"""The files that a run leaves on disk: checkpoints, file names, lock, metrics, weights to share."""
