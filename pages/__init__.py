"""The HTML pages: frame, style, charts, the page of a run."""
