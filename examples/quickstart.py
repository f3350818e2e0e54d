"""Fine-tune a tiny random model with replay: python examples/quickstart.py. The log shows the gere/ values."""

import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

from gere import GeReConfig, GeReTrainer

root = Path(__file__).resolve().parents[1]
model = AutoModelForCausalLM.from_pretrained(root / "base_llms" / "llama-tiny-random")
tokenizer = AutoTokenizer.from_pretrained(root / "base_llms" / "llama-tiny-random")
records = [json.loads(line) for line in (root / "examples" / "data" / "task.jsonl").open()]
rows = [tokenizer(f"{row['instruction']}{row['input']} {row['output']}") for row in records]
trainer = GeReTrainer(  # the arguments of Trainer, and three more
    model=model,
    args=TrainingArguments("tmp_trainer", max_steps=20, learning_rate=5e-3, logging_steps=5, report_to="none"),
    train_dataset=[{**row, "labels": row["input_ids"]} for row in rows],
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    processing_class=tokenizer,
    gere_hidden_state_saving_dir="tmp_trainer/gere_saving",
    num_interpolate_per_batch=2,  # of the 8 rows of a step
    gere_config=GeReConfig(replay_dataset=str(root / "examples" / "data" / "general.jsonl")),
)
trainer.train()
