"""Ranking against the whole catalogue, from the command to the metrics, against one plain sequence per title."""

import csv
import json
from pathlib import Path

import pytest

from massdpo import tasks
from massdpo.config import compose
from massdpo.data.prepare import prepare
from massdpo.data.readers.recommendation import UserSequences
from massdpo.data.tokenize import tokenize_catalogue, tokenize_split
from massdpo.errors import UserError
from massdpo.model.scratch import learn_tokenizer
from massdpo.store import Cache
from tests.test_recommendation import write_interactions
from tests.test_tasks import MODEL, plain_scores

ITEMS = 26


def options(folder: Path) -> list[str]:
    data = ["dataset=sequences", f"dataset.raw_dir={folder}", "dataset.num_negatives=5"]
    data += ["dataset.candidates=all", "dataset.list_candidates=false", "dataset.limit_test=6"]
    return [
        *MODEL,
        *data,
        "logger=none",
        "trainer.eval_batch_size=4",
        f"cache_dir={folder / 'cache'}",
        f"runs_dir={folder / 'runs'}",
    ]


def test_ranks_are_those_of_each_title_alone_among_what_the_user_has_not_met(tmp_path: Path) -> None:
    write_interactions(tmp_path, users=20, length=6, items=ITEMS)
    given = options(tmp_path)
    tasks.run(compose([*given, "name=run", "trainer.save_policy=true"]))
    run = tmp_path / "runs" / "single" / "run"
    own = json.loads((run / "metrics.json").read_text())
    config = compose(given)
    titles = [row["title"] for row in csv.DictReader((tmp_path / "items.csv").open())]
    met: dict[str, list[tuple[int, str]]] = {}
    for row in csv.DictReader((tmp_path / "interactions.csv").open()):
        met.setdefault(row["user"], []).append((int(row["time"]), titles[int(row["item"])]))
    everyone = {title for rows in met.values() for _, title in rows}
    ranks = []
    for example in prepare(dict(config.dataset), Cache(tmp_path / "other")).test:
        before = [title for _, title in sorted(met[example.meta["user"]])[: example.meta["position"]]]
        rivals = sorted(everyone - {*before, example.chosen})
        chosen, *others = plain_scores(run / "policy", example.prompt, [example.chosen, *rivals])
        ranks.append(1 + sum(score > chosen for score in others))
    assert own["catalogue/mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / len(ranks), abs=1e-6)
    assert own["catalogue/items"] == len(everyone) and own["catalogue/seconds"] > 0
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [line["catalogue_rank"] for line in lines] == ranks
    assert any(line["catalogue_rank"] > line["rank"] for line in lines)  # a slate hides most rivals

    out = tmp_path / "found.json"
    tasks.run(compose([*given, "task=evaluate", f"in={run}", f"out={out}"]))
    found = json.loads(out.read_text())
    for name in ("catalogue/mrr", "catalogue/recall@5", "catalogue/ndcg@10_sum", "mrr"):
        assert found[name] == pytest.approx(own[name], abs=1e-6)


def test_what_cannot_be_ranked_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    write_interactions(tmp_path, users=20, length=6, items=ITEMS)
    with pytest.raises(UserError, match=r"no prompt may list some: set dataset.list_candidates=false"):
        UserSequences(raw_dir="x", candidates="all")
    splits = UserSequences(raw_dir=str(tmp_path), num_negatives=5, candidates="all", list_candidates=False).load()
    tokenizer = learn_tokenizer([example.prompt for example in splits.train], 300)
    test = tokenize_split(splits.test, tokenizer, 512)
    room = test.report["longest_prompt"] + max(len(ids) for ids in tokenize_catalogue(["abc"], tokenizer, test, 512))
    assert len(tokenize_catalogue(["abc"], tokenizer, test, room)) == 1
    with pytest.raises(UserError, match=rf"trainer.max_length={room - 1}: raise it, or lower dataset.max_history"):
        tokenize_catalogue(["abc"], tokenizer, test, room - 1)
