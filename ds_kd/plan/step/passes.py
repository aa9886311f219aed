"""Find whether a kernel computes a run's loss on a GPU, and how often it goes over its logits."""

from __future__ import annotations

import torch

from ds_kd.config.schema import RunConfig
from ds_kd.losses.head import Head, States
from ds_kd.parallel.world import World
from ds_kd.recipe.loss.build import assemble_loss
from ds_kd.recipe.models import config_of, training_dtype

#: Times that one kernel reads or writes `[tokens, vocabulary]` at T = 1: both models' logits twice
#: and a gradient once for the forward KL, and the logits once more for the divergences of the
#: template. At another T they are read once more for what is logged at T = 1.
_OF_KERNEL = {"forward_kl": 5, "others": 7}
#: Passes in fp32 of the plain code: CE alone or with the forward KL of the same softmax, with one
#: of its own, and with other divergences, of which 40 to 75 were counted up to T = 2.
_PLAIN = {"shared": 23.5, "two": 37.5, "others": 60.0}


def inspect_loss(cfg: RunConfig) -> tuple[float, bool]:
    """Return the passes over `[tokens, vocabulary]` in fp32 that the loss makes on a GPU, and
    whether one kernel computes both losses of a chunk there, which the loss itself is asked.

    Raises:
        ConfigError: a loss refuses its arguments, or breaks its contract.
    """
    config, dtype = config_of(cfg.model).get_text_config(), training_dtype(cfg.model)
    loss = assemble_loss(cfg, config.vocab_size, None, World(0, 1, torch.device("cpu"), "gloo"))
    is_at_1 = loss.divergence.temperature == 1.0
    kind = "forward_kl" if getattr(loss.divergence, "name", "") == "forward_kl" else "others"

    # The meta device stands for a GPU on which the kernels work.
    hidden, weight = (torch.empty(1, 1, dtype=dtype, device="meta") for _ in range(2))
    head = Head(weight, softcap=getattr(config, "final_logit_softcapping", None))
    if loss.is_fused(States(hidden, head), is_training=True):
        return (_OF_KERNEL[kind] + (0 if is_at_1 else 2)) * dtype.itemsize / 4, True
    if cfg.kd_ratio == 0 or (kind == "forward_kl" and is_at_1):
        return _PLAIN["shared"], False
    return _PLAIN["two" if kind == "forward_kl" else "others"], False
