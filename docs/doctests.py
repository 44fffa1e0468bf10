"""A Griffe extension: doctests in docstrings become code blocks of the site."""

import griffe

PROMPT = ">>> "


def fenced(text: str) -> str:
    """The text with a fence around every doctest: from a prompt to the next empty line."""
    lines, inside = [], False
    for line in text.splitlines():
        begins = line.lstrip().startswith(PROMPT)
        if begins and not inside:
            lines += ["```pycon"]
            inside = True
        elif inside and not line.strip():
            lines += ["```"]
            inside = False
        lines.append(line)
    return "\n".join([*lines, "```"] if inside else lines)


class Doctests(griffe.Extension):
    """Rewrites the docstrings that have a prompt in them."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        """Called by Griffe for every object that it has read."""
        if obj.docstring and PROMPT in obj.docstring.value:
            obj.docstring.value = fenced(obj.docstring.value)
