"""`task=explain`: one prompt of a run: its candidates' ranks before and after, and what each selector would take.

Suffixes: N pool negatives, C = 1 + N candidates (column 0 is the chosen one); B = 1 prompt.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from massdpo.config import RULES, instantiate
from massdpo.config.options import options_of, read_option
from massdpo.console import summary_table
from massdpo.data.batches import collate
from massdpo.data.tokenize import tokenize_split
from massdpo.errors import UserError
from massdpo.report.prompt import Prompt, draw_prompt
from massdpo.runs import launch
from massdpo.runs.results import PICKS, PREDICTIONS, overrides
from massdpo.selection import logdet
from massdpo.selection.gram import candidate_gram
from massdpo.tasks.rank import example_of, questions, scorer_in, trained_with, writing_to
from massdpo.tensors import PoolStatistics
from massdpo.training.objectives import noise

OF_THE_RUN = ("k", "beta", "seed", "trainer.max_length", "trainer.chat_template")  # unless the command line sets them
WIDTH = 36  # characters shown of a response
Pools = Callable[[str | None], PoolStatistics]  # the pool, with the features that a selector looks at


def explain(config: DictConfig) -> None:
    """Show the prompt `id` of the run `in`, on the terminal and as a picture (`out`, or in the run's folder).

    Only policy/ is loaded from the run's folder; its other files are read as plain data. Selectors are those of
    conf/selector with their defaults, the chosen one with the command line's options, all with the run's k, beta and
    seed.

    Raises:
        UserError: the run's files do not name the prompt, or there is no policy.
    """
    accelerator = launch.start(config)
    run, name = Path(config["in"]).expanduser(), str(config.id)
    _take_from(run, config)
    line = line_of(run, name)
    scorer, tokenizer = scorer_in(run / "policy", config, accelerator)
    example = replace(example_of(name, line), id=name)
    options = config.trainer.max_length, config.trainer.chat_template
    (row,) = tokenize_split([example], tokenizer, *options, long_rows="truncate")
    batch = collate([(0, row)], tokenizer.pad_token_id).to(accelerator.device)
    reference_BC = torch.tensor([line["reference"]], device=accelerator.device)
    noise_BN = noise(batch, config.seed, int(line.get("epoch", 0)))

    @torch.no_grad()
    def pool_with(features: str | None) -> PoolStatistics:
        scorer.features = features
        return PoolStatistics(scorer(batch).scores, reference_BC, config.beta, noise_BN, batch.ids)

    pool = pool_with("mean")
    gram_BCC = candidate_gram(pool, "mean")
    prompt = Prompt(
        responses=[short(text) for text in line["candidates"]],
        before_C=ranks(reference_BC[0] / pool.scores.length_BC[0]),
        after_C=ranks(pool.scores.mean_logp_BC[0]),
        cosine_CC=logdet.unit_gram(gram_BCC, torch.zeros_like(gram_BCC[..., 0]))[0].cpu(),
        takes={selector: taken(config, selector, pool_with) for selector in options_of("selector")},
        trained_on=[pick["index"] for pick in line.get("picks", ())],
    )
    _tell(config, line, prompt, pool)
    out = Path(config.out or run / f"explain-{re.sub('[^A-Za-z0-9._-]', '_', name)}.png")
    with writing_to(str(out)):
        draw_prompt(prompt, f"{run.name}, {name}", out)
    print(f"picture: {out}")


def _take_from(run: Path, config: DictConfig) -> None:
    """Set what the run was trained with, unless the command line says otherwise."""
    given = {override.lstrip("+").split("=")[0] for override in overrides()}
    trained = OmegaConf.create(trained_with(run))
    for key in OF_THE_RUN:
        value = OmegaConf.select(trained, key)
        if key not in given and RULES[key].holds(value):
            OmegaConf.update(config, key, value)


def line_of(run: Path, name: str) -> dict[str, Any]:
    """The newest line of a prompt in the run's predictions.jsonl or picks.jsonl.

    Raises:
        UserError: there is none, or it is not as a run of this version writes it.
    """
    known: list[str] = []
    found = None
    for file in (run / PREDICTIONS, run / PICKS):
        for where, line in questions(file) if file.is_file() else ():
            known.append(str(line.get("id")))
            if known[-1] == name:
                found = where, line
    if found is None:
        some = f"; the first and the last of {len(set(known))} are {known[0]} and {known[-1]}" if known else ""
        raise UserError(f"id={name}: {PREDICTIONS} and {PICKS} in {run} name no such prompt{some}")
    where, line = found
    size = len(line["candidates"])
    try:
        numbers, places = line["reference"], [pick["index"] for pick in line.get("picks", ())]
        sound = len(numbers) == size > 1 and all(isinstance(number, float) for number in numbers)
        sound = sound and all(type(place) is int and 0 <= place < size - 1 for place in places)
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise UserError(f"{where}: reference must be {size} numbers, and picks places in a pool of {size - 1}")
    return line


def taken(config: DictConfig, selector: str, pool_with: Pools) -> list[int]:
    """What a selector would take from the pool as the policy sees it now, in pick order."""
    node = config.selector if selector == config.choices.selector else read_option("selector", selector)
    whole = OmegaConf.create({"k": config.k, "selector": OmegaConf.to_container(node)})
    if "short_pool" in whole.selector:
        whole.selector.short_pool = "all"
    pick = instantiate(whole.selector)
    picks = pick(pool_with(pick.features))
    places: list[int] = picks.index_BK[0][picks.mask_BK[0]].tolist()
    return places


def ranks(value_C: Tensor) -> list[int]:
    """Rank of each value, 1 for the largest."""
    places: list[int] = (value_C.argsort(descending=True, stable=True).argsort() + 1).tolist()
    return places


def short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"


def _tell(config: DictConfig, line: dict[str, Any], prompt: Prompt, pool: PoolStatistics) -> None:
    p_C = ["", *(f"{p:.3f}" for p in pool.rewards_BC[0, 1:].softmax(0).tolist())]
    closest_C = (prompt.cosine_CC - 3 * torch.eye(len(p_C))).max(1)  # but for itself
    rows = [
        {
            "pool": prompt.names[place],
            "response": prompt.responses[place],
            "rank": f"{prompt.before_C[place]} → {prompt.after_C[place]}",
            "reward": f"{pool.rewards_BC[0, place]:+.2f}",
            "p": p_C[place],
            "most similar": f"{prompt.names[int(closest_C.indices[place])]} ({closest_C.values[place]:+.2f})",
        }
        for place in sorted(range(len(p_C)), key=prompt.after_C.__getitem__)
    ]
    print(f"prompt: {line['prompt']}")
    summary_table("candidates, likeliest first; ranks: SFT start → trained", rows, whole=1)
    takes = [{"selector": name, "takes": " ".join(map(str, picks))} for name, picks in prompt.takes.items()]
    summary_table(f"what each selector would take from the pool now, k={config.k}", takes, whole=1)
    if prompt.trained_on:
        known = [f"{name} {line[name]:.3g}" for name in ("logdet", "certificate") if isinstance(line.get(name), float)]
        print(f"picked in epoch {line['epoch']}: {' '.join(map(str, prompt.trained_on))}  {', '.join(known)}")
