"""Renders HTML pages from the templates, style.css and script.js of this folder.

    page = render("run.html", story=story, ...)  # one file that loads no other

Values may be hostile: Jinja2 escapes each, and control characters become visible. The content
security policy of a page allows no script but script.js.
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
    """Render a file of templates/ with escaped values; the result may be a value of another one."""
    return Markup(_environment().get_template(template).render(values))


@functools.cache
def _environment() -> Environment:
    """Return Jinja2's environment, which reads each file once.

    So a checkout that changes during a long run does not change its pages.
    """
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
