"""Student and teacher as a body and a head.

A causal language model is a body (tokens → hidden states) and a head (hidden states → logits).
`[tokens, vocab]` logits are by far the largest tensors of a distillation step, so neither model
returns them. The teacher returns hidden states at the supervised positions, and the student's head
module is *called with the loss*: ZeRO-3 gathers a weight, tied or not, for forward and backward
only if the module that owns it is called.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ds_kd.losses.chunked import DistillationLoss
from ds_kd.losses.head import Head, States
from ds_kd.losses.named.hidden_states import HiddenStates
from ds_kd.losses.scores import compare_models, score_labels
from ds_kd.models import attention
from ds_kd.models.layers import LayerOutputs
from ds_kd.models.rows import Rows
from ds_kd.parallel.engines import gather, read_weight
from ds_kd.parallel.layout import Group
from ds_kd.parallel.sequence import Exchange

DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "float32": torch.float32,
}

#: Head settings of HF configs that change the logits in a way `Head` computes.
_SCALE, _INVERSE_SCALE, _SOFTCAP = "logit_scale", "logits_scaling", "final_logit_softcapping"
#: The largest logit of a probe with a scaled-up head input; soft caps are below 100.
_LARGE_LOGIT = 300.0


class _Split(nn.Module):
    """A Hugging Face causal language model, split into body and head; `model` is the HF module."""

    def __init__(self, model: Any):
        super().__init__()
        self.model: Any = model
        config = self.model.config.get_text_config()
        self._scale = getattr(config, _SCALE, None) or 1.0 / (
            getattr(config, _INVERSE_SCALE, None) or 1.0
        )
        self._softcap = getattr(config, _SOFTCAP, None)
        if self.model.get_output_embeddings() is None:
            raise ValueError(f"{type(model).__name__} has no language-model head to distil")
        _call_head_with_loss(self.model.get_output_embeddings())
        self._body = (_find_body(self.model),)
        self._last_mlp = _RowsOfLastMLP(model)
        self.layers = LayerOutputs(model)
        self.exchange: Exchange | None = None

    def watch(self, layers: Iterable[int]) -> None:
        """Keep the outputs of these layers, numbered from 0, in `self.layers` at every pass."""
        self.layers = LayerOutputs(self.model, layers)

    def hidden(self, batch: dict[str, Any]) -> Tensor:
        """Return the hidden states at the supervised positions, `[rows, hidden]`.

        An `attention_mask` of the batch, `[rows, 1, length, length]`, is added to the attention's
        logits in place of the causal mask. A batch with `num_parts` is this rank's part of the
        tokens (`ds_kd.train.parts`), which `self.exchange` joins.
        """
        # Under a causal mask no real token attends to right padding, so no attention mask is built.
        # Positions are given explicitly, so that transformers does not derive them; in a pack they
        # restart with each sample, and attention stays inside it.
        ids, positions = batch["input_ids"], batch.get("position_ids")
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        segments = attention.arguments(self.model, batch, self.exchange)

        rows = batch["supervised"]
        once = batch.get("supervised_once", rows)  # a position may have several labels
        with (
            self._last_mlp.only(batch.get("supervised_parts", [once])),
            self.layers.of(rows),
        ):
            (body,) = self._body
            out = body(input_ids=ids, position_ids=positions, use_cache=False, **segments)
        # The residual stream of Mamba is float32 even if its head is not.
        hidden = out.last_hidden_state.to(self._head_dtype())
        return _select(hidden.flatten(0, 1), rows, is_distinct=once is rows)

    def _head_dtype(self) -> torch.dtype:
        """Return the dtype of the head. As the forward reads its weight, ZeRO-3 gathers it at the
        start of every forward and keeps it until backward, which the student needs."""
        dtype: torch.dtype = self.model.get_output_embeddings().weight.dtype
        return dtype

    def head(self) -> Head:
        """Return the head with its current parameters, which are whole only while gathered."""
        module = self.model.get_output_embeddings()
        weight = read_weight(module.weight)
        return Head(weight, getattr(module, "bias", None), self._scale, self._softcap)

    def next_tokens(self, batch: dict[str, Any]) -> Tensor:
        """Return the likeliest next token at each supervised position, `[rows]`."""
        output_head = self.model.get_output_embeddings()
        logits = lambda hidden: self.head().logits(hidden)  # noqa: E731
        return output_head(self.hidden(batch), loss=logits).argmax(-1)

    def label_scores(self, batch: dict[str, Any]) -> Tensor:
        """Log-probabilities of `batch["label_ids"]`, `[rows, labels]`, at the supervised positions;
        see `score_labels`."""
        output_head = self.model.get_output_embeddings()
        return output_head(
            self.hidden(batch),
            loss=lambda h: score_labels(States(h, self.head()), batch["label_ids"]),
        )

    def distances(self, batch: dict[str, Any]) -> Tensor:
        """Distances to `batch["teacher_output"]` over the first `batch["vocab"]` ids at the
        supervised positions, `[rows, 5]`; see `compare_models`."""
        output_head = self.model.get_output_embeddings()
        return output_head(
            self.hidden(batch),
            loss=lambda h: compare_models(
                States(h, self.head()),
                batch["teacher_output"],
                batch["supervised_labels"],
                batch["vocab"],
            ),
        )

    def generate(self, batch: dict[str, Any]) -> Tensor:
        """Return the result of transformers' `generate` with `batch["arguments"]`."""
        out: Tensor = self.model.generate(**batch["arguments"])
        return out

    def logits_error(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return (largest difference between transformers' logits and ours, largest logit)."""
        expected = self.model(input_ids=batch["input_ids"], use_cache=False).logits.flatten(0, 1)
        expected = expected.index_select(0, batch["supervised"])
        output_head = self.model.get_output_embeddings()
        got = output_head(self.hidden(batch), loss=lambda h: self.head().logits(h))
        return (got - expected).float().abs().max(), got.float().abs().max()

    def scaled_logits_error(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return `logits_error` with the head's input scaled up, so that a soft cap takes
        effect."""
        _, largest = self.logits_error(batch)
        factor = max(1.0, _LARGE_LOGIT / max(largest.item(), 1e-6))
        head = self.model.get_output_embeddings()
        longer = head.register_forward_pre_hook(lambda _, args: (args[0] * factor, *args[1:]))
        try:
            return self.logits_error(batch)
        finally:
            longer.remove()


class FrozenModel(_Split):
    """A teacher: `model(batch)` → hidden states at the supervised positions, `[rows, hidden]`.

    It has no gradient and stays in eval mode.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.requires_grad_(False)
        self.train(False)

    def _head_dtype(self) -> torch.dtype:
        # The attribute `weight` would have it gathered, and only the loss needs it.
        return next(self.model.get_output_embeddings().parameters()).dtype

    def train(self, mode: bool = True) -> FrozenModel:
        return super().train(False)

    def next_tokens(self, batch: dict[str, Any]) -> Tensor:
        # Without a pass of the head's module, after which ZeRO-3 would begin to gather the head in
        # every pass, and the loss, which gathers it itself, would meet it half gathered.
        hidden = self.hidden(batch)
        with gather([*self.model.get_output_embeddings().parameters()]):
            return self.head().logits(hidden).argmax(-1)

    @torch.no_grad()
    def forward(self, batch: dict[str, Any], probe: str | None = None) -> Any:
        return getattr(self, probe or "hidden")(batch)


class Student(_Split):
    """`student(batch, teacher_output)` → (loss, sums), see `DistillationLoss`.

    Args:
        model: the HF model to train.
        loss: computes the weighted sum from hidden states, head, labels and a teacher's output.
        layer_losses: (weight, loss) of each that compares layers of both models; they may have
            parameters, which are trained and saved with the model's and not exported.

    `tensor` is the group of ranks that have cut the model's layers; it is set after construction.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: DistillationLoss,
        layer_losses: Sequence[tuple[float, HiddenStates]] = (),
    ):
        super().__init__(model)
        self.loss, self.tensor = loss, Group(0, 1)
        # ZeRO-3 keeps all parameters of an optimizer in one buffer, so they have one dtype.
        parts = nn.ModuleList(part for _, part in layer_losses)
        self.layer_losses = parts.to(self.model.dtype) if len(parts) else parts
        self._weights = [weight for weight, _ in layer_losses]
        self.watch(own for _, part in layer_losses for own, _ in part.pairs)

    def forward(
        self, batch: dict[str, Any], teacher_output: Any | None = None, probe: str | None = None
    ) -> Any:
        if probe:
            return getattr(self, probe)(batch)
        output_head = self.model.get_output_embeddings()
        counts, rows = batch.get("supervised_counts"), Rows(self.tensor, len(batch["supervised"]))
        given = {} if counts is None else {"counts": rows.cut(counts)}
        if not torch.is_grad_enabled():
            given["positions"] = rows.cut(self._find_positions(batch))

        # The ranks that have cut the layers share out the tokens of the loss.
        labels, output = rows.cut(batch["supervised_labels"]), rows.of(teacher_output)
        total, sums = output_head(
            rows.select(self.hidden(batch)),
            loss=lambda h: self.loss(States(h, self.head()), labels, output, **given),
        )
        total, sums = rows.join(total, sums)
        if not self._weights or teacher_output is None:
            return total, sums
        between = self._compare_layers(teacher_output.layers, counts)
        return total + self.loss.kd_ratio * between, sums | {"hidden_loss": between.detach()}

    def _compare_layers(self, teacher: Mapping[int, Tensor], counts: Tensor | None) -> Tensor:
        """Return the weighted sum of the losses that compare layers, a scalar."""
        own = self.layers.take()
        parts = zip(self._weights, self.layer_losses, strict=True)
        return torch.stack([weight * loss(own, teacher, counts) for weight, loss in parts]).sum()

    def _find_positions(self, batch: dict[str, Any]) -> Tensor:
        """Return the place in its sample of each supervised token, `[rows]`."""
        rows, positions = batch["supervised"], batch.get("position_ids")
        if positions is None:
            return rows % batch["input_ids"].shape[1]
        return positions.flatten()[rows]


def compile_layers(
    model: Any,
    dynamic: bool = True,
    guard: Callable[[Callable, Callable], Callable] = lambda compiled, _: compiled,
    **options: Any,
) -> None:
    """Compile each transformer layer, so that the operations between its matrix products are fused.

    ZeRO-3 gathers one layer at a time (`engines`), so its hooks stay outside the compiled code.

    Args:
        model: an HF model.
        dynamic: compile one version for all lengths, as packs differ in length.
        guard: returns a layer's forward, made of the compiled and the plain one.
        options: of `torch.compile`.
    """
    names = getattr(model, "_no_split_modules", None) or ()
    for layer in [part for part in model.modules() if type(part).__name__ in names]:
        plain = layer.forward
        layer.forward = guard(torch.compile(plain, dynamic=dynamic, **options), plain)


def _select(hidden: Tensor, rows: Tensor, is_distinct: bool) -> Tensor:
    """Return `hidden[rows]`, without a copy if `rows`, which are in order, name every row once."""
    is_whole = is_distinct and len(rows) == len(hidden)
    return hidden if is_whole else hidden.index_select(0, rows)


class _RowsOfLastMLP:
    """Restricts a model's last MLP to the supervised rows.

    The loss reads the last layer's output at these rows only, and an MLP treats each token alone.
    If short answers to long questions are supervised, this saves most of one layer, forward and
    backward. `check_head` compares the result with the whole computation.
    """

    def __init__(self, model: Any):
        self._rows: Sequence[Tensor] = ()
        self._calls = 0
        self._owners = [model.base_model]
        layers: Any = getattr(model.base_model, "layers", None)
        mlp = getattr(layers[-1], "mlp", None) if layers is not None and len(layers) else None
        if mlp is None or not type(mlp).__name__.endswith("MLP"):
            return
        self._owners.append(layers[-1])
        plain = mlp.forward

        # The other tokens get zeros, which nothing reads.
        def forward(module: nn.Module, hidden: Tensor) -> Any:
            flat = hidden.flatten(0, -2)
            if not self._rows:
                return plain(hidden)
            rows = self._rows[self._calls % len(self._rows)]
            self._calls += 1
            if len(rows) == len(flat):
                return plain(hidden)
            some = plain(flat.index_select(0, rows)[None])
            if not isinstance(some, Tensor):  # some mixtures of experts return a tuple
                mlp.forward = plain
                return plain(hidden)
            return torch.zeros_like(flat).index_copy(0, rows, some[0]).view_as(hidden)

        mlp.forward = types.MethodType(forward, mlp)

    @contextmanager
    def only(self, rows: Sequence[Tensor]) -> Iterator[None]:
        """Compute these rows alone inside this block; one tensor for each call of the MLP, again
        from the first after the last."""
        # Checkpointed layers run again in backward, after this block has ended.
        again = any(getattr(module, "gradient_checkpointing", False) for module in self._owners)
        self._rows, self._calls = () if again else rows, 0
        try:
            yield
        finally:
            self._rows = ()


def _find_body(model: Any) -> Any:
    """Return the submodule of an HF model that turns tokens into hidden states."""
    from transformers import PreTrainedModel

    if model.base_model is not model:
        return model.base_model
    # In some classes `base_model` is the model itself (Llama 4's text model).
    inner = [part for part in model.children() if isinstance(part, PreTrainedModel)]
    return inner[0] if len(inner) == 1 else model


def _call_head_with_loss(head: nn.Module) -> None:
    """Make `head(hidden, loss=f)` return `f(hidden)` with the head's weight gathered.

    `head(hidden)` still returns logits.
    """
    plain = head.forward

    def forward(self: nn.Module, hidden: Tensor, loss: Callable | None = None) -> Any:
        return plain(hidden) if loss is None else loss(hidden)

    head.forward = types.MethodType(forward, head)  # type: ignore[method-assign]


def common_vocab_size(
    student_tokenizer: Any, teacher_tokenizer: Any, student_rows: int, teacher_rows: int
) -> int | None:
    """Return the number of ids to compare, or None if both heads have the same number.

    Models that share a tokenizer often pad their heads to different sizes (Qwen: 151936 and 152064
    rows). The padding stands for no token, so it is left out of both distributions. Filling it with
    zeros would be wrong, as a zero logit has probability.

    Args:
        student_tokenizer, teacher_tokenizer: must map the same tokens to the same ids.
        student_rows, teacher_rows: rows of the two heads.

    Raises:
        ValueError: the maps differ, or a head has fewer rows than the tokenizer has ids; names both
            and the first difference.
    """
    student, teacher = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    names = (
        f"the student's tokenizer ({student_tokenizer.name_or_path}, {len(student)} tokens) and "
        f"the teacher's ({teacher_tokenizer.name_or_path}, {len(teacher)} tokens)"
    )
    if student != teacher:
        ids = lambda token: (min(student.get(token, 1 << 62), teacher.get(token, 1 << 62)), token)  # noqa: E731
        differing = (t for t in student.keys() | teacher.keys() if student.get(t) != teacher.get(t))
        first = min(differing, key=ids)
        raise ValueError(
            f"{names} differ: token {first!r} is {student.get(first, 'absent')} for the student "
            f"and {teacher.get(first, 'absent')} for the teacher. Distillation compares the models "
            f"token by token: choose a student and a teacher of one family."
        )

    # Ids above the tokenizer's largest are padding of the heads.
    size = max(student.values()) + 1
    if size > min(student_rows, teacher_rows):
        raise ValueError(
            f"{names} have ids up to {size - 1}, but the heads have {student_rows} (student) "
            f"and {teacher_rows} (teacher) rows: resize the smaller model's embeddings to "
            f"its tokenizer first."
        )
    return None if student_rows == teacher_rows else size
