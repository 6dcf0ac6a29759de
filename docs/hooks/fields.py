"""Lets the API pages say of a class's fields what the comments beside them say."""

from collections.abc import Iterator
from typing import Any

import griffe


class FieldComments(griffe.Extension):
    """Adds a table of the fields that have comments to the docstring of their class."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Goes through all classes of a package."""
        for cls in classes(pkg):
            fields = list(commented_fields(cls))
            if fields and cls.docstring is not None:
                sections = cls.docstring.parsed
                texts = [each.kind is griffe.DocstringSectionKind.text for each in sections]
                place = texts.index(False) if False in texts else len(texts)
                sections.insert(place, griffe.DocstringSectionParameters(fields, title="Fields:"))


def classes(module: griffe.Module) -> Iterator[griffe.Class]:
    """Yields the classes that a module and those within it define."""
    for member in module.members.values():
        if isinstance(member, griffe.Class):
            yield member
        elif isinstance(member, griffe.Module):
            yield from classes(member)


def commented_fields(cls: griffe.Class) -> Iterator[griffe.DocstringParameter]:
    """Yields the fields of a class that have a comment."""
    for field in cls.attributes.values():
        if isinstance(field, griffe.Attribute) and field.docstring is None and field.lineno:
            file: Any = field.filepath  # one Path, as for every class
            lines = field.lines_collection[file]
            text = comments(lines, field.lineno, field.endlineno or field.lineno)
            if text and field.annotation is not None:
                yield griffe.DocstringParameter(
                    field.name, annotation=field.annotation, description=text, value=field.value
                )


def comments(lines: list[str], first: int, last: int) -> str:
    """Returns the comments above and beside a statement in the lines `first` to `last`, from 1."""
    found: list[str] = []
    above = first - 2
    while above >= 0 and lines[above].lstrip().startswith("#"):
        found.insert(0, lines[above].strip().removeprefix("#").strip())
        above -= 1
    _, mark, beside = lines[last - 1].partition("  # ")
    return " ".join([*found, beside.strip()] if mark else found)
