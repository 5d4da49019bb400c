"""Audio and codes: audio files, codec, the .npq format, drawing codes."""
