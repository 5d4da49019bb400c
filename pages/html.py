"""HTML from the templates, the style and the script beside this file.

    page = render("run.html", story=story, ...)  # one file that loads nothing

Values may be hostile: Jinja2 escapes each, and control characters become visible. A page runs
script.js alone, by its own content security policy.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cli.command_line import figure, printable
from run_folder.metrics import duration, number

FOLDER = Path(__file__).resolve().parent


def render(template: str, **values: Any) -> Markup:
    """A file of templates/ with values, which it escapes; the result is markup for another one."""
    return Markup(_environment().get_template(template).render(values))


@functools.cache
def _environment() -> Environment:
    """Each file is read once: a checkout that changes under a long run does not change its page."""
    script = (FOLDER / "script.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        auto_reload=False,
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value)),
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=StrictUndefined,  # a misspelt name is an error, not an empty place
    )
    environment.filters |= {"duration": duration, "figure": figure, "number": number}
    environment.globals |= {
        "style": Markup((FOLDER / "style.css").read_text(encoding="utf-8")),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    return environment
