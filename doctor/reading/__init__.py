"""From a hostile file to plain numbers."""
