"""Makes the site's pages of docstrings that are written for Sphinx and doctest."""

import re
from typing import Any

_ROLE = re.compile(r":(?:attr|class|func|meth|mod):<code>~?(?:[\w.]+\.)?(\w+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Shows the last part of a name in place of a cross reference's markup."""
    return _ROLE.sub(r"<code>\1</code>", html).replace("Example::", "Example:")
