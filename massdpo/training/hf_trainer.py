"""`massdpo.MultiNegativeTrainer`: the preference stage as a `transformers.Trainer`, with all that comes with one.

The loop, optimiser, checkpoints, callbacks, loggers, DeepSpeed and the hub are the Trainer's; batches, scores,
selection, loss and metrics are this project's. On the same batches its losses equal those of a run with refresh=step.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from massdpo.data.batches import Numbered, collate
from massdpo.data.chat import settle_chat_template
from massdpo.data.readers.layouts import Layout
from massdpo.data.schema import PreferenceExample
from massdpo.data.tokenize import tokenize_split
from massdpo.data.tokens import TokenizedExample
from massdpo.errors import UserError
from massdpo.evaluation.logps import SplitScorer, evaluate, ranking
from massdpo.model.load import disable_dropout
from massdpo.model.scoring import PreferenceScorer
from massdpo.selection import Selector
from massdpo.selection.choose import selector_named
from massdpo.tensors import Batch, ScorerOutput
from massdpo.training import losses
from massdpo.training.objectives import Loss, Preference

PreferenceRows = Iterable[Mapping[str, Any]]


class MultiNegativeTrainer(Trainer):
    """Trains a causal language model on one chosen and several rejected responses per prompt, k of them at each step.

    Args:
        model: a causal language model of `transformers`, or a PEFT adapter on one; its dropout is switched off. Load
            what is trained with dtype="float32": `from_pretrained` keeps bfloat16, which rounds most small steps to
            nothing (a warning says so); to compute in bfloat16, set the arguments' `bf16`.
        args: the Trainer's; `metric_for_best_model` may name any metric of `evaluate`, such as `eval_accuracy`.
        train_dataset: rows of `prompt`, `chosen` and `rejected` (a list), as texts or messages, for example a
            `datasets.Dataset`. Other layouts that `dataset=preferences` reads work too.
        eval_dataset: the same, for `evaluate`.
        processing_class: the model's tokenizer.
        selector: a name in conf/selector, or an object such as `massdpo.selection.Mass(k=4, ridge=0.1)`.
        k: negatives picked per prompt, where `selector` is a name.
        loss: a name in `massdpo.losses`, or a function like those there.
        beta: reward scale.
        ref_model: the reference of the rewards; None: `model` as it is now, scored here once.
        max_length: tokens of prompt plus longest response.
        chat_template: whether prompts become a user turn in the tokenizer's chat template.
        more: further arguments of a Trainer (`callbacks`, `optimizers`, ...).

    Raises:
        UserError: a row that cannot be used, a pool below k, an unknown selector or loss.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train_dataset: PreferenceRows,
        eval_dataset: PreferenceRows | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        selector: str | Selector = "mass",
        k: int = 4,
        loss: str | Loss = "pl",
        beta: float = 0.1,
        ref_model: nn.Module | None = None,
        max_length: int = 1024,
        chat_template: bool = False,
        **more: Any,
    ):
        if processing_class is None:
            raise UserError("MultiNegativeTrainer needs the model's tokenizer: processing_class=TOKENIZER")
        if args.n_gpu > 1:
            raise UserError(
                "MultiNegativeTrainer takes one GPU per process: start it with torchrun, or make only one GPU visible"
            )
        if chat_template:
            settle_chat_template(processing_class)
        self.reading = processing_class, max_length, chat_template
        rows = tokenized(train_dataset, "train_dataset", *self.reading)
        val = tokenized(eval_dataset, "eval_dataset", *self.reading) if eval_dataset is not None else []
        pad = processing_class.pad_token_id
        pad_id = processing_class.eos_token_id if pad is None else pad  # masked wherever it stands
        disable_dropout(model)
        if any(weight.requires_grad and weight.dtype.itemsize < 4 for weight in model.parameters()):
            warnings.warn(
                f"most steps of learning_rate={args.learning_rate:g} round to nothing in 16 bits: load the model with "
                'dtype="float32", and set bf16=True to compute in bfloat16',
                stacklevel=2,
            )
        super().__init__(
            model=model,
            args=args,
            data_collator=lambda numbered: {"batch": collate(numbered, pad_id)},
            train_dataset=Numbered(rows),
            eval_dataset=Numbered(val) if val else None,
            processing_class=processing_class,
            **more,
        )
        picking = selector_named(selector, k) if isinstance(selector, str) else selector
        self.scorer = PreferenceScorer(model, picking.features if picking.needs_scores else None)
        self.score_split = SplitScorer(self.accelerator, args.eval_batch_size, pad_id)
        start = self.scorer if ref_model is None else PreferenceScorer(ref_model)
        start.to(self.accelerator.device)
        splits = {"train": rows, "val": val}
        reference = {
            name: self.score_split(start, split, f"reference {name}") for name, split in splits.items() if split
        }
        compare = _loss_named(loss) if isinstance(loss, str) else loss
        self.objective: Preference = Preference(
            picking, compare, beta, "step", args.seed, rows, val, reference, self.score_split
        )
        self.values: dict[str, list[Tensor]] = {}  # of prompts since the last line of the log

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean loss of a batch's prompts; values to be logged are kept until the next log line."""
        scorer: Any = _as_a_forward_pass(model, self.scorer)
        with self.accelerator.autocast():
            loss_B, logs = self.objective.loss(scorer, inputs["batch"], int(self.state.epoch or 0), observe=False)
        for name, value_B in logs.items():
            if not name.endswith("_tokens"):
                self.values.setdefault(name, []).append(value_B.detach().float())
        return (loss_B.mean(), logs) if return_outputs else loss_B.mean()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's line, with the means of this process's margins, rewards, log-probs and picks since the last."""
        means = {name: torch.cat(values).mean().item() for name, values in self.values.items()}
        self.values.clear()
        self.objective.share()
        super().log(logs | means, start_time)

    def evaluate(  # type: ignore[override]
        self, eval_dataset: PreferenceRows | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Ranking metrics over whole pools (`massdpo.metrics`); rewards too for the trainer's own `eval_dataset`."""
        if eval_dataset is None and not self.objective.val:
            raise UserError("evaluate needs an eval_dataset: pass one here, or when creating the trainer")
        if eval_dataset is None:
            logps = self.score_split(self.scorer, self.objective.val, "evaluate")
            found = evaluate(logps, self.objective.reference["val"], self.objective.beta)
        else:
            found = ranking(
                self.score_split(self.scorer, tokenized(eval_dataset, "eval_dataset", *self.reading), "evaluate")
            )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def tokenized(
    rows: PreferenceRows, name: str, tokenizer: PreTrainedTokenizerBase, max_length: int, chat_template: bool
) -> Sequence[TokenizedExample]:
    """The trainer's rows as token ids; `name` is what messages call them."""
    layout, examples = Layout(), list[PreferenceExample]()
    for number, row in enumerate(rows):
        where = f"{name}[{number}]"
        parts = layout.preference(where, row)
        if parts is None:
            raise UserError(f"{where}: no answer is better than another")
        pool = tuple(dict.fromkeys(parts.rejected))
        meta = {"messages": parts.messages} if parts.messages else {}
        for chosen in dict.fromkeys(parts.chosen):
            if chosen in pool:
                raise UserError(
                    f'{where}: "chosen" is also rejected[{parts.rejected.index(chosen)}]: remove it from there'
                )
            id = f"{name}/{len(examples)}"
            examples.append(PreferenceExample(id, parts.prompt, chosen, pool, (chosen, *pool), meta=meta, where=where))
    return tokenize_split(examples, tokenizer, max_length, chat_template)


def _loss_named(name: str) -> Loss:
    function = getattr(losses, name, None)
    if name.startswith("_") or getattr(function, "__module__", "") != losses.__name__:
        raise UserError(f"unknown loss {name!r}: use pl, or another name in conf/loss")
    return function  # type: ignore[return-value]


def _as_a_forward_pass(wrapper: nn.Module, scorer: PreferenceScorer) -> Callable[..., ScorerOutput]:
    """The scorer, called as the forward pass of what wraps its model.

    DDP and DeepSpeed average the gradients of what goes through their own `forward`, which calls the model's.
    """
    model: Any = scorer.model

    def call(*inputs: Any) -> ScorerOutput:
        plain, patched = model.forward, "forward" in vars(model)  # Accelerate may have put one there

        def forward(*inputs: Any, **options: Any) -> Any:
            batch_first = inputs and isinstance(inputs[0], Batch)
            return scorer(*inputs) if batch_first else plain(*inputs, **options)

        model.forward = forward
        try:
            return wrapper(*inputs)
        finally:
            if patched:
                model.forward = plain
            else:
                del model.forward

    return call
