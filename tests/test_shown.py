"""What a finished run shows: its table, then and again, with standard errors, and the command to try next."""

import json
import shlex
from pathlib import Path

import pytest
from scipy.stats import sem

from massdpo import tasks
from massdpo.config import compose, validate
from massdpo.errors import UserError
from massdpo.runs.shown import SHOWN, comparison
from tests.test_experiment import cache, places, train  # noqa: F401  fixtures too


def test_a_run_is_shown_again_as_it_ended(places: list[str], capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    run = train(*places, "verbosity=normal", "trainer.preference.learning_rate=0.01")
    ended = capsys.readouterr().out
    tasks.run(compose(["task=show", f"in={run}"]))
    assert capsys.readouterr().out == ended and all(name in ended for name in SHOWN)
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    cells = {row.split("│")[1].strip(): row.split("│")[2:5] for row in ended.splitlines() if row.startswith("│")}
    values = {
        "accuracy": [line["rank"] == 1 for line in lines],
        "mrr": [1 / line["rank"] for line in lines],
        "accuracy_sum": [line["rank_sum"] == 1 for line in lines],
        "reward_accuracy": [line["reward_correct"] for line in lines],
        "margin": [line["margin"] for line in lines],
    }
    for name, of_prompts in values.items():
        assert float(cells[name][1]) == pytest.approx(sum(of_prompts) / len(of_prompts), abs=6e-4), name
        assert float(cells[name][2]) == pytest.approx(sem(of_prompts), abs=6e-4), name


@pytest.mark.parametrize("damage", ["nothing", "metrics", "predictions"])
def test_what_is_no_finished_run_is_told_in_one_line(damage: str, tmp_path: Path) -> None:
    if damage != "nothing":
        (tmp_path / "metrics.json").write_text('{"accuracy": "x"}' if damage == "metrics" else "{}")
        (tmp_path / "predictions.jsonl").write_text('{"rank": 1}\n' if damage == "metrics" else "[]\n")
    with pytest.raises(UserError, match=r"^[^\n]+$"):
        tasks.run(compose(["task=show", f"in={tmp_path}"]))


@pytest.mark.parametrize(
    ("given", "first"), [("", "mass"), ("method=sft", "mass"), ("selector=dpp seed=3 name=x force=true", "dpp")]
)
def test_what_to_try_next_keeps_the_users_own_options(given: str, first: str) -> None:
    own = ["k=3", "dataset.columns={prompt: ask, chosen: best}", "dataset=jsonl", "dataset.path=my file.jsonl"]
    words = shlex.split(comparison(shlex.join(["python", "run.py", *own, *given.split()])))
    assert words[:3] == ["python", "run.py", "-m"] and set(own) <= set(words)
    selectors = next(word for word in words if word.startswith("selector=")).removeprefix("selector=").split(",")
    assert selectors[0] == first and {"mass", "random", "hardest", "full"} <= set(selectors)
    assert not any(word.startswith(("method=", "name=", "force=")) for word in words)
    for selector in selectors:
        validate(compose([*(word for word in words[3:] if "," not in word), *own, f"selector={selector}"]))
