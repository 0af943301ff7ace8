"""Ranking metrics against scikit-learn and plain loops, with ties and NaN; reward metrics against plain loops."""

import math
import re

import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score, top_k_accuracy_score

from massdpo.errors import UserError
from massdpo.evaluation.logps import SplitLogps, evaluate, predictions
from massdpo.evaluation.metrics import (
    METRICS,
    check_keep_metric,
    described,
    ranking_metrics,
    ranking_values,
    reward_metrics,
    reward_values,
    target_ranks,
)
from tests.conftest import ROOT


def plain_rank(scores: list[float], mask: list[bool]) -> int:
    """Worst rank the target can be given by any order of equal scores; what cannot be compared is above it."""
    rivals = [score for score, there in zip(scores[1:], mask[1:], strict=True) if there]
    return 1 + sum(not score < scores[0] for score in rivals)


def random_case(seed: int, prompts: int = 300, candidates: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores on a grid of 8 values (so ties abound), one in twenty NaN, pools of random length."""
    generator = torch.Generator().manual_seed(seed)
    scores_BC = torch.randint(8, (prompts, candidates), generator=generator).float()
    scores_BC[torch.rand(prompts, candidates, generator=generator) < 0.05] = math.nan
    length_B1 = torch.randint(2, candidates + 1, (prompts, 1), generator=generator)
    return scores_BC, torch.arange(candidates) < length_B1


@pytest.mark.parametrize("seed", range(3))
def test_ranks_equal_the_plain_loop(seed: int) -> None:
    scores_BC, mask_BC = random_case(seed)
    expected = [plain_rank(*row) for row in zip(scores_BC.tolist(), mask_BC.tolist(), strict=True)]
    assert target_ranks(scores_BC, mask_BC).tolist() == expected


def test_ties_and_nan_count_against_the_target() -> None:
    nan = math.nan
    scores_BC = torch.tensor([[1, 1, 0, 0], [nan, 5, 5, 5], [1, nan, 0, 0], [1, 0, 0, 9], [nan, nan, nan, nan]])
    mask_BC = torch.tensor([[True] * 4] * 3 + [[True, True, True, False]] + [[True] * 4])
    assert target_ranks(scores_BC, mask_BC).tolist() == [2, 4, 2, 1, 4]


def test_all_equal_scores_are_no_hits() -> None:
    """A model that says the same of every candidate, or NaN of all, must not look perfect."""
    mask_BC = torch.ones(5, 20, dtype=torch.bool)
    for value in (0.0, math.nan, math.inf, -math.inf):
        metrics = ranking_metrics(target_ranks(torch.full((5, 20), value), mask_BC))
        assert metrics["accuracy"] == 0 and metrics["recall@10"] == 0 and metrics["mrr"] == pytest.approx(1 / 20)


def test_ranking_metrics_equal_scikit_learn() -> None:
    """On distinct scores, where every convention about ties agrees."""
    generator = torch.Generator().manual_seed(0)
    scores_BC = torch.stack([torch.randperm(20, generator=generator) for _ in range(200)]).double()
    metrics = ranking_metrics(target_ranks(scores_BC, torch.ones_like(scores_BC, dtype=torch.bool)))
    relevance = np.zeros((200, 20))
    relevance[:, 0] = 1
    for k in (1, 3, 5, 10, 20):
        # 1e-12: the same float64 sums in another order
        assert metrics[f"ndcg@{k}"] == pytest.approx(ndcg_score(relevance, scores_BC.numpy(), k=k), abs=1e-12)
        if k < 20:  # scikit-learn calls k = all classes perfect by definition, with a warning
            hits = top_k_accuracy_score(np.zeros(200), scores_BC.numpy(), k=k, labels=np.arange(20))
            assert metrics[f"recall@{k}"] == pytest.approx(hits, abs=1e-12)
    assert metrics["accuracy"] == metrics["recall@1"] == metrics["ndcg@1"]


def test_values_are_per_prompt() -> None:
    values = ranking_values(torch.tensor([1, 2, 30]))
    assert values["accuracy"].tolist() == [1, 0, 0]
    assert values["ndcg@3"].tolist() == pytest.approx([1, 1 / math.log2(3), 0])
    assert values["recall@20"].tolist() == [1, 1, 0]
    assert values["mrr"].tolist() == pytest.approx([1, 1 / 2, 1 / 30])


def test_reward_metrics_equal_the_plain_loop() -> None:
    generator = torch.Generator().manual_seed(1)
    rewards_BC = torch.randint(-3, 4, (200, 8), generator=generator).float()  # a grid, so that ties occur
    rewards_BC[:, 0] += 2
    mask_BC = torch.arange(8) < torch.randint(2, 9, (200, 1), generator=generator)
    rewards_BC[~mask_BC] = 1e6  # what is not there must not count
    change_B = torch.randn(200, generator=generator)
    rows = []
    for rewards, mask, change in zip(rewards_BC.tolist(), mask_BC.tolist(), change_B.tolist(), strict=True):
        chosen, *rest = [reward for reward, there in zip(rewards, mask, strict=True) if there]
        rows.append(
            {
                "reward_accuracy": float(all(chosen > reward for reward in rest)),
                "reward_accuracy_pairwise": sum(chosen > reward for reward in rest) / len(rest),
                "margin": sum(chosen - reward for reward in rest) / len(rest),
                "margin_max": chosen - max(rest),
                "chosen_reward": chosen,
                "rejected_reward": sum(rest) / len(rest),
                "chosen_logp_change": change,
            }
        )
    values, metrics = reward_values(rewards_BC, mask_BC, change_B), reward_metrics(rewards_BC, mask_BC, change_B)
    assert set(metrics) == set(rows[0])
    for name in metrics:
        expected = [row[name] for row in rows]
        assert values[name].tolist() == pytest.approx(expected, abs=1e-12)
        assert metrics[name] == pytest.approx(np.mean(expected), abs=1e-12)


def test_a_reward_that_is_no_number_is_no_win() -> None:
    rewards_BC = torch.tensor([[math.nan, 0.0, 0.0], [1.0, math.nan, 0.0]])
    values = reward_values(rewards_BC, torch.ones(2, 3, dtype=torch.bool), torch.zeros(2))
    assert values["reward_accuracy"].tolist() == [0, 0]
    assert values["reward_accuracy_pairwise"].tolist() == [0, 0.5]
    assert values["margin"].isnan().all() and values["margin_max"].isnan().all()


# --- the table


def test_every_metric_of_a_run_is_in_the_table_and_comes_back_from_its_predictions() -> None:
    """What metrics.json says of a policy is the mean over predictions.jsonl of the column that the table names."""
    generator = torch.Generator().manual_seed(0)
    logp_SC, length_SC = torch.randn(2, 50, 6, generator=generator), torch.randint(1, 4, (50, 6), generator=generator)
    policy, reference = (SplitLogps(logp, length_SC) for logp in logp_SC)
    found = evaluate(policy, reference, beta=0.5)
    lines = predictions(policy, reference, 0.5, [str(place) for place in range(50)])
    assert set(found) == {name for name, metric in METRICS.items() if metric.of_rank or metric.of_rewards}
    for name, metric in METRICS.items():
        if metric.column:
            column = torch.tensor([float(line[metric.column]) for line in lines], dtype=torch.float64)
            values = metric.of_rank(column).double() if metric.of_rank else column
            assert float(values.mean()) == pytest.approx(found[name], abs=1e-12), name


def test_a_policy_is_kept_by_any_metric_of_validation_that_is_better_when_higher() -> None:
    for name in ("accuracy", "recall@20", "ndcg@20_sum", "margin_max"):
        check_keep_metric(name)
    for name, told in (
        ("acuracy", "did you mean 'accuracy'"),
        ("chosen_logp_change", "is not allowed"),
        ("train_seconds", "is not allowed"),
    ):
        with pytest.raises(UserError, match=told) as error:
            check_keep_metric(name)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_metric_of_another_split_is_described_by_its_entry() -> None:
    assert described("val/margin").label == "mean margin (validation)" and described("val/margin").unit == "β·nats"
    assert described("catalogue/ndcg@10").column == "catalogue_rank" and described("catalogue/items").column == ""
    assert described("my_own").label == "my own"


def test_the_pages_explain_every_metric_in_the_words_of_the_table() -> None:
    page = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    for metric in METRICS.values():
        if metric.column != "rank_sum":
            name, _, cutoff = metric.name.partition("@")
            number = "@N" if name in ("recall", "ndcg") else f"@{cutoff}" if cutoff else ""
            meaning = re.sub(r"first \d+$", "first N", metric.meaning)
            assert f"| `{name}{number}` | {meaning} |" in page, metric.name
