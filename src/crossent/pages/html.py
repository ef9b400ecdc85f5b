"""Pages that need nothing but themselves: template, style and script in one HTML file."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import Any


def fragment(name: str, **values: Any) -> str:
    """A template filled in; values are text, never markup."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(_read),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name).render(values)


def page(name: str, **values: Any) -> str:
    """The page ``name``.html with its script ``name``.js and the style that all pages share.

    The browser is told to run and draw nothing but these two and to ask nobody for anything.
    """
    style, script = _read("page.css"), _read(f"{name}.js")
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return fragment(f"{name}.html", style=style, script=script, policy=policy, **values)


def framed(html: str, title: str, height: int) -> str:
    """A whole page as part of a notebook, kept apart from the others."""
    return fragment("frame.html", html=html, title=title, height=height)


def _read(name: str) -> str:
    folder = files(__package__) / "templates"
    return (folder / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
