"""The names of the files in a run folder. `clipret_training.run.RunFolder` describes them."""

__all__ = ["ADAPTER", "BEST", "CHECKPOINTS", "LAST", "METRICS", "MODEL", "PARAMS", "SKIPPED", "TOKENIZER"]

PARAMS = "params.toml"
MODEL = "model.json"
TOKENIZER = "tokenizer.json"
METRICS = "metrics.jsonl"
SKIPPED = "skipped.tsv"
ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
BEST = "best.safetensors"
LAST = "last.safetensors"
