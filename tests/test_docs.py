"""The documents: their code runs, they quote the sources, their commands and links exist."""

import ast
import contextlib
import importlib
import importlib.util
import inspect
import io
import json
import re
import runpy
import string
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from documents import PAGES, ROOT, Block, blocks, command_lines, own_arguments, quoted

import gptfast
from gptfast import cli
from gptfast.cli import commands

README = ROOT / "README.md"
SHARED = [README, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "data/README.md"))]
PLAY = "ROMEO:\nBut soft, what light through yonder window breaks?\n\nJULIET:\nAy me!\n\n"
CHARACTERS = f" \n!$&',-.3:;?{string.ascii_letters}"  # of Tiny Shakespeare
FILES = {  # that the pages speak of
    "shakespeare.txt": CHARACTERS + PLAY * 50,
    "my.txt": CHARACTERS + PLAY * 50,
    "runs/mine/run.toml": '[run]\npreset = "shakespeare"\n',
    "runs/s/run.toml": '[run]\npreset = "shakespeare"\n',
}
HOOK = runpy.run_path(str(ROOT / "docs/hooks/repository.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands_of(path: Path) -> list[list[str]]:
    """Returns the words of the commands in a page's blocks of commands."""
    found = [block.text for block in blocks(path) if block.language in ("", "sh")]
    is_commands = re.compile(r"^(gptfast|torchrun|python) ", re.MULTILINE)
    return [words for text in found if is_commands.search(text) for words in command_lines(text)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the pages speak of, in which the test runs."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "python")], ids=name_of)
def test_the_code_of_a_page_runs(path: Path, folder: Path) -> None:
    """The blocks of a page share their names; what one prints is in the block after it, if any."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = None
    for block in blocks(path):
        title = block.options.get("title")
        if block.language == "text" and title == "Output":
            assert printed == block.text, f"{name_of(path)}:{block.line}"
        if block.language != "python" or title is not None:
            continue
        printed = None
        tree = ast.parse("\n" * (block.line - 1) + block.text, str(path))
        if missing_for(block):
            check_names(tree)
            continue
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            exec(compile(tree, str(path), "exec"), namespace)
        printed = stdout.getvalue()


def missing_for(block: Block) -> list[str]:
    """Returns which of the modules that a block needs are not there; no test has the network."""
    names = block.options.get("needs", "").split()
    return [name for name in names if importlib.util.find_spec(name) is None]


def check_names(tree: ast.AST) -> None:
    """Checks that the names of gptfast in some code exist, and the options of its functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gptfast"):
            try:
                module = importlib.import_module(node.module or "")
            except gptfast.ConfigError:  # it says which package is missing
                continue
            for each in node.names:
                assert hasattr(module, each.name), f"line {node.lineno}: {each.name}"
        elif isinstance(node, ast.Attribute):
            resolved(node)
        elif isinstance(node, ast.Call) and inspect.isfunction(called := resolved(node.func)):
            known = inspect.signature(called).parameters
            free = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known.values())
            for keyword in node.keywords:
                assert free or keyword.arg in known, f"line {node.lineno}: {keyword.arg}"


def resolved(node: ast.expr) -> Any:
    """Returns what `gptfast.a.b` stands for; None for any other expression."""
    if isinstance(node, ast.Name):
        return gptfast if node.id == "gptfast" else None
    parent = resolved(node.value) if isinstance(node, ast.Attribute) else None
    if parent is None or not isinstance(node, ast.Attribute):
        return None
    if isinstance(parent, ModuleType) and not hasattr(parent, node.attr):
        importlib.import_module(f"{parent.__name__}.{node.attr}")  # fails where there is none
    return getattr(parent, node.attr)


@pytest.mark.parametrize(
    "code",
    [
        "gptfast.loud('runs/s')",
        "gptfast.generate(model, [], tokeniser=None)",
        "from gptfast.training import Trayner",
    ],
)
def test_a_wrong_name_is_found(code: str) -> None:
    with pytest.raises((AssertionError, AttributeError, ImportError)):
        check_names(ast.parse(code))


def quotations() -> list[tuple[Path, str, str]]:
    """Returns page, file and text of each block that quotes a file."""
    found = [
        block for path in PAGES for block in blocks(path) if "/" in block.options.get("title", "")
    ]
    return [(block.path, block.options["title"], block.text) for block in found]


def test_quotations_are_what_the_sources_say() -> None:
    assert len(quotations()) > 10
    for path, file, text in quotations():
        missing = quoted(text, (ROOT / file).read_text(encoding="utf-8"))
        assert missing is None, f"{name_of(path)} quotes of {file}:\n{missing}"


def test_a_wrong_quotation_is_found() -> None:
    source = "def f():\n    a = 1\n    b = 2\n    return a\n"
    assert quoted("a = 1\nb = 2\n", source) is None
    assert quoted("def f():\n    ...\n    return a\n", source) is None
    assert quoted("a = 1\nreturn a\n", source) == "a = 1\nreturn a\n"
    assert quoted("return a\n...\na = 1\n", source) == "a = 1\n"


@pytest.fixture
def only_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every command end as soon as its options are known to be right."""
    of_data = commands.DATA.values()
    for command in {*cli.COMMANDS.values(), *of_data}:
        if hasattr(command, "run"):
            monkeypatch.setattr(command, "run", lambda self: 0)
    monkeypatch.setattr(commands.Train, "fit", lambda *_: 0)
    monkeypatch.setattr(commands.Train, "source", lambda self: None)


@pytest.mark.parametrize(
    "path", [path for path in [*PAGES, *SHARED] if commands_of(path)], ids=name_of
)
def test_commands_have_these_options(
    path: Path, folder: Path, only_parsed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in commands_of(path):
        arguments = own_arguments(words)
        if arguments is not None:
            code = cli.main(arguments)
            assert code == 0, f"{name_of(path)}: {' '.join(words)}: {capsys.readouterr().err}"
        elif words[0] == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), f"{name_of(path)}: {words[1]}"


def test_extras_and_targets_that_are_named_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in [*PAGES, *SHARED]:
        text = path.read_text(encoding="utf-8")
        for extras in re.findall(r"(?:gptfast-kernels|-e \"?\.)\[([\w,]+)\]", text):
            assert set(extras.split(",")) <= project["optional-dependencies"].keys(), path
        for target in re.findall(r"(?:`|^|&& )make ([\w-]+)", text, re.MULTILINE):
            assert target in targets, f"{name_of(path)}: make {target}"


def test_readme_has_every_command() -> None:
    named = {arguments[0] for words in commands_of(README) if (arguments := own_arguments(words))}
    assert named == set(cli.COMMANDS)


def navigation() -> list[str]:
    config = (ROOT / "mkdocs.yml").read_text()
    [part] = re.findall(r"^nav:\n(.*?)^\w", config, re.MULTILINE | re.DOTALL)
    return re.findall(r"([\w/]+\.md)$", part, re.MULTILINE)


def test_every_page_is_in_the_navigation_once() -> None:
    own = [str(path.relative_to(ROOT / "docs")) for path in PAGES]
    made = [page for page in HOOK["PAGES"].values() if page != "index.md"]
    assert sorted(navigation()) == sorted(own + made)


def test_sections_of_other_files_that_pages_show_exist() -> None:
    found = [each for path in PAGES for each in HOOK["INCLUDED"].findall(path.read_text())]
    assert len(found) > 3
    for place, title in found:
        assert HOOK["section"](place, title)
    with pytest.raises(ValueError, match="has no section 'None such'"):
        HOOK["section"]("README.md", "None such")


@pytest.mark.parametrize(
    "link, place, page, expected",
    [
        ("docs/gpu.md#shown", "README.md", "index.md", "gpu.md#shown"),
        ("docs/speed.svg", "README.md", "howto/train.md", "../speed.svg"),
        ("data/README.md", "README.md", "api/index.md", "../corpora.md"),
        ("../CHANGELOG.md", "docs/gpu.md", "gpu.md", "changelog.md"),
        ("../../README.md", "docs/howto/train.md", "howto/train.md", "../index.md"),
        ("https://a.org/b.md", "README.md", "howto/train.md", "https://a.org/b.md"),
        ("#here", "docs/gpu.md", "gpu.md", "#here"),
    ],
)
def test_links_lead_within_the_site(link: str, place: str, page: str, expected: str) -> None:
    relinked: Callable[..., str] = HOOK["relinked"]
    assert relinked(f"see [it]({link}), f(x)", place, page) == f"see [it]({expected}), f(x)"


def test_what_is_public_is_described() -> None:
    pages = [path.read_text() for path in (ROOT / "docs" / "api").glob("*.md")]
    described = {each for page in pages for each in re.findall(r"^::: (\S+)$", page, re.MULTILINE)}
    objects = {id(resolved(ast.parse(each, mode="eval").body)): each for each in described}
    for module in (gptfast, gptfast.ops, gptfast.data, gptfast.training):
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, type) or inspect.isfunction(value):
                assert id(value) in objects, (
                    f"no page of docs/api describes {module.__name__}.{name}"
                )


INLINE = re.compile(r"(?<!`)`(gptfast [^`]+)`(?!`)")
PLACEHOLDER = re.compile(r"\b(RUN|TEXT|FILE|DIR|PRESET|COMMAND)\b")


def commands_of_notebook(path: Path) -> list[list[str]]:
    """Returns the words of the commands in a notebook's texts, without those that name none."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    found = [*INLINE.findall("\n".join(texts))]
    for text in texts:
        found += re.findall(r"^```\n(gptfast .*?)^```", text, re.MULTILINE | re.DOTALL)
    return [
        words for text in found if not PLACEHOLDER.search(text) for words in command_lines(text)
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda p: p.stem)
def test_commands_of_notebooks_have_these_options(
    path: Path, folder: Path, only_parsed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in commands_of_notebook(path):
        arguments = own_arguments(words)
        assert arguments is not None
        assert cli.main(arguments) == 0, f"{' '.join(words)}: {capsys.readouterr().err}"


def test_byte_pairs_have_a_number_of_tokens() -> None:
    notebooks = sorted((ROOT / "examples").glob("*.ipynb"))
    found = [words for path in [*PAGES, *SHARED] for words in commands_of(path)]
    found += [words for path in notebooks for words in commands_of_notebook(path)]
    prepared = [words for words in found if "prepare" in words and "bpe" in words]
    assert len(prepared) > 2
    assert [words for words in prepared if "--vocab-size" not in words] == []
