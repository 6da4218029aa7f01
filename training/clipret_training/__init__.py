"""The fine-tuning room: torch, open_clip, peft."""
