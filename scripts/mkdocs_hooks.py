"""What the documentation takes from the package: the version, and links to what is documented."""

from __future__ import annotations

import re
from typing import Any

from imagevec._version import __version__


def on_config(config: Any) -> None:
    config.extra["version"] = __version__


def on_page_content(html: str, **_: Any) -> str:
    """Full names in docstrings become links, where the page documents them."""

    def linked(match: re.Match[str]) -> str:
        code, name = match[0], match[1]
        return f'<a href="#{name}">{code}</a>' if f'id="{name}"' in html else code

    return re.sub(r"<code>(imagevec(?:\.\w+)+)</code>", linked, html)
