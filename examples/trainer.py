"""The preference stage as a transformers.Trainer: any causal language model, rows with several rejected responses.

python examples/trainer.py MODEL    a folder that save_pretrained wrote, or a name on the hub
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from massdpo import MultiNegativeTrainer

planets = ["Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune"]
rows = [
    {
        "prompt": f"Which planet is number {place + 1} from the Sun?",
        "chosen": name,
        "rejected": planets[:place] + planets[place + 1 :],
    }
    for place, name in enumerate(planets)
]  # or a datasets.Dataset with these columns, as texts or messages
name = sys.argv[1]
trainer = MultiNegativeTrainer(
    AutoModelForCausalLM.from_pretrained(name, dtype="float32"),  # bfloat16 weights would lose small steps
    TrainingArguments(
        "outputs/trainer", per_device_train_batch_size=4, num_train_epochs=2, learning_rate=1e-5, report_to="none"
    ),
    rows,
    eval_dataset=rows,
    processing_class=AutoTokenizer.from_pretrained(name),
    selector="mass",
    k=4,
    beta=0.1,
)
trainer.train()
metrics = trainer.evaluate()
print(f"accuracy {metrics['eval_accuracy']:.3f}, margin {metrics['eval_margin']:+.3f}")
