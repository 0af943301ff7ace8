"""What is told of picks and prompts is what was computed: picks.jsonl, predictions.jsonl and task=explain."""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from torch import Tensor

from massdpo import tasks
from massdpo.config import compose
from massdpo.data.prepare import prepare
from massdpo.errors import UserError
from massdpo.selection import Mass
from massdpo.store import Cache
from massdpo.tensors import Picks, PoolStatistics
from massdpo.training import checkpoints
from tests.test_experiment import TINY, cache, places, train  # noqa: F401  fixtures too

Seen = dict[str, tuple[PoolStatistics, Picks, int]]


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What the selector was given last for each prompt, and gave: filled in while a run goes."""
    found: Seen = {}
    select = Mass.__call__

    def spy(selector: Mass, pool: PoolStatistics) -> Picks:
        picks = select(selector, pool)
        found.update({name: (pool, picks, row) for row, name in enumerate(pool.ids)})
        return picks

    monkeypatch.setattr(Mass, "__call__", spy)
    return found


def plain_gains(pool: PoolStatistics, row: int, taken: list[int]) -> tuple[list[float], list[float]]:
    """Each pick's gain in log det, and the best that any negative would have gained there: by determinants alone."""

    def value(tensor: Tensor) -> np.ndarray:
        return tensor[row].double().numpy()

    assert pool.scores.features_BCD is not None
    features_ND = value(pool.scores.features_BCD - pool.scores.features_BCD[:, :1])[1:]
    share_N = np.exp(value(pool.rewards_BC)[1:])
    share_N /= share_N.sum()
    centred_ND = features_ND - share_N @ features_ND
    vectors_ND = np.sqrt(share_N)[:, None] * centred_ND / np.linalg.norm(centred_ND, axis=1, keepdims=True)
    gram_NN = vectors_ND @ vectors_ND.T / (vectors_ND**2).sum(1).mean()

    def logdet(some: list[int]) -> float:
        return float(np.linalg.slogdet(np.eye(len(some)) + gram_NN[np.ix_(some, some)])[1])

    before = [taken[:number] for number in range(len(taken))]
    gains = [logdet([*some, pick]) - logdet(some) for some, pick in zip(before, taken, strict=True)]
    best = [max(logdet([*some, other]) - logdet(some) for other in range(len(gram_NN))) for some in before]
    return gains, best


@pytest.mark.parametrize("refresh", ["step", "epoch"])
def test_picks_are_those_of_a_recomputed_selection(refresh: str, places: list[str], seen: Seen) -> None:  # noqa: F811
    run = train(*places, f"refresh={refresh}", "trainer.preference.epochs=2", "trainer.preference.learning_rate=0.01")
    lines = lines_of(run / "picks.jsonl")
    assert sorted(line["id"] for line in lines) == sorted(f"train/{row}" for row in range(64))
    assert {line["epoch"] for line in lines} == {1}  # the last one of two
    for line in lines:
        pool, picks, row = seen[line["id"]]
        taken = [pick["index"] for pick in line["picks"]]
        assert taken == picks.index_BK[row].tolist()
        assert [pick["text"] for pick in line["picks"]] == [line["candidates"][1 + index] for index in taken]
        gains, best = plain_gains(pool, row, taken)
        assert [pick["gain"] for pick in line["picks"]] == pytest.approx(gains, abs=2e-5)
        assert gains == pytest.approx(best, abs=1e-3)  # closer is a tie
        assert line["logdet"] == pytest.approx(sum(gains), abs=1e-4)
        assert 1 - 1 / math.e <= line.get("certificate", 1) <= 1
        reward_C = [
            0.5 * (now - start) for now, start in zip(pool.scores.logp_BC[row].tolist(), line["reference"], strict=True)
        ]
        total = sum(math.exp(reward) for reward in reward_C[1:])
        assert line["chosen_reward"] == pytest.approx(reward_C[0], abs=2e-3)
        for pick in line["picks"]:
            reward = reward_C[1 + pick["index"]]
            assert pick["reward"] == pytest.approx(reward, abs=2e-3)  # at the resolution of float32's log-probs
            assert pick["p"] == pytest.approx(math.exp(reward) / total, abs=2e-3)
            above = [sum(other > reward + gap for other in reward_C[1:]) for gap in (2e-3, -2e-3)]
            assert above[0] < pick["pool_rank"] <= max(above[1], above[0] + 1)
    assert any(max(pick["reward"] for pick in line["picks"]) > 0.05 for line in lines)  # it did learn
    assert refresh == "epoch" or "certificate" in lines[-1]  # the last step is logged


def test_selectors_without_scores_tell_the_rewards_that_were_trained_on(places: list[str]) -> None:  # noqa: F811
    lines = lines_of(train(*places, "selector=random", "trainer.preference.epochs=2") / "picks.jsonl")
    assert len(lines) == 64 and all(
        set(pick) == {"text", "index", "reward"} for line in lines for pick in line["picks"]
    )
    assert any(pick["reward"] for line in lines for pick in line["picks"])


def test_a_run_that_was_killed_writes_no_pick_twice(
    places: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed when lines were written and their checkpoint was not, it ends with the file of one that was not."""
    options = [*places, "trainer.picks=all", "trainer.preference.epochs=3", "trainer.checkpoint_every=3"]
    whole = train(*options, "name=whole") / "picks.jsonl"
    write, written = checkpoints.write, []

    def dies(place: Path, *rest: Any, **options: Any) -> None:
        written.append(place)
        if "single" in str(place) and "-00000006" in place.name:
            raise KeyboardInterrupt
        write(place, *rest, **options)

    monkeypatch.setattr(checkpoints, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        train(*options, "name=killed")
    monkeypatch.setattr(checkpoints, "write", write)
    killed = whole.parent.parent / "killed" / "picks.jsonl"
    assert len(lines_of(killed)) == 96  # six steps of 16, of which three and the epoch's end are in the checkpoint
    assert train(*options, "name=killed") / "picks.jsonl" == killed
    assert killed.read_bytes() == whole.read_bytes()
    assert set(Counter((line["id"], line["epoch"]) for line in lines_of(killed)).values()) == {1}


def test_predictions_name_the_candidates_in_the_order_of_their_scores(places: list[str]) -> None:  # noqa: F811
    run = train(*places)
    config = compose([*TINY, *places])
    examples = prepare(dict(config.dataset), Cache(Path(config.cache_dir))).test
    for line, example in zip(lines_of(run / "predictions.jsonl"), examples, strict=True):
        assert (line["id"], line["prompt"]) == (example.id, example.prompt)
        assert line["candidates"] == [example.chosen, *example.pool]
        above = sum(score > line["scores"][0] for score in line["scores"])
        assert line["rank"] == 1 + above and len(line["reference"]) == len(line["scores"]) == len(line["candidates"])


def test_explain_shows_what_the_run_says(
    places: list[str],  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The selector's picks under the final policy, its reward, and ranks, against the run's own files."""
    options = ["trainer.save_policy=true", "k=3", "seed=1", "beta=0.7", "name=told"]
    run = train(*places, *options)
    line = lines_of(run / "predictions.jsonl")[5]
    out = tmp_path / "shown.png"
    asked = ["task=explain", f"in={run}", f"out={out}", *places, "logger=none", "trainer.threads=1"]
    tasks.run(compose([*asked, f"id={line['id']}"]))
    said = capsys.readouterr().out
    assert "k=3" in said and line["prompt"] in said and imread(out).shape[0] > 300
    mean_C = [start / len_ for start, len_ in zip(line["reference"], lengths(run, line), strict=True)]
    before = 1 + sum(value > mean_C[0] for value in mean_C)
    assert re.search(rf"chosen +│ {re.escape(line['candidates'][0])} +│ {before} → {line['rank']} ", said), said
    picked = lines_of(run / "picks.jsonl")[0]
    tasks.run(compose([*asked, f"id={picked['id']}"]))
    assert f"picked in epoch 0: {' '.join(str(pick['index']) for pick in picked['picks'])} " in capsys.readouterr().out
    with pytest.raises(UserError, match=r"id=nobody: .* name no such prompt; the first and the last of 96"):
        tasks.run(compose([*asked, "id=nobody"]))


def lengths(run: Path, line: dict[str, Any]) -> list[int]:
    """Tokens of each candidate, by the scores that are there both summed and per token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "policy")
    return [len(tokenizer.encode(f" {text}", add_special_tokens=False)) + 1 for text in line["candidates"]]


@pytest.mark.parametrize(
    "damage", [{"reference": [1.0]}, {"picks": [{"index": 99}]}, {"picks": 3}, {"candidates": "text"}, {"prompt": 3}]
)
def test_a_damaged_line_is_told_in_one(damage: dict[str, Any], tmp_path: Path) -> None:
    from massdpo.tasks.explain import line_of

    line = {"id": "a", "prompt": "p", "candidates": ["x", "y"], "reference": [-1.0, -2.0], "picks": [{"index": 0}]}
    file = tmp_path / "picks.jsonl"
    file.write_text(json.dumps(line) + "\n")
    assert line_of(tmp_path, "a") == line
    file.write_text(json.dumps(line | damage) + "\n")
    with pytest.raises(UserError, match=r"picks.jsonl:1: [^\n]+$"):
        line_of(tmp_path, "a")
