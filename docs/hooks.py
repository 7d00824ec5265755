"""What the site holds besides docs/: notebooks as pages, the API by room, the changelog, lists of what is there."""
import json
import re
from pathlib import Path

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
FLOOR = "ground floor"  # what the modules that belong to no room are called
ROOMS = ("data", "models", "evaluation", "training", "optimization",
         "tracking", "serving", "operations", "pipeline", "cli")
STEPS = ("prepare", "train", "evaluate", "optimize", "package", "report")
LINK = re.compile(r"\]\((?:\.\./)+(nbs|pipelines)/([\w/.-]+)\.ipynb\)")  # from docs/ into the tree
CSS = """.md-grid { max-width: 78rem }  /* code has lines of 120 characters */
.md-typeset table:not([class]) code { word-break: normal }
"""


def page_of(kind: str, name: str) -> str:
    "Return the page of a notebook: nbs/data/01_histories.ipynb stands at library/data/histories.md."
    room, _, file = name.rpartition("/")
    folder = "steps" if kind == "pipelines" else room or "ground-floor"
    return f"library/{folder}/{re.sub(r'^[0-9]+_', '', file)}.md"


def fence(text: str, opening: str = "text") -> str:
    "Put text into a code block that none of its lines can end."
    marks = "`" * max(3, *(len(found) + 1 for found in re.findall(r"^`+", text, re.MULTILINE)), 3)
    return f"{marks}{opening}\n{text.rstrip()}\n{marks}"


def output(found: dict) -> str:
    "Write one output of a cell: a picture, a table, or text."
    if found["output_type"] == "stream":
        return fence("".join(found["text"]))
    if found["output_type"] == "error":
        return fence(f"{found['ename']}: {found['evalue']}")
    data = {kind: "".join(value) for kind, value in found["data"].items() if isinstance(value, str | list)}
    shown = data.get("image/svg+xml") or data.get("text/html")
    if "image/png" in data:
        shown = f'<img alt="plot" src="data:image/png;base64,{"".join(data["image/png"].split())}">'
    return f"<div>{' '.join(shown.split())}</div>" if shown else fence(data.get("text/plain", ""))


def code(cell: dict, module: str) -> list[str]:
    "Write a code cell without its directives; cells that only keep house are left out."
    source = "".join(cell["source"])
    directives = set(re.findall(r"^#\|\s*(\S+)", source, re.MULTILINE))
    if not source.strip() or directives & {"hide", "default_exp"}:
        return []
    opening = f'{{ .python title="{module}" }}' if directives & {"export", "exports"} else "python"
    text = re.sub(r"^#\|.*\n?", "", source, flags=re.MULTILINE)
    return [fence(text, opening), *map(output, cell.get("outputs", []))]


def notebook(path: Path, module: str = "") -> str:
    "Write a notebook as Markdown."
    parts = []
    for cell in json.loads(path.read_text(encoding="utf8"))["cells"]:
        parts += code(cell, module) if cell["cell_type"] == "code" else ["".join(cell["source"])]
    return "\n\n".join(parts) + "\n"


def title_of(text: str) -> str:
    "Return the first heading of a page."
    return re.search(r"^# (.+)$", text, re.MULTILINE)[1]


def library() -> dict[str, dict[str, str]]:
    "Write every notebook: room → page → Markdown."
    found: dict[str, dict[str, str]] = {name: {} for name in (FLOOR, *ROOMS, "steps")}
    for path in sorted((ROOT / "nbs").rglob("[0-9]*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        name = path.relative_to(ROOT / "nbs").with_suffix("").as_posix()
        room, page = name.rpartition("/")[0], page_of("nbs", name)
        module = ".".join(filter(None, ("workbench", room, Path(page).stem)))
        found.setdefault(room or FLOOR, {})[page] = notebook(path, module)
    paths = [ROOT / "pipelines" / f"{name}.ipynb" for name in STEPS]
    found["steps"] = {page_of("pipelines", path.stem): notebook(path) for path in paths if path.is_file()}
    return {room: pages for room, pages in found.items() if pages}


def api() -> dict[str, str]:
    "Write a page for each room on which mkdocstrings lists its modules: page → Markdown."
    found = {}
    for room in ("", *ROOMS):
        names = [p.stem for p in sorted((ROOT / "workbench" / room).glob("*.py")) if not p.stem.startswith("_")]
        modules = [".".join(filter(None, ("workbench", room, name))) for name in names]
        text = "\n\n".join([f"# {room or FLOOR}", *(f"::: {name}" for name in modules)]) + "\n"
        found |= {f"api/{room or 'ground-floor'}.md": text} if modules else {}
    return found


def listed(folder: str, newest_first: bool = False) -> list[dict[str, str]]:
    "List the Markdown files of a folder of docs/ by their titles."
    paths = sorted((ROOT / "docs" / folder).glob("*.md"), reverse=newest_first)
    return [{title_of(path.read_text(encoding="utf8")): f"{folder}/{path.name}"} for path in paths]


def on_config(config):
    "Fill the lists that the navigation leaves open."
    books = [{room: [{title_of(text): page} for page, text in pages.items()]} for room, pages in library().items()]
    lists = {"Library": books, "API": [{title_of(text): page} for page, text in api().items()],
             "Benchmarks": listed("benchmarks", newest_first=True), "Decisions": listed("decisions")}
    config.nav = [{name: lists.get(name, there)} for entry in config.nav for name, there in entry.items()]
    return config


@event_priority(100)  # before the plugins look at the files
def on_files(files, config):
    "Add the pages that are made of other files."
    made = {page: text for pages in library().values() for page, text in pages.items()} | api() | {"site.css": CSS}
    made["changelog.md"] = (ROOT / "CHANGELOG.md").read_text(encoding="utf8")
    if not files.get_file_from_path("cli.md"):  # it is made from the program, and may not have been
        made["cli.md"] = "# The command line\n\n`workbench --help` and `workbench COMMAND --help` say it all.\n"
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    "Point links at notebooks to their pages, so that they work in the repository and on the site."
    up = "../" * page.file.src_uri.count("/")
    return LINK.sub(lambda found: f"]({up}{page_of(found[1], found[2])})", markdown)
