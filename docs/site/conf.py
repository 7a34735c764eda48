"""The static site of docs/, whose first page is the README.

pip install ".[docs]" && sphinx-build -W --keep-going -c docs/site docs runs/site
"""

import re
from pathlib import Path

project = html_title = "Efficient attention in JAX"
html_theme = "furo"
extensions = ["myst_parser", "sphinxcontrib.mermaid"]
exclude_patterns = ["site"]
myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]
html_copy_source = False
html_show_sphinx = False


def with_readme(app, name, source):
    """The README before the first page's list of pages; links to files beside docs/ are text."""
    if name == "index":
        path = Path(app.srcdir).parent / "README.md"
        app.env.note_dependency(str(path))
        text = re.sub(r"\[([^]]+)\]\((?!\w+:|#|docs/)[^)]*\)", r"\1", path.read_text())
        source[0] = text.replace("](docs/", "](") + source[0]


def setup(app):
    """Called by sphinx."""
    app.connect("source-read", with_readme)
