"""Pages from templates: HTML in one file that opens offline, with all text escaped."""

from __future__ import annotations

import base64
import re
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
"""Control characters except tab and newline, half surrogate pairs, and marks of direction and joining."""


def render(template: str, **values: object) -> str:
    """The page of `templates/TEMPLATE.html.jinja` with these values."""
    return _environment().get_template(f"{template}.html.jinja").render(values)


def visible(text: str) -> Markup:
    """Text for HTML, with invisible characters replaced by their code points."""
    return Markup(_UNSEEN.sub(lambda found: f"<i>U+{ord(found[0]):04X}</i>", escape(text)))


@cache
def _environment() -> Environment:
    loader = PackageLoader("puzzle_jax.report")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {"base64": lambda png: base64.b64encode(png).decode(), "visible": visible}
    return environment
