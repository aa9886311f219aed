"""Attention of packs: the calls that shared beginnings take, and one launch for all on GPUs."""
