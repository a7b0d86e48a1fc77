"""What the site shows of the repository outside docs/, and the check that a page fetches nothing from elsewhere.

CHANGELOG.md, CONTRIBUTING.md and SECURITY.md become pages. Whatever else a page links to in the repository, a script
or a notebook, gets a page that shows it. So every link of the texts works in the repository and on the site, and one
that leads nowhere fails the build.
"""

import json
import posixpath
import re
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "README.md": "index.md",
    "docs/README.md": "index.md",
}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".cff": "yaml", ".toml": "toml"}
LINK = re.compile(r"(\[[^\[\]]*)?(\]\()([^)\s]+)(\))")
_installed = tempfile.TemporaryDirectory(prefix="ponder-hf-docs-")


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Let mkdocstrings find the package as it is once installed, with modeling/ and conversion/ in it."""
    package = Path(_installed.name) / "ponder_hf"
    package.mkdir(exist_ok=True)
    for path in [*(ROOT / "ponder_hf").iterdir(), ROOT / "modeling", ROOT / "conversion"]:
        if not (package / path.name).exists():
            (package / path.name).symlink_to(path)
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [_installed.name]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of what lies outside docs/."""
    for name, page in PAGES.items():
        if files.get_file_from_path(page) is None:
            files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    texts = {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    texts |= {name: (ROOT / name).read_text(encoding="utf-8") for name, page in PAGES.items() if page != "index.md"}
    for name, text in texts.items():
        for found in LINK.finditer(text):
            path = _in_repository(name, found[3].partition("#")[0])
            if path is None or _on_site(path) != f"source/{path}.md":
                continue
            if (ROOT / path).is_file() and files.get_file_from_path(_on_site(path)) is None:
                files.append(File.generated(config, _on_site(path), content=_shown(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links within the repository into links within the site."""
    if page.file.src_uri.startswith("source/"):
        return markdown
    name = {site: name for name, site in PAGES.items() if site != "index.md"}.get(
        page.file.src_uri, f"docs/{page.file.src_uri}"
    )

    titles = dict(_titles(config.nav))

    def linked(found: re.Match) -> str:
        said, middle, link, end = found.groups(default="")
        target, mark, anchor = link.partition("#")
        path = _in_repository(name, target)
        if path is None:
            return found[0]
        if said.endswith(f"{posixpath.basename(path)}"):  # a page that is called by its file's name
            said = f"[{titles.get(_on_site(path), said.removeprefix('['))}"
        return f"{said}{middle}{_on_site(path)}{mark}{anchor}{end}"

    return LINK.sub(linked, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Fail where a page would fetch a script, a style, a font or a picture from another place."""
    found = []
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix == ".html":
            fetched = _Fetched()
            fetched.feed(path.read_text(encoding="utf-8"))
            found += [f"{path.name}: {each}" for each in fetched.elsewhere]
        elif path.suffix == ".css":
            text = path.read_text(encoding="utf-8")
            found += [
                f"{path.name}: {each}"
                for each in re.findall(r"(?:url\(|@import\s)[\"']?((?:https?:)?//[^\"')]+)", text)
            ]
    if found:
        raise PluginError("fetched from elsewhere:\n  " + "\n  ".join(found))


class _Fetched(HTMLParser):
    """Which addresses elsewhere a browser would fetch to show a page. Links that a reader follows do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.elsewhere: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "link" and values.get("rel") in ("canonical", "next", "prev"):
            return
        address = values.get("href" if tag == "link" else "src", "") if tag != "a" else ""
        if re.match(r"(https?:)?//", address):
            self.elsewhere.append(address)
        if "mermaid" in values.get("class", "").split():  # material fetches the library that draws them
            self.elsewhere.append("a mermaid diagram")


def _titles(entries: list[dict]) -> Iterator[tuple[str, str]]:
    """Each page of the navigation with its title."""
    for entry in entries:
        for title, value in entry.items():
            yield from _titles(value) if isinstance(value, list) else [(value, title)]


def _in_repository(name: str, target: str) -> str | None:
    """The path in the repository of what a text links to; None for an address or a place in the same text."""
    if not target or re.match(r"[a-z]+:", target):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), target))


def _on_site(path: str) -> str:
    """Where the site has a file of the repository."""
    return PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.md")


def _shown(path: str) -> str:
    """A page that shows a file: a notebook as text and code, anything else as it is."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".ipynb"):
        cells = json.loads(text)["cells"]
        parts = [_cell("".join(cell["source"]), cell["cell_type"]) for cell in cells]
        return "\n\n".join([*parts, f"*This is `{path}` of the repository, a notebook that a test runs.*"]) + "\n"
    return f"# {path}\n\n````{LANGUAGES.get(Path(path).suffix, 'text')}\n{text}\n````\n"


def _cell(source: str, kind: str) -> str:
    return source if kind == "markdown" else f"````python\n{source}\n````"
