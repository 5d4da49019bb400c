"""What model.py is built of: attention, rotary positions, cache, loss."""
