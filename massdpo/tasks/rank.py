"""Rank the candidates of any prompt with a trained policy, line by line: for use behind another program.

Suffixes: B prompts of a batch, C candidates.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import torch
from omegaconf import DictConfig
from torch import nn

from massdpo.data.batches import collate
from massdpo.data.chat import settle_chat_template
from massdpo.data.schema import PreferenceExample
from massdpo.data.text import read_jsonl
from massdpo.data.tokenize import tokenize_split
from massdpo.errors import UserError
from massdpo.model.save import load_policy
from massdpo.model.scoring import PreferenceScorer
from massdpo.runs import launch
from massdpo.store import replacing


def rank(config: DictConfig) -> None:
    """Rank the candidates of each {"prompt", "candidates"} line of `in` by the mean log-prob of a token.

    Lines go out in their order as they came, with `candidates` best first and their `scores` (nats a token) beside
    them; equals keep their order. `in=-` reads stdin and `out=-` writes stdout, `trainer.eval_batch_size` lines at a
    time: set it to 1 for a program that waits for each answer. A file is written whole or not at all.

    Raises:
        UserError: no policy in `policy`, or a line (named) that cannot be ranked.
    """
    accelerator = launch.start(config)
    if accelerator.num_processes > 1:
        raise UserError("task=rank runs in one process: start it without torchrun")
    policy, tokenizer = policy_in(Path(config.policy).expanduser(), config)
    scorer = PreferenceScorer(policy, None, config.trainer.layout)
    scorer = accelerator.prepare_model(scorer, evaluation_mode=True).eval()
    trainer = config.trainer
    lines = _questions(Path("/dev/stdin" if config["in"] == "-" else config["in"]))
    differences = 0
    with _output(config.out) as sink:
        while batch := list(islice(lines, trainer.eval_batch_size)):
            examples = [_example(*line) for line in batch]
            rows = tokenize_split(examples, tokenizer, trainer.max_length, trainer.chat_template)
            differences += rows.report["boundary_differences"]
            with torch.no_grad():
                tokens = collate(list(enumerate(rows)), tokenizer.pad_token_id).to(accelerator.device)
                mean_logp_BC = scorer(tokens).scores.mean_logp_BC.tolist()
            for (_, line), scores in zip(batch, mean_logp_BC, strict=True):
                texts = line["candidates"]
                order = sorted(range(len(texts)), key=lambda place: -scores[place])
                ranked = {
                    "candidates": [texts[place] for place in order],
                    "scores": [scores[place] for place in order],
                }
                sink.write(json.dumps(line | ranked, ensure_ascii=False) + "\n")
            sink.flush()
    if differences:
        print(f"warning: {differences} prompts have a candidate that joins them in other tokens", file=sys.stderr)


def policy_in(folder: Path, config: DictConfig) -> tuple[nn.Module, Any]:
    """A trained policy and its tokenizer, where the options fit it."""
    if not folder.is_dir():
        raise UserError(f"there is no policy in {folder}: name what a run with trainer.save_policy=true left")
    policy, tokenizer = load_policy(folder)
    context = policy.config.get_text_config().max_position_embeddings
    if config.trainer.max_length > context:
        raise UserError(f"trainer.max_length={config.trainer.max_length}: the model's context holds {context} tokens")
    if config.trainer.chat_template:
        settle_chat_template(tokenizer)
    return policy, tokenizer


def _questions(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line with where it stands, checked."""
    for number, line in read_jsonl(source):
        where = f"{source}:{number}"
        if not isinstance(line.get("prompt"), str):
            raise UserError(
                f'{where}: "prompt" must be a text; a line is {{"prompt": text, "candidates": [text, ...]}}'
            )
        texts = line.get("candidates")
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f'{where}: "candidates" must be a list of at least one text')
        yield where, line


def _example(where: str, line: dict[str, Any]) -> PreferenceExample:
    first, *others = line["candidates"]
    return PreferenceExample(where, line["prompt"], first, tuple(others), (first, *others))


@contextmanager
def _output(name: str) -> Iterator[TextIO]:
    if name == "-":
        yield sys.stdout
        return
    with writing_to(name), replacing(Path(name)) as beside, open(beside, "w", encoding="utf-8", newline="\n") as file:
        yield file


@contextmanager
def writing_to(name: str | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"out={name} cannot be written ({error.strerror or error})") from error
