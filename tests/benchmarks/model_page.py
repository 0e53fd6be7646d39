"""The help page that lists what models.py found for every class of transformers."""

import re
from pathlib import Path

import jinja2

PAGE = Path(__file__).parents[2] / "prefix_distill" / "help" / "model-classes.md"
TEMPLATE = Path(__file__).with_name("model_page.md.jinja")
OPTIONS = {
    "checkpointing": "`--gradient-checkpointing`",
    "bfloat16": "`--dtype bfloat16`",
    "lora": "`--lora`",
}


def render(document: dict) -> str:
    """Return the page in Markdown from the document of models.py."""
    working, refusals = [], []
    for row in sorted(document["classes"], key=lambda row: row["class"].lower()):
        limits = row.get("limits", {})
        if row["outcome"] == "works":
            worst = max(row["figures"], key=row["figures"].get)
            largest = f"{row['figures'][worst]:.0e}"
            working.append({"class": row["class"], "largest": largest, "worst": worst})
        if row["outcome"] == "refused":
            refusals.append({"name": row["class"], "obstacle": shorten(row["refusal"])})
        for name, text in limits.items():
            refusals.append(
                {"name": f"{row['class']} with {OPTIONS[name]}", "obstacle": shorten(text)}
            )
    repeated: dict[str, int] = {}
    for row in document["classes"]:
        if "versions" in row:
            packages = ", ".join(f"{name} {text}" for name, text in row["versions"].items())
            repeated[packages] = repeated.get(packages, 0) + 1
    template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), keep_trailing_newline=True)
    return template.render(**document, working=working, refusals=refusals, repeated=repeated)


def shorten(refusal: str) -> str:
    """Return a refusal without the model's path, and without the advice at its end."""
    text = re.sub(r"(model )?/\S+/(student|teacher): ", "", refusal)
    text = re.sub(r"/\S+/(student|teacher)", "the model", text)
    return text.split("; use another model")[0].replace("|", "/")
