"""The sections of the config that have keys of their own, each key with type, bounds, unit and a
sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ds_kd.config.keys import AutoOrCount, Every, EveryOrEnd, NemoName, NoPipe, OnlyOne, Tasks, key

MAX_SEED = 2**62  # torch takes 64 bits, and each rank adds its number
_ONLY_ONE = "Only 1 or nothing is accepted: ranks share the data alone."


@dataclass
class StepScheduler:
    global_batch_size: int = key(
        32, "Sets how many samples one optimizer step takes, over all ranks.", "samples", low=1
    )
    local_batch_size: int = key(
        1, "Sets how many samples one micro-batch on one rank takes.", "samples", low=1
    )
    num_epochs: int = key(
        1,
        "Ends the run after this many passes over the training data, or earlier at max_steps.",
        "epochs",
        low=1,
    )
    max_steps: int | None = key(
        None,
        "Ends the run after this many optimizer steps, unless num_epochs ends it earlier. 0 "
        "validates and trains nothing.",
        "steps",
        low=0,
    )
    val_every_steps: Every | None = key(
        None,
        "Validates each time after this many optimizer steps, or after each epoch (`epoch`), and "
        "after the last step. Without it only after the last.",
        "steps",
    )
    ckpt_every_steps: Every | None = key(
        None,
        "Saves a checkpoint each time after this many optimizer steps, or after each epoch "
        "(`epoch`), and after the last step. Without it checkpoint.every_minutes decides.",
        "steps",
    )
    patience: int | None = key(
        None,
        "Ends the run when this many validations in a row have not lowered the validation loss. "
        "By default it does not end early. Needs val_every_steps.",
        "validations",
        low=1,
    )
    max_skipped_steps: int = key(
        0,
        "Lets this many steps of a run be left out because their loss or gradient is not finite; "
        "one more ends the run.",
        "steps",
        low=0,
    )
    val_at_start: bool = key(False, "Validates before the first step too.")
    val_samples: int = key(
        0,
        "Has teacher and student answer this many held-out samples at every validation, shown side "
        "by side in TensorBoard and metrics.jsonl. An answer takes up to 40 forwards.",
        "samples",
        low=0,
    )
    validate_teacher: bool = key(
        True,
        "Loads a named teacher at kd_ratio 0 too, so that validation measures the student against "
        "it.",
    )


@dataclass
class DistEnv:
    backend: Literal["nccl", "gloo"] = key(
        "nccl", "Chooses the library of collectives; nccl becomes gloo where there is no CUDA."
    )
    timeout_minutes: float = key(
        10.0,
        "A collective waits this long for a missing rank; then the run ends.",
        "minutes",
        above=0,
        high=10_080,
    )


@dataclass
class Rng:
    _target_: NemoName | None = key(None, "NeMo-AutoModel's class is accepted and not used.")
    seed: int = key(1111, "Seeds shuffling, dropout and initialisation.", low=0, high=MAX_SEED)
    ranked: bool = key(True, "Gives each rank dropout masks of its own.")


@dataclass
class Checkpoint:
    enabled: bool = key(True, "Saves checkpoints and resumes from them.")
    checkpoint_dir: str = key(
        "checkpoints/",
        "Names the directory of the run. The same command with the same directory resumes.",
    )
    model_save_format: Literal["safetensors", "torch_save"] = key(
        "safetensors", "The student is exported as safetensors; torch_save is read as the same."
    )
    save_consolidated: Literal["false", "true", "final", "every"] = key(
        "final",
        "Exports the student for transformers: final (or true) at the end of the run, every with "
        "each checkpoint, false never.",
    )
    is_async: Literal[False] = key(
        False, "Only false is accepted: a checkpoint is whole before the next step begins."
    )
    every_minutes: float = key(
        30.0,
        "Saves a checkpoint when the last one is this old, in addition to ckpt_every_steps; 0 "
        "switches it off.",
        "minutes",
        low=0,
    )
    keep_last: int | None = key(
        None,
        "Keeps this many of the newest checkpoints. By default all stay, or 2 where "
        "ckpt_every_steps is not given.",
        "checkpoints",
        low=1,
    )
    keep_best: int = key(
        1,
        "Also keeps this many checkpoints of lowest validation loss, unless all stay (keep_last).",
        "checkpoints",
        low=0,
    )
    on_failed_save: Literal["continue", "stop"] = key(
        "continue",
        "Says whether a run goes on when a checkpoint cannot be written, for example on a full "
        "disk.",
    )


@dataclass
class Distributed:
    _target_: NemoName | None = key(
        None, "NeMo-AutoModel's class is accepted; ZeRO-3 takes its place."
    )
    strategy: Any = key(None, "NeMo-AutoModel's word is accepted; ZeRO-3 takes its place.")
    dp_size: int | None = key(
        None,
        "Tells checks and plans how many ranks share the data. A run uses all ranks that are "
        "started.",
        "ranks",
        low=1,
    )
    dp_replicate_size: OnlyOne | None = key(None, _ONLY_ONE, "ranks")
    tp_size: int | None = key(
        None,
        "Cuts the matrices of both models' layers over this many neighbouring ranks, which then "
        "share their samples (docs/distributed.md); by default none is cut.",
        "ranks",
        low=1,
    )
    cp_size: int | None = key(
        None,
        "Splits the tokens of each sample or pack over this many ranks, for samples too long for "
        "one (docs/long_context.md); by default none is split.",
        "ranks",
        low=1,
    )
    pp_size: NoPipe | None = key(
        None,
        "Only 1 or nothing is accepted: ZeRO-3, which splits the layers' weights, allows no "
        "pipeline.",
        "ranks",
    )
    ep_size: int | None = key(
        None, "Any number is accepted: ZeRO-3 shards experts like all other weights.", "ranks",
        low=1,
    )  # fmt: skip
    sequence_parallel: bool = key(
        False,
        "NeMo-AutoModel's word for ranks that have parts of a sample; cp_size is their number.",
    )
    activation_checkpointing: bool = key(
        False, "Computes the student's activations again in the backward pass, to save memory."
    )

    @property
    def ranks_per_sample(self) -> int:
        """Return the number of ranks that see a sample together."""
        return (self.tp_size or 1) * (self.cp_size or 1)


@dataclass
class LRScheduler:
    name: Literal[
        "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial", "constant",
        "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay",
    ] = key("linear", "Chooses the schedule by transformers' name.")  # fmt: skip
    num_warmup_steps: int = key(
        0, "The learning rate rises linearly over this many optimizer steps.", "steps", low=0
    )
    warmup_ratio: float | None = key(
        None,
        "Gives the length of the warm-up as a share of all steps, in place of num_warmup_steps.",
        "share of all steps",
        low=0,
        high=1,
    )
    scheduler_specific_kwargs: dict[str, Any] = key(
        dict, "Passes further arguments to the schedule, such as min_lr to cosine_with_min_lr."
    )


@dataclass
class Teacher:
    kind: Literal["resident", "shared_base", "cached"] = key(
        "resident",
        "Chooses the teacher: resident runs teacher_model in an engine of its own; shared_base is "
        "the student's own base, its adapter (peft) off, without a second set of weights; cached "
        "reads what a teacher gave before from a directory.",
    )
    adapter: str | None = key(
        None,
        "Puts the frozen LoRA adapter of this directory, as peft and checkpoints write it, on the "
        "base that a shared_base teacher runs. By default the bare base teaches.",
    )
    placement: Literal["zero3", "replicate", "cpu", "int8", "auto"] | None = key(
        None,
        "Places a teacher that runs, in place of deepspeed.teacher: zero3 shards it over ranks, "
        "replicate keeps it whole on each (no gathering), cpu keeps its shards in the host's "
        "memory, int8 shards its weights rounded to 8 bits; auto takes the first "
        "of replicate, zero3 and cpu for which there is memory. By default deepspeed.teacher "
        "decides; without it an accelerator that has the memory keeps the teacher whole, "
        "and all else is zero3.",
    )
    window: AutoOrCount = key(
        "auto",
        "Takes this many micro-batches of a step in one pass of a resident teacher, so that its "
        "layers are gathered once for all of them; results stay the same. auto takes as many as "
        "1/32 of a rank's memory holds hidden states of, or 1 where nothing is gathered.",
        "micro-batches",
    )
    directory: str | None = key(
        None, "Names the directory of a cached teacher, which launch/cache_teacher.py writes."
    )
    fill: bool = key(
        False,
        "Has a cached teacher run where its directory lacks rows, and writes them: the first epoch "
        "fills it, later ones only read.",
    )
    dtype: Literal["auto", "fp16", "bf16", "fp32"] = key(
        "auto",
        "Chooses the numbers that a cache keeps hidden states in: auto is bf16 for a teacher in "
        "bf16, which is exact, and fp16 for one in fp32; fp32 is always exact.",
    )
    keep: Literal["hidden", "top_k", "sampled"] = key(
        "hidden",
        "Chooses what a cache keeps: hidden states, for any loss at any temperature; top_k, the k "
        "likeliest ids and the rest as one, for the loss top_k; sampled, k draws, for forward_kl. "
        "The last two hold one temperature.",
    )
    k: int = key(64, "Sets how many ids or draws top_k and sampled keep.", low=1)


@dataclass
class DeepSpeed:
    student: Any = key(
        None,
        "Gives the student's ZeRO file, as a path or a mapping. By default it is plain ZeRO-3.",
    )
    teacher: Any = key(
        None,
        "Gives the teacher's ZeRO file: a path or a mapping. By default teacher.placement decides.",
    )
    reduce_once: Literal["auto", "true", "false"] = key(
        "auto",
        "Adds up the student's gradients of a step's micro-batches on each rank and exchanges the "
        "sum, where false exchanges each. Takes 4 bytes of a trained weight on every rank, 6 in "
        "bf16; auto does it on accelerators where the first step has left as much and a fifth.",
    )


@dataclass
class PackedSequence:
    packed_sequence_size: int = key(
        0,
        "Lays whole samples end to end in packs of this many tokens; batch sizes then count packs. "
        "0 packs nothing.",
        "tokens",
        low=0,
    )
    split_across_pack: Literal[False] = key(False, "Only false is accepted: samples stay whole.")
    share_prefixes: bool = key(
        False,
        "Puts samples that begin alike into one pack, in which their beginning is computed once; a "
        "pack then holds this many different tokens. Results stay the same for the same samples.",
    )


@dataclass
class Peft:
    _target_: NemoName | None = key(None, "NeMo-AutoModel's class is accepted; peft is used.")
    match_all_linear: bool = key(False, "Adapts every linear map but the head.")
    target_modules: list[str] = key(
        list,
        "Names the linear maps to adapt, with `*` for any text. By default they are `*_proj`.",
    )
    exclude_modules: list[str] = key(list, "Adapts all linear maps but these.")
    dim: int = key(8, "Sets the rank of the adapters.", low=1)
    alpha: float = key(32, "Scales the adapters' output by alpha / dim.", above=0)
    dropout: float = key(
        0.0, "Sets the dropout on an adapter's input.", "probability", low=0, high=1
    )
    dropout_position: Literal["pre", "post"] = key(
        "pre", "Only pre is accepted, unless dropout is 0."
    )
    lora_dtype: None = key(None, "Only null is accepted: adapters have the student's dtype.")
    moe_rank_scaling: Literal[False] = key(
        False, "Only false is accepted: all adapters have the same rank."
    )
    lora_A_init: Literal["xavier", "uniform"] = key(
        "xavier", "Draws the first matrix from a normal distribution, or from Kaiming's uniform."
    )
    use_dora: bool = key(False, "Trains DoRA: the length of each output too.")
    use_triton: bool = key(False, "Either value is accepted; peft's PyTorch code is used.")
    use_memory_efficient_lora: bool = key(
        True, "Either value is accepted; peft's PyTorch code is used."
    )


@dataclass
class Compile:
    enabled: Literal["auto", "true", "false"] = key(
        "auto",
        "Compiles the transformer layers with torch.compile; `compile: true` does the same. auto "
        "does so on accelerators where it works, and not with rollouts.",
    )
    mode: Literal["default", "max-autotune", "max-autotune-no-cudagraphs"] = key(
        "default", "Chooses the mode of torch.compile."
    )
    dynamic: bool = key(
        True, "Compiles one version for all lengths of a batch; false compiles one for each."
    )
    fullgraph: Literal[False] = key(
        False, "Only false is accepted: some attention stays outside the compiled code."
    )
    backend: Literal["inductor", "cudagraphs", "aot_eager", "eager"] = key(
        "inductor", "Chooses the backend of torch.compile."
    )


@dataclass
class Slurm:
    job_name: str = key("ds_kd", "Names the job.")
    nodes: int = key(1, "Asks for this many machines.", "machines", low=1)
    ntasks_per_node: int = key(
        1, "Starts this many ranks on each machine: one per accelerator.", "ranks", low=1
    )
    gpus_per_node: int | None = key(
        None, "Asks for this many accelerators on each machine.", "accelerators", low=1
    )
    cpus_per_task: int | None = key(None, "Asks for this many cores per rank.", "cores", low=1)
    time: str | None = key(
        None, "Limits the time of one attempt; write it in quotes: `'04:00:00'`.", "HH:MM:SS"
    )
    account: str | None = key(None, "Charges the job to this account.")
    partition: str | None = key(None, "Submits the job to this partition.")
    log_dir: str = key(".", "Names the directory of the job's log and of each attempt's.")
    container_image: str | None = key(None, "Runs the job in this container image (pyxis).")
    container_mounts: list[str] = key(
        list, "Shows these directories to the container, as `HOST:CONTAINER`."
    )
    env_vars: dict[str, Any] = key(dict, "Sets environment variables of the job.")
    sbatch_options: list[str] = key(list, "Passes any other options to sbatch.")


@dataclass
class Evaluation:
    tasks: Tasks = key(
        list,
        "Names the tasks, each as {task, data, limit}: hellaswag, squad, perplexity, kl or a YAML "
        "of your own, a file of rows, and how many of them.",
    )
    every: EveryOrEnd = key(
        "end",
        "Evaluates each time after this many optimizer steps and after the last, or only then "
        "(`end`).",
        "steps",
    )


@dataclass
class TensorBoard:
    enabled: bool = key(True, "Writes TensorBoard events.")
    log_dir: str | None = key(
        None,
        "Names the directory of events and metrics.jsonl, by default <checkpoint_dir>/tensorboard.",
    )
