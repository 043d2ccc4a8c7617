"""Pages of the reference, one for each folder of modules, made as the site is built; and how docstrings are shown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from griffe import Docstring, Extension, Object
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGES = ("workbench", "circuits", "saes", "papers")
_NAMED = re.compile(r"(\S.*?) {2,}(\S.*)")


def modules() -> dict[str, list[str]]:
    """Names of modules by the page that they are on."""
    found: dict[str, list[str]] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[-1] != "__init__":
                found.setdefault(".".join(parts[:-1]), []).append(".".join(parts))
    return found


def on_config(config: Any) -> Any:
    config["nav"].append({"Reference": [{page: f"reference/{page}.md"} for page in modules()]})
    return config


def on_files(files: Files, config: Any) -> Files:
    for page, names in modules().items():
        blocks = "\n\n".join(f"::: {name}" for name in names)
        files.append(File.generated(config, f"reference/{page}.md", content=f"# {page}\n\n{blocks}\n"))
    return files


def as_list(text: str) -> str:
    """Lines such as `name   what it is` as a list; what is indented below one belongs to it."""
    out: list[str] = []
    inside = False
    for line in text.splitlines():
        match = _NAMED.fullmatch(line)
        if match:
            out += [*([] if inside else [""]), f"- **{match[1]}**: {match[2]}"]
            inside = True
        elif inside and line.startswith(" "):
            out[-1] += f" {line.strip()}"
        else:
            inside = False
            out.append(line)
    return "\n".join(out)


class Lists(Extension):  # type: ignore[misc]
    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring = Docstring(as_list(obj.docstring.value), parent=obj, lineno=obj.docstring.lineno)
