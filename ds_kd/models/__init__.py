"""Hugging Face models as body and head; probes, LoRA, pruning and their files."""
