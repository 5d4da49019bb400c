"""What a run leaves on the disk: checkpoints, file names, lock, metrics, weights to share."""
