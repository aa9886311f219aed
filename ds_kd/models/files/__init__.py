"""The files of a Hugging Face model: names, checks and what is copied of them."""
