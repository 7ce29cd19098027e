"""What the site has beside the pages of docs/: README.md as its first page, and the API's reference.

Pages link files outside docs/, as a reader of the repository needs them; the site has copies of those.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import dist_train

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\]\(\.\./([\w./-]+)(#[\w-]*)?\)")

RECORDS = "dist_train.rundir.records"
REFERENCE = {
    "Names of `dist_train`": [f"dist_train.{name}" for name in dist_train.__all__],
    "What calls return": [
        "dist_train.api.Export",
        "dist_train.diagnostics.Replay",
        "dist_train.data.augmentation.ChannelStatistics",
        f"{RECORDS}.Outcome",
    ],
    "What observers get": [
        f"{RECORDS}.{name}" for name in ("TrainRecord", "EvaluationRecord", "EventRecord", "Measurement", "RunFacts")
    ],
    "What is raised": [
        f"dist_train.outcome.{name}"
        for name in ("UsageError", "FaultError", "DivergedError", "DisagreementError", "StoppedError")
    ],
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the first page, the reference, and the files outside docs/ that pages link."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = re.sub(r"\]\((?![a-z]+:|#|docs/)", "](../", readme).replace("](docs/", "](")
    reference = "# API reference\n\nFrom the docstrings. The guide is [From Python](python.md).\n"
    for title, names in REFERENCE.items():
        reference += f"\n## {title}\n" + "".join(f"\n::: {name}\n" for name in names)
    for name, content in (("index.md", first), ("api.md", reference)):
        files.append(File.generated(config, name, content=content))
    texts = [file.content_string for file in files.documentation_pages()]
    for linked in sorted({match[1] for text in texts for match in OUTSIDE.finditer(text)} - {"README.md"}):
        files.append(File.generated(config, _copy(linked), abs_src_path=str(ROOT / linked)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Have links lead to the site's own copies."""
    return OUTSIDE.sub(lambda match: f"]({_copy(match[1])}{match[2] or ''})", markdown)


def _copy(linked: str) -> str:
    """Return where the site has a file of the repository; a browser shows text, and downloads what it does not know."""
    if linked == "README.md":
        return "index.md"
    return f"repository/{linked}" if linked.endswith(".html") else f"repository/{linked}.txt"
