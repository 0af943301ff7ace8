"""Negatives picked by massdpo, pairs trained on by TRL.

python run.py task=select selector=mass k=4 out=selected    first: writes selected/pairs.jsonl
python examples/trl_pairs.py MODEL selected/pairs.jsonl     a folder that save_pretrained wrote, or a name on the hub
"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

name, pairs = sys.argv[1:]
trainer = DPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(name),
    args=DPOConfig(
        "outputs/trl",
        beta=0.1,
        num_train_epochs=1,
        max_length=512,
        report_to="none",
        save_strategy="no",
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=load_dataset("json", data_files=pairs, split="train"),
    processing_class=AutoTokenizer.from_pretrained(name),
)
print(f"loss {trainer.train().training_loss:.4f} over {len(trainer.train_dataset)} pairs")
