"""Building blocks of model.py: attention, rotary positions, cache, loss."""
