"""What README.md and the pages of docs/ say is so: their commands run, and their tables name what is in conf/."""

import csv
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from massdpo.config import compose, validate
from massdpo.config.rules import RULES
from massdpo.errors import UserError
from massdpo.runs.shown import GENERATED
from tests.conftest import ROOT, SHARED_DATA, needs_shared_data
from tests.test_impressions import mind

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)
LINES = [line.split("  #")[0].strip() for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
COMMANDS = [
    line for line in dict.fromkeys(LINES) if re.match(r"python run\.py|(torchrun|accelerate launch) .*run\.py", line)
]
# What needs a GPU, weights from the hub or an account is composed and checked, not run.
COMPOSED = [line for line in COMMANDS if re.search(r"torchrun|accelerate|trainer=(gpu|lora)|logger\.mode=online", line)]
RUN = [line for line in COMMANDS if line not in COMPOSED]
QUICK = "python run.py selector=mass k=4"  # the first thing that anyone runs stays among the fast tests
SMALL = (
    *("dataset.limit_train=48", "dataset.limit_val=16", "dataset.limit_test=16"),
    *("trainer.sft.epochs=1", "trainer.preference.epochs=1"),
)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader would stand: the files that the pages' commands name, and their own blocks as files."""
    desk = tmp_path_factory.mktemp("readme")
    preference, question = blocks("json", 2)
    row = json.loads(preference)
    rows = [{**row, "prompt": f"{row['prompt']} ({number})"} for number in range(60)]
    (desk / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (desk / "questions.jsonl").write_text(question, encoding="utf-8")
    (desk / "shop").mkdir()
    with open(desk / "shop" / "items.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("item", "title"), *((item, f"thing {item}") for item in range(40))])
    with open(desk / "shop" / "interactions.csv", "w", newline="", encoding="utf-8") as file:
        met = [(user, (user + 3 * time) % 40, time) for user in range(30) for time in range(6)]
        csv.writer(file).writerows([("user", "item", "time"), *met])
    mind(
        desk / "MINDsmall",
        [(f"U{row}", [row % 9], {at % 12: at == row for at in range(row, row + 7)}) for row in range(60)],
    )
    (desk / "data").symlink_to(SHARED_DATA)
    (desk / "my_selectors.py").write_text(*blocks("python", 1), encoding="utf-8")
    (desk / "conf" / "selector").mkdir(parents=True)
    (desk / "conf" / "selector" / "longest.yaml").write_text(*blocks("yaml", 1), encoding="utf-8")
    return desk


def blocks(kind: str, count: int) -> list[str]:
    found = [text for name, text in BLOCKS if name == kind]
    assert len(found) == count
    return found


def run(command: str, desk: Path) -> list[Path]:
    """Run a command of the pages small, from the reader's desk; returns the folders of the runs that it made."""
    before = set(desk.glob("results/runs/*/*/metrics.json"))
    arguments = shlex.split(command)[2:]
    extra = [*SMALL, f"hydra.searchpath=[file://{ROOT},file://{desk / 'conf'}]"]
    if not any(argument.startswith("logger=") for argument in arguments):
        extra.append("logger=none")
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *arguments, *extra],
        cwd=desk,
        env=os.environ | {"MASSDPO_CACHE": str(desk / "cache"), "PYTHONPATH": str(desk)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    if "task=inspect" in arguments:
        assert "lookup/accuracy" in done.stdout
    for out in (argument.removeprefix("out=") for argument in arguments if argument.startswith("out=")):
        assert (desk / out).exists() or "task=push" in arguments, f"{command} made no {out}"
    return sorted(path.parent for path in set(desk.glob("results/runs/*/*/metrics.json")) - before)


def test_the_first_command(desk: Path) -> None:
    """It runs, leaves the files that the pages list, and measures what they explain."""
    assert QUICK in RUN
    (folder,) = run(QUICK, desk)
    files = first_column(section("What a run leaves"))
    assert {"metrics.json", "history.csv", "predictions.jsonl", "policy/", "config.yaml", "status.json"} <= files
    assert [name for name in files if not (folder / name).exists()] == []
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    explained = first_column(section("What the numbers mean")) - {"..._sum", "sft/...", "val/...", *GENERATED}
    assert [name for name in explained if name.replace("@N", "@5") not in metrics] == []


@pytest.mark.slow
@pytest.mark.parametrize("command", [line for line in RUN if not re.search(r"k=4$|raw_dir=data/|first", line)])
def test_a_command_runs(command: str, desk: Path) -> None:
    folders = run(command, desk)
    jobs = 0 if "task=" in command else 1
    if " -m " in command:
        for argument in shlex.split(command)[3:]:
            jobs *= len(argument.split("=")[1].split(","))
    assert len(folders) == jobs
    if "sweep=mine" in command:  # the line below it on the page
        report = [sys.executable, "-m", "massdpo.report", "mine"]
        subprocess.run(report, cwd=desk, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
        assert (
            desk / "results" / "runs" / "reports" / "index.html"
        ).exists() and "python -m massdpo.report mine" in LINES


@pytest.mark.slow
def test_a_run_is_of_use_afterwards(desk: Path) -> None:
    """The commands that work on the run named `first`, in the order in which they stand."""
    commands = [line for line in RUN if "first" in line]
    assert [len(run(command, desk)) for command in commands] == [1, 0, 0, 0, 0, 0, 0]
    ranked = json.loads((desk / "ranked.jsonl").read_text(encoding="utf-8"))
    assert sorted(ranked["candidates"]) == sorted(json.loads(blocks("json", 2)[1])["candidates"])


@pytest.mark.slow
@needs_shared_data
@pytest.mark.parametrize("command", [line for line in RUN if "raw_dir=data/" in line])
def test_a_command_on_real_data_runs(command: str, desk: Path) -> None:
    assert len(run(command, desk)) == 1


@pytest.mark.parametrize("command", COMPOSED)
def test_a_command_for_other_machines_is_valid(command: str) -> None:
    overrides = shlex.split(command.split("run.py")[1])
    validate(compose([*overrides, "trainer.device=cpu"]))


def test_the_commands_are_found() -> None:
    """A typo in a block's fence would take its commands out of every test above."""
    lines = re.findall(r"^(?:python run\.py|torchrun|accelerate launch)\b.*", TEXT, flags=re.MULTILINE)
    assert len(COMMANDS) == len({line.split("  #")[0].strip() for line in lines}) >= 12


def test_the_tables_name_every_option() -> None:
    for row in rows_of(section("Options")):
        group, options = row.split("|")[1].strip(" `"), row.split("|")[2]
        named = set(re.findall(r"`(\w+)`", options))
        if group == "model":
            named = {name for name in named if (ROOT / "conf" / "model" / f"{name}.yaml").exists()}
            named |= {f"{size}_{family}" for size in ("tiny", "small") for family in ("llama", "gemma", "phi", "qwen")}
        assert named == {path.stem for path in shipped(f"conf/{group}")}, group


def test_the_terms_are_those_of_the_datasets() -> None:
    stated = {}
    for path in shipped("conf/dataset"):
        if terms := yaml.safe_load(path.read_text(encoding="utf-8")).get("terms"):
            stated[path.stem] = terms
    table = {}
    for row in rows_of("| dataset | terms |" + section("Your data").split("| dataset | terms |")[1]):
        names, terms = row.split("|")[1:3]
        table |= {name: terms.strip() for name in re.findall(r"`(\w+)`", names)}
    assert table == stated


def test_every_page_is_on_the_site_and_has_a_door() -> None:
    named = re.findall(r"^  - .+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    readme = PAGES[0].read_text(encoding="utf-8")
    pages = {page.name for page in PAGES[1:]}
    assert set(named) == pages == set(re.findall(r"\]\(docs/([\w-]+\.md)\)", readme))
    assert len(readme.splitlines()) <= 250


def test_the_generated_tables_have_every_message_and_key() -> None:
    """Messages without fillings as they stand in the source, and those that a user is really shown; keys of conf/."""
    made = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    messages = [message for room in made["ROOMS"] for message in made["messages"](room)]
    source = "\n".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "massdpo").rglob("*.py")))
    plain = re.findall(r'UserError\(\s*"([^"]+)"\s*\)', source)
    assert len(plain) > 20 and set(plain) <= set(messages)
    patterns = [re.compile(re.sub("…|[A-Z_]{2,}", ".*", re.escape(message)), re.DOTALL) for message in messages]
    for wrong in (["loss=dpo"], ["k=0"], ["model.nosuch=1"], ["trainer.adapter=3"], ["task=rank"], ["k=99"]):
        with pytest.raises(UserError) as shown:
            validate(compose(wrong))
        assert any(pattern.fullmatch(str(shown.value)) for pattern in patterns), shown.value
    listed = set(re.findall(r"^\| `([\w.]+)` \|", made["keys"]("trainer/cpu.yaml", "trainer."), flags=re.MULTILINE))
    known = {key for key in RULES if key.startswith("trainer.") and not key.startswith("trainer.adapter.")}
    assert listed == known
    assert "| `mass` | the subset with the largest log-det" in made["choices"]("selector")


def test_the_make_commands_exist() -> None:
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    used = {word for line in LINES if line.startswith("make ") for word in line.split()[1:]}
    assert used and used <= set(targets)


def shipped(folder: str) -> list[Path]:
    """The options that belong to the project, which one's own beside them do not."""
    listed = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.splitlines()]


def section(title: str) -> str:
    """The text below a heading that begins so, down to the next heading of its rank or a higher one."""
    marks, rest = re.search(rf"^(#+) {title}[^\n]*\n(.*)", TEXT, flags=re.DOTALL | re.MULTILINE).groups()  # type: ignore[union-attr]
    return re.split(rf"^#{{1,{len(marks)}}} ", rest, flags=re.MULTILINE)[0]


def first_column(text: str) -> set[str]:
    """The names in code type in the first column of the table in a text."""
    return {name for row in rows_of(text) for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


def rows_of(text: str) -> list[str]:
    """The rows of the first table in a text, without its head."""
    return re.findall(r"^\|.*", re.search(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)[0], flags=re.MULTILINE)[2:]  # type: ignore[index]
