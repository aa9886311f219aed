"""The distance between hidden states of chosen layers of student and teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HiddenStates(nn.Module):
    """Mean over pairs of layers of the distance between their outputs, summed over tokens.

    `cosine` is 1 - cos(P·h_s, h_t); `mse` is the mean over the teacher's width of (P·h_s - h_t)².
    Where the widths differ, P is a matrix that is trained with the student, one for each pair;
    elsewhere it is the identity. It is no divergence of logits, so it is a part of a list that has
    one. Aguilar et al. 2020, arXiv:1910.03723; Jiao et al. 2020, arXiv:1909.10351.

    Args:
        layers: pairs [student's layer, teacher's layer], numbered from 0; a layer's output is the
            residual stream after it, before the final norm.
        distance: cosine or mse.

    Raises:
        ValueError: there is no such distance.
    """

    name = "hidden_states"

    def __init__(
        self, layers: list[tuple[int, int]], distance: Literal["cosine", "mse"] = "cosine"
    ):
        super().__init__()
        if distance not in ("cosine", "mse"):
            raise ValueError(f"distance must be cosine or mse, got {distance!r}")
        self.pairs = [(int(own), int(other)) for own, other in layers]
        self.distance = distance
        self.projectors = nn.ModuleList()

    def add_projectors(self, width: int, teacher_width: int, seed: int) -> None:
        """Add a matrix for each pair if the models' widths differ. They begin orthogonal, which
        keeps lengths, and equal on all ranks; no global generator is used."""
        if width == teacher_width:
            return
        generator = torch.Generator().manual_seed(seed)
        for _ in self.pairs:
            linear = nn.utils.skip_init(nn.Linear, width, teacher_width, bias=False)
            nn.init.orthogonal_(linear.weight, generator=generator)
            self.projectors.append(linear)

    def forward(
        self,
        student: Mapping[int, Tensor],
        teacher: Mapping[int, Tensor],
        counts: Tensor | None = None,
    ) -> Tensor:
        """Return the sum over tokens, a scalar.

        Args:
            student, teacher: outputs by number of the layer, `[tokens, width]`.
            counts: `[tokens]`, how often each token counts; once by default.
        """
        totals = []
        for number, (own, other) in enumerate(self.pairs):
            mine, target = student[own], teacher[other].float()
            if len(self.projectors):
                mine = self.projectors[number](mine)
            values = self._measure(mine.float(), target)
            totals.append((values if counts is None else values * counts).sum())
        return torch.stack(totals).mean()

    def _measure(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the distance of each token, `[tokens]`."""
        if self.distance == "cosine":
            return 1.0 - F.cosine_similarity(student, teacher, dim=-1)
        return (student - teacher).square().mean(-1)
