"""Other libraries' chatter, off."""

from __future__ import annotations

import logging
import os
import warnings

from ds_kd.process import choose_accelerator


def quiet() -> None:
    """Leave transformers, datasets and DeepSpeed their errors and nothing else.

    To be called before transformers is first imported: it imports DeepSpeed, which on a machine
    without a GPU searches for an accelerator and says so.

    Raises:
        MachineError: as `choose_accelerator`.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # If another rank dies, torch prints a C++ backtrace with every call to its store.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore")
    choose_accelerator()
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It raises as well all that it logs as an error.
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
