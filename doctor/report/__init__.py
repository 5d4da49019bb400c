"""A diagnosis as text, tables and a page."""
