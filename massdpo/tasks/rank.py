"""`task=rank`: rank the candidates of any prompt with a trained policy, line by line, also for another program.

Suffixes: B prompts of a batch, C candidates.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from omegaconf import DictConfig

from massdpo.data.batches import collate
from massdpo.data.chat import settle_chat_template
from massdpo.data.messages import as_text, checked_messages
from massdpo.data.schema import PreferenceExample
from massdpo.data.text import read_jsonl
from massdpo.data.tokenize import tokenize_split
from massdpo.errors import UserError
from massdpo.model.save import load_policy
from massdpo.model.scoring import PreferenceScorer
from massdpo.runs import launch
from massdpo.store import mapping_in, plain_yaml, replacing

READING = ("max_length", "chat_template")  # trainer options that change how a text is read


def rank(config: DictConfig) -> None:
    """Rank the candidates of each {"prompt", "candidates"} line of `in` by their mean log-prob per token.

    A prompt is a text or a list of messages. Lines go out as they came and in the same order, with `candidates` best
    first and their `scores` (nats per token) beside them; ties keep their order. `in=-` reads stdin and `out=-` writes
    stdout, `trainer.eval_batch_size` lines at a time: set it to 1 for a program that waits for each answer. A file is
    written whole or not at all.

    Raises:
        UserError: there is no policy in `policy`, or a line (named) cannot be ranked.
    """
    accelerator = launch.start(config)
    if accelerator.num_processes > 1:
        raise UserError("task=rank runs in one process: start it without torchrun")
    scorer, tokenizer = scorer_in(Path(config.policy).expanduser(), config, accelerator)
    trainer = config.trainer
    lines = questions(Path(config["in"]))
    differences = 0
    with _output(config.out) as sink:
        while batch := list(islice(lines, trainer.eval_batch_size)):
            examples = [example_of(*line) for line in batch]
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
        print(
            f"warning: {differences} prompts have a candidate whose tokens differ when tokenised together with its "
            "prompt",
            file=sys.stderr,
        )


def scorer_in(folder: Path, config: DictConfig, accelerator: Accelerator) -> tuple[Any, Any]:
    """The scorer of a trained policy, and its tokenizer, checked against the options."""
    if not folder.is_dir():
        raise UserError(f"there is no policy in {folder}: give the policy/ of a run with trainer.save_policy=true")
    policy, tokenizer = load_policy(folder)
    trained = trained_with(folder.parent).get("trainer")
    for name in READING:
        value = trained.get(name) if isinstance(trained, dict) else None
        if isinstance(value, int) and value != config.trainer[name]:
            print(f"warning: the run was trained with trainer.{name}={value}", file=sys.stderr)
    context = policy.config.get_text_config().max_position_embeddings
    if config.trainer.max_length > context:
        raise UserError(f"trainer.max_length={config.trainer.max_length}: the model's context holds {context} tokens")
    if config.trainer.chat_template:
        settle_chat_template(tokenizer)
    scorer = PreferenceScorer(policy, None, config.trainer.layout)
    return accelerator.prepare_model(scorer, evaluation_mode=True).eval(), tokenizer


def trained_with(run: Path) -> dict[str, Any]:
    """The config of the run in a folder, read as plain data; empty for a policy that came without its run."""
    return mapping_in(run / "config.yaml", plain_yaml)


def questions(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line, checked, with its place in the file."""
    for number, line in read_jsonl(source):
        where = f"{source}:{number}"
        if "prompt" not in line:
            raise UserError(f'{where}: no "prompt"; a line is {{"prompt": text, "candidates": [text, ...]}}')
        if not isinstance(line["prompt"], str):
            checked_messages(where, "prompt", line["prompt"], Counter())
        try:
            json.dumps(line, allow_nan=False)
        except ValueError as error:
            raise UserError(f"{where}: NaN and Infinity are not JSON") from error
        texts = line.get("candidates")
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f'{where}: "candidates" must be a list of at least one text')
        yield where, line


def example_of(where: str, line: dict[str, Any]) -> PreferenceExample:
    first, *others = line["candidates"]
    prompt, meta = line["prompt"], {}
    if not isinstance(prompt, str):
        meta = {"messages": checked_messages(where, "prompt", prompt, Counter())}
        prompt = as_text(meta["messages"])
    return PreferenceExample(where, prompt, first, tuple(others), (first, *others), meta=meta)


@contextmanager
def _output(name: str) -> Iterator[TextIO]:
    target: Any = nullcontext(1) if name == "-" else replacing(Path(name))  # 1: stdout
    with (
        writing_to(name),
        target as place,
        open(place, "w", encoding="utf-8", newline="\n", closefd=place != 1) as file,
    ):
        yield file


@contextmanager
def writing_to(name: str | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"out={name} cannot be written ({error.strerror or error})") from error
