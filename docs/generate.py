"""Writes build/messages.md and build/options.md, which pages of docs/ include: code and conf/ are their sources."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {  # folder of massdpo/ -> what its messages are about
    "config": "Options",
    "data": "Data",
    "model": "Models",
    "selection": "Selection",
    "training": "Training",
    "evaluation": "Evaluation",
    "runs": "Runs",
    "store": "Files",
    "tasks": "Tasks",
    "report": "Reports",
    "benchmark": "Benchmarks",
}
KEY = re.compile(r"^( *)(\w+):(?: ([^#\n]*?))?(?: +# (.*))?$", re.MULTILINE)


def messages(room: str) -> list[str]:
    """The texts that a room raises or reports as a user's mistakes, each once, in the order of the files."""
    found = []
    for file in sorted((ROOT / "massdpo" / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("UserError", "report")
            ):
                found.append(text_of(node.args[0]))
    return [message for message in dict.fromkeys(found) if re.search("[a-z]", message)]


def text_of(node: ast.AST) -> str:
    """A string of the code, with the names of what is filled in as capitals, or … where it has none."""
    match node:
        case ast.Constant(value=value):
            return str(value)
        case ast.JoinedStr(values=parts):
            return "".join(map(text_of, parts))
        case ast.FormattedValue(value=ast.Name(id=name)) | ast.FormattedValue(value=ast.Attribute(attr=name)):
            return name.upper()
        case ast.FormattedValue(value=ast.Call(func=ast.Name(id="shown" | "found"), args=[ast.Name(id=name)])):
            return name.upper()
    return "…"


def keys(name: str, prefix: str = "") -> str:
    """The keys of a file in conf/ that have a comment, as a table; what Hydra alone looks at is left out."""
    rows, above = ["| key | default | what it does |", "|---|---|---|"], ""
    text = (ROOT / "conf" / name).read_text(encoding="utf-8").split("\nhydra:")[0]
    for indent, key, value, comment in KEY.findall(text):
        above = above if indent else f"{key}."
        if comment and value:
            rows.append(f"| `{prefix}{above if indent else ''}{key}` | `{value}` | {in_cell(comment)} |")
    return "\n".join(rows)


def choices(group: str) -> str:
    """The options of a group, each with the first sentence of its file, as a table."""
    rows = ["| option | what it is |", "|---|---|"]
    for file in sorted((ROOT / "conf" / group).glob("*.yaml")):
        comment = " ".join(re.findall(r"^# (?!@)(.*)", file.read_text(encoding="utf-8"), re.MULTILINE))
        sentence = re.split(r"(?<=\.) (?=[A-Z])", comment)[0]
        rows.append(f"| `{file.stem}` | {in_cell(sentence)} |")
    return "\n".join(rows)


def in_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    sections = [
        f"### {title}\n\n" + "\n".join(f"- `` {text} ``" for text in messages(room)) for room, title in ROOMS.items()
    ]
    tables = {
        "Main keys": keys("config.yaml"),
        "Keys of the trainer": keys("trainer/cpu.yaml", "trainer."),
        "Keys of `selector=mass`": keys("selector/mass.yaml", "selector."),
        "Keys of `dataset=preferences`": keys("dataset/preferences.yaml", "dataset."),
    } | {
        f"Options of `{group}`": choices(group)
        for group in ("selector", "loss", "method", "trainer", "model", "dataset")
    }
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build" / "messages.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    options = "\n\n".join(f"### {title}\n\n{table}" for title, table in tables.items())
    (ROOT / "build" / "options.md").write_text(options + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
