"""What the site has beside the pages of docs/: the API reference, pages of the project's root, and the sources that pages link to.

mkdocs calls the functions named ``on_...``. A link to a file that is not there stays as it is, and mkdocs, which does not find it either,
warns; ``--strict`` makes an error of that.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
ROOT_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md")
SOURCES = "source"
"""Folder of the site for files that pages link to and that are no pages."""

REFERENCE = "reference"
BACKENDS = "rectilinear.backends.contract"
"""Public though it lies deeper: what somebody who writes a backend needs."""

_LINK = re.compile(r"(!?\[[^\]]*\])\(([^)#\s]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"^(```.*?^```)$", re.M | re.S)
_NO_DESCRIPTION = re.compile(r'\s*\u2013\s*<div class="doc-md-description">\s*</div>')
_LANGUAGES = {".py": "python", ".cu": "cuda", ".toml": "toml", ".json": "json", ".yml": "yaml"}


def public_modules() -> list[str]:
    """`rectilinear`, each module or package below it that has an ``__all__``, and the contract of backends."""
    package = ROOT / "rectilinear"
    files = [*package.glob("*.py"), *package.glob("*/__init__.py")]
    named = [file for file in files if not file.name.startswith("__main__") and _exports(file) is not None]
    return sorted({".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in named} | {BACKENDS})


def public_names(module: str) -> list[str]:
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    names = _exports(file)
    if names is None:
        return [name for name in _named(file, imported=False) if name[0] != "_"]
    return sorted(names, key=_named(file, imported=True).index)


def _exports(file: Path) -> list[str] | None:
    for statement in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name) and statement.targets[0].id == "__all__":
            return [str(name) for name in ast.literal_eval(statement.value)]
    return None


def _named(file: Path, imported: bool) -> list[str]:
    """What a module defines, or imports too, in its order: a forward stands before its backward."""
    names: list[str] = []
    body = ast.parse(file.read_text(encoding="utf-8")).body
    body += [inner for statement in body if isinstance(statement, ast.If) for inner in statement.body]  # TYPE_CHECKING
    for statement in body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef):
            names.append(statement.name)
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            names.append(statement.target.id)
        elif isinstance(statement, ast.Assign):
            names += [target.id for target in statement.targets if isinstance(target, ast.Name)]
        elif isinstance(statement, ast.ImportFrom) and imported:
            names += [alias.asname or alias.name for alias in statement.names]
    return names


class Doctests(griffe.Extension):
    """Examples in a docstring that has no section for them are code too, where Markdown would see quotations."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        self.on_object(obj=pkg)

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring and not re.search(r"^Examples\n-+$", obj.docstring.value, re.M):
            obj.docstring.value = re.sub(r"^>>> .*(?:\n.+)*", "```python\n\\g<0>\n```", obj.docstring.value, flags=re.M)


# ---------------------------------------------------------------- mkdocs calls these


def on_config(config: Any) -> Any:
    for entry in config.nav:
        if entry.get("API reference"):
            entry["API reference"] = [{module: f"{REFERENCE}/{module}.md"} for module in public_modules()]
    return config


def on_files(files: Files, config: Any) -> Files:
    for module in public_modules():
        files.append(File.generated(config, f"{REFERENCE}/{module}.md", content=_reference(module)))
    for page in ROOT_PAGES:
        files.append(File.generated(config, page, content=(ROOT / page).read_text(encoding="utf-8")))
    linked = {
        source for file in files.documentation_pages() for source in (_source(file.src_uri, link) for _, link, _ in _links(file)) if source
    }
    for source in sorted(linked):
        files.append(File.generated(config, f"{SOURCES}/{source}.md", content=_listing(source), inclusion=_not_in_nav()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    here = page.file.src_uri

    def led(match: re.Match[str]) -> str:
        text, link, anchor = match.groups(default="")
        source = _source(here, link)
        target = f"{SOURCES}/{source}.md" if source else _site_path(here, link)
        return f"{text}({posixpath.relpath(target, posixpath.dirname(here) or '.')}{anchor})" if target else match.group()

    # Fenced blocks show links, and do not have them.
    return "".join(part if part.startswith("```") else _LINK.sub(led, part) for part in _FENCE.split(markdown))


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    if not page.file.src_uri.startswith(REFERENCE):
        return html
    html = html.replace("_EVERYTHING", "(True, True, True)")  # a constant, for its identity
    return _NO_DESCRIPTION.sub("", html)


# ---------------------------------------------------------------- links


def _links(file: File) -> list[tuple[str, str, str]]:
    return _LINK.findall(file.content_string)


def _in_project(page: str, link: str) -> str | None:
    """Where in the project a relative link of a page leads, if there is something."""
    if ":" in link or page.startswith((SOURCES, REFERENCE)):
        return None
    folder = "" if page in ROOT_PAGES else posixpath.join("docs", posixpath.dirname(page))
    target = posixpath.normpath(posixpath.join(folder, link))
    return target if not target.startswith("..") and (ROOT / target).exists() else None


def _source(page: str, link: str) -> str | None:
    """The same, where it is a source to show: neither a page nor a picture of the site."""
    target = _in_project(page, link)
    if target is None or target in ROOT_PAGES or (target.startswith("docs/") and not target.endswith((".py", ".json", ".csv"))):
        return None
    return target


def _site_path(page: str, link: str) -> str | None:
    target = _in_project(page, link)
    return target and target.removeprefix("docs/")


# ---------------------------------------------------------------- pages made here


def _reference(module: str) -> str:
    members = "".join(f"        - {name}\n" for name in public_names(module))
    return f"# {module}\n\n::: {module}\n    options:\n      members:\n{members}"


def _listing(source: str) -> str:
    """A file's text, or the names in a folder."""
    path = ROOT / source
    head = f"---\nsearch:\n  exclude: true\n---\n\n# {source}\n\n"
    if path.is_dir():
        return head + "".join(f"- `{entry.name}`\n" for entry in sorted(path.iterdir()) if entry.name[0] not in "._")
    if path.suffix == ".md":
        return head + path.read_text(encoding="utf-8")
    return f"{head}````{_LANGUAGES.get(path.suffix, 'text')}\n{path.read_text(encoding='utf-8')}\n````\n"


def _not_in_nav() -> Any:
    from mkdocs.structure.files import InclusionLevel

    return InclusionLevel.NOT_IN_NAV
