"""TRL's `DPOTrainer` on the pairs of a benchmark batch, timed from inside. TRL comes with the extra `trl`."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

from massdpo.benchmark.measure import synchronize
from massdpo.tensors import Batch


class _Stopwatch(TrainerCallback):
    """Seconds from the beginning to the end of each step, without set-up and data loading."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        synchronize()
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        synchronize()
        self.seconds.append(time.perf_counter() - self.started)


def trl_trainer(model: PreTrainedModel, batch: Batch, beta: float, steps: int, folder: Path) -> Callable[[], float]:
    """A function that trains for `steps` steps and returns the median seconds per step, leaving out the first."""
    vocabulary = model.config.vocab_size
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{vocabulary - 1}", pad_token="w0")

    def text(ids: torch.Tensor) -> str:
        return " ".join(f"w{i}" for i in ids.tolist())

    rows = [
        # TRL ends each response with EOS, which stands for our last token.
        {"prompt": text(prompt), "chosen": " " + text(pair[0, :-1]), "rejected": " " + text(pair[1, :-1])}
        for prompt, pair in zip(batch.prompt_ids_BP, batch.response_ids_BCT, strict=True)
    ]
    config = DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=len(rows),
        max_steps=steps,
        beta=beta,
        max_length=None,
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        bf16=model.device.type == "cuda",
        use_cpu=model.device.type == "cpu",
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    disable_progress_bar()
    trainer = DPOTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)  # it prints each training's summary

    def train() -> float:
        watch = _Stopwatch()
        trainer.add_callback(watch)
        trainer.train()
        trainer.remove_callback(watch)
        return statistics.median(watch.seconds[1:])

    return train
