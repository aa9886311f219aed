"""Hugging Face models as body and head, and what is asked of them."""
