"""Turns formulas into MathML while the site is built: pages need neither a script nor a network."""

import html
import re
from typing import Any

from math_core import LatexError, LatexToMathML
from mkdocs.exceptions import PluginError

# What the Markdown extension arithmatex makes of $...$ and of $$...$$.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)

_converter = LatexToMathML(fancy_error=False)


def on_page_content(content: str, *, page: Any, **_: Any) -> str:
    """Replaces the formulas of a page. Raises PluginError for one that is no LaTeX."""

    def converted(found: re.Match[str]) -> str:
        formula = html.unescape(found[2])
        try:
            return _converter.convert_with_local_state(formula, displaystyle=found[1] == "div")
        except LatexError as error:
            raise PluginError(f"{page.file.src_uri}: ${formula}$: {error}") from error

    return FORMULA.sub(converted, content)
