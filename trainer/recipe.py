"""The recipe: what a run trains, as a closed schema with one docstring a field. Imports no torch.

Keys of later work stand in the schema already, so that a recipe keeps its shape; their values are refused ("not yet").
The YAML door is `recipe_file`; what depends on several fields, on the model or on the machine is checked in `check`.
Relative paths are relative to the working directory of the command.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, Strict, ValidationError, model_validator
from pydantic.fields import FieldInfo as FieldInfo
from pydantic_core import ErrorDetails as ErrorDetails
from pydantic_core import PydanticCustomError

from cuboid.parallel.layout import BatchPlan, Layout
from cuboid.trainer.recipe_distill import DistillSettings
from cuboid.trainer.recipe_faults import FaultSettings
from cuboid.trainer.recipe_fields import (
    Count,
    CountOrZero,
    Momentum,
    NotNegative,
    Number,
    Offered,
    Places,
    Settings,
    Share,
    Text,
)
from cuboid.trainer.recipe_lora import LoraSettings
from cuboid.trainer.recipe_preference import PreferenceSettings
from cuboid.trainer.recipe_quantize import QuantizeSettings


class ModelSettings(Settings):
    """What is trained: a pretrained model that goes on, or a config from scratch; exactly one of the two."""

    pretrained: Text | None = None
    """A local folder or a hub id with safetensors."""
    config: dict[str, Any] | None = None
    """Any transformers config as a mapping, with its model_type; weights are drawn from the seed."""
    layers: Count | Places | None = None
    """Layers of pretrained that are kept: a list of their places, or how many, evenly spaced; null: all."""
    attention: Annotated[
        Literal["auto", "eager", "sdpa", "flex_attention", "flash_attention_2"], Offered(("auto", "eager", "sdpa"))
    ] = "auto"
    """Attention kernel; auto: the best that this model and device support, the choice is logged."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.pretrained is None) == (self.config is None):
            given = "neither is" if self.config is None else "both are"
            remedy = "set one to null" if self.config is not None else "give one of them"
            words = {"constraint": f"needs exactly one of pretrained and config, {given} given", "remedy": remedy}
            raise PydanticCustomError("cuboid", "one of two", words)
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            words = {"constraint": "has no model_type", "remedy": "write for example model_type: llama"}
            raise PydanticCustomError("cuboid", "no model_type", words | {"field": "config"})
        if self.config is not None and self.layers is not None:
            words = {"constraint": "chooses among the layers of pretrained, and config is given", "field": "layers"}
            raise PydanticCustomError("cuboid", "no layers", words | {"remedy": "set config's own number of layers"})
        return self


class PrecisionSettings(Settings):
    """Types of numbers."""

    parameters: Annotated[Literal["float32", "bfloat16", "float16"], Offered(("float32",))] = "float32"
    """Type in which parameters and optimizer state are kept."""
    compute: Number = "float32"
    """Type of activations and matrix products."""
    reduce: Number = "float32"
    """Type in which gradients are summed over data ranks."""


MIXTURE = 1024
"""Sequences among which each entry of a mixture has exactly its share; weights are rounded to so many parts."""


class ColumnSettings(Settings):
    """Columns of chat, instruct and preference data, by the names that they have in the files."""

    messages: Text = "messages"
    """chat: a list of messages, each with role and content."""
    tools: Text = "tools"
    """chat: what the assistant may call, as JSON schemas; may be absent."""
    prompt: Text = "prompt"
    """instruct, preference: the question; of preference also a list of messages, or absent beside conversations."""
    response: Text = "response"
    """instruct: the answer, which is predicted."""
    input: Text | None = None
    """instruct: more that belongs to the question; null: no such column."""
    system: Text | None = None
    """instruct: what stands before the question; null: no such column."""
    chosen: Text = "chosen"
    """preference: the better answer, a text or a list of messages."""
    rejected: Text = "rejected"
    """preference: the worse one."""


class DataSettings(Settings):
    """What is read."""

    kind: Annotated[
        Literal["text", "chat", "instruct", "preference", "tokens"], Offered(("text", "chat", "instruct", "preference"))
    ]
    """text: running text, every token is predicted; chat: conversations, of which the assistant's turns are predicted;
    instruct: pairs of prompt and response, of which the response is predicted; preference: a prompt and two answers."""
    path: Text | Annotated[tuple[Text, ...], Strict(False), Field(min_length=1)]
    """A local file, folder or glob, a hub id of datasets, package:stdlib (the built-in corpus), or a list of these."""
    weights: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Strict(False)] | None = None
    """Share of the sequences that each entry of path gives, as weights; null: the entries are read as one."""
    split: Text = "train"
    """Split of a hub data set."""
    subset: Text | None = None
    """Subset of a hub data set that has several, by its config name."""
    eval_path: Text | Annotated[tuple[Text, ...], Strict(False), Field(min_length=1)] | None = None
    """What evaluation reads, given like path: text that training does not see."""
    eval_split: Text = "validation"
    """Split of a hub data set for evaluation."""
    text_column: Text = "text"
    """text: the column that holds it, in a .jsonl, .csv or .parquet file or a hub data set."""
    columns: ColumnSettings = ColumnSettings()
    """Columns of the other kinds."""
    chat_template: Text = "auto"
    """auto: the tokenizer's own; chatml: plain words for a tokenizer without; or a file with a Jinja template."""
    truncation: Literal["end", "start", "drop"] = "end"
    """What is cut off an example (of preference: a pair) that is longer than a sequence; drop: the whole example."""
    broken: Literal["stop", "skip"] = "stop"
    """What a broken line, row or file does: stop before training, or be left out, counted and told."""
    tokenizer: Text = "auto"
    """auto: the model's own, or bytes where the model comes from a config; bytes; or a local folder or hub id."""
    sequence_length: Annotated[int, Field(ge=2)]
    """Tokens in one sequence, all of them predicted but those at a document's end."""
    packing: bool = True
    """true: documents one after another fill every sequence (examples stay whole); false: one a sequence, filled up."""
    cross_documents: bool = False
    """false: attention and positions start anew at each document; true: a sequence is one running text."""


class ParallelSettings(Settings):
    """How the work is divided over ranks: pipeline x data x tensor."""

    data: Count | Literal["auto"] = 1
    """Ranks along data; auto: what the devices leave."""
    tensor: Count = 1
    """Ranks that share each layer's matrices."""
    pipeline: Count = 1
    """Ranks along which the layers are laid."""
    expert: Count = 1
    """Ranks that share the experts; divides data x tensor and adds no ranks."""
    schedule: Literal[
        "gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipe_v"
    ] = "1f1b"
    """Order of a pipeline rank's actions."""
    microbatches: Count = 1
    """Parts into which each data rank's share of the global batch is cut."""
    virtual_stages: Count | None = None
    """Stages that each pipeline rank holds; null: what the schedule needs."""
    layers: Annotated[tuple[Count, ...], Strict(False), Field(min_length=1)] | None = None
    """Layers of each stage, in the order of the stages; null: so that each costs about the same, the head included."""
    sequence: bool = True
    """Sequence parallelism beside tensor parallelism: norms and residuals divided along the sequence."""
    shard: bool | Count = True
    """true: parameters sharded over data (FSDP2); false: replicated; a number: sharded in groups of so many ranks."""
    reshard: Literal["auto"] | bool = "auto"
    """Free the gathered parameters after the forward; auto: as the schedule allows."""
    engine: Literal["native", "deepspeed"] = "native"
    """What runs data parallelism: native is FSDP2, deepspeed is ZeRO (the extra cuboid[deepspeed])."""
    zero_stage: Literal[1, 2, 3] | None = None
    """What the deepspeed engine divides over data: 1 optimizer state, 2 gradients too, 3 parameters too."""
    offload: Literal["cpu", "nvme"] | None = None
    """Where the deepspeed engine keeps optimizer state; cpu and nvme (a disk) update on the CPU, null on the device."""
    offload_path: Text | None = None
    """Folder on a local disk for offload: nvme; each rank makes one of its own in it."""
    activation_checkpointing: Annotated[Literal["none", "full", "selective"], Offered(("none", "full"))] = "none"
    """full: a layer keeps only its input and computes the rest again in the backward."""
    compile: Annotated[bool, Offered((False,))] = False
    """torch.compile of each layer."""


class MoeSettings(Settings):
    """What keeps the experts of a mixture evenly busy, and how many are made of a dense model."""

    experts: Annotated[int, Field(ge=2)] | None = None
    """Experts to make of each feed-forward of a dense pretrained model, all alike at first; null: the model's own."""
    top_k: Count = 2
    """Experts that each token chooses among those that are made."""
    aux_loss: NotNegative = 0.001
    """Weight of the load-balancing loss, a mean over expert layers and predicted tokens, within each sequence."""
    z_loss: NotNegative = 0.0
    """Weight of the router's z-loss, which keeps its logits small; a mean as above."""
    bias_update: NotNegative = 0.0
    """Step by which a bias on each expert's choice moves after each step towards an even load; 0: no bias."""
    capacity_factor: Annotated[float, Field(gt=0)] | None = None
    """In training an expert takes at most this many times its even share of a sequence's choices; null: all of them."""


class PruneSettings(Settings):
    """Weights of the layers' linear modules that are set to zero and stay so, while the others train on; heads,
    channels and layers are left out of an export."""

    method: Literal["magnitude", "2:4", "heads", "channels", "layers"] = "magnitude"
    """magnitude: the smallest of all weights together; 2:4: the smaller two of each four neighbouring inputs; heads:
    key-value heads with their query heads, channels: features within the feed-forward, of each layer as many; layers:
    those that change their input least."""
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share that is zero in the end, of the weights (2:4 has 0.5), or of the heads, channels or layers at most."""
    multiple: Count | None = None
    """channels: how many each layer keeps is a multiple of this; null: 32, as groups of rounded weights need."""
    begin_step: Count = 1
    """Step before which pruning begins; 1: before training."""
    end_step: Count | None = None
    """Step before which it ends; from the first to it the share grows, fast at first; null: all at once."""
    every: Count = 1
    """Steps between two prunings."""
    modules: Annotated[tuple[Text, ...], Strict(False), Field(min_length=1)] | None = None
    """magnitude and 2:4: names of linear modules, such as q_proj; null: all in the layers."""

    @property
    def is_structured(self) -> bool:
        """Whether what is pruned goes as a whole, so that an export leaves it out."""
        return self.method in ("heads", "channels", "layers")

    @property
    def last_step(self) -> int:
        """Before which something is pruned for the last time."""
        return self.begin_step if self.end_step is None else self.end_step


class OptimizerSettings(Settings):
    """AdamW (Loshchilov and Hutter, 2019) and its learning rate; no decay on norms, biases and embeddings."""

    name: Literal["adamw"] = "adamw"
    """Kind of optimizer."""
    learning_rate: NotNegative = 3.0e-4
    """Peak learning rate."""
    betas: Annotated[tuple[Momentum, Momentum], Strict(False)] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: Annotated[float, Field(gt=0)] = 1.0e-8
    """Added to the root of the second moment."""
    weight_decay: NotNegative = 0.1
    """Decoupled decay, times the learning rate."""
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global gradient norm; null: no clipping (the norm is logged all the same)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate from the end of the warmup to the last step."""
    warmup_steps: CountOrZero = 0
    """Steps of linear warmup."""
    min_ratio: Share = 0.1
    """Learning rate of the last step as a share of the peak (cosine and linear)."""


class TrainSettings(Settings):
    """How long, and how much at a time."""

    steps: Count
    """Optimizer steps in all."""
    global_batch: Count
    """Sequences in one step: data x microbatches x microbatch size."""
    log_every: Count = 1
    """Steps between two messages to the tracker and the screen; metrics.jsonl has every step."""
    eval_every: CountOrZero = 0
    """Steps between two evaluations of the loss on data.eval_path, the last step always; 0: none."""
    eval_first: bool = False
    """Evaluate before the first step too."""
    eval_batches: Count = 8
    """Most global batches that an evaluation reads, the same ones each time."""


class CheckpointSettings(Settings):
    """When the run is saved."""

    every: CountOrZero = 100
    """Steps between two checkpoints; 0: none; otherwise the last step is always saved."""
    keep: Count = 3
    """Newest checkpoints that stay."""
    best: Literal["eval_loss"] | None = None
    """eval_loss: a step whose loss on data.eval_path is the lowest so far is saved, and stays; null: none is."""
    asynchronous: bool = True
    """Write in the background while training goes on."""
    copy_to: Text | None = None
    """A second folder, or a URL as s3://bucket/folder, to which finished checkpoints are copied; null: none."""


class TrackSettings(Settings):
    """Where metrics, pictures and checkpoints are shown; keys and tokens come from the environment only."""

    to: Literal["auto", "wandb", "trackio", "none"] = "auto"
    """auto: wandb where a key is configured, else trackio's local page."""
    project: Text = "cuboid"
    """Project of the tracker."""
    timeline_every: CountOrZero = 50
    """Steps between two pictures of the schedule as it ran, step 2 and the last always; 0: none."""
    artifacts: Literal["reference", "bytes", "none"] = "reference"
    """Checkpoints in the tracker: a reference with their manifest, their bytes, or nothing."""


class LaunchSettings(Settings):
    """What starts the ranks and what happens when one dies."""

    launcher: Literal["ray", "local", "slurm"] = "ray"
    """ray: Ray Train on a local or given cluster; local: processes of this command, without Ray; slurm: on all nodes of
    the Slurm job that the command runs in, without Ray (`cuboid slurm` writes such a job)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: GPUs where there are any, one for each rank; else cores of the CPU, which ranks may outnumber."""
    address: Text | None = None
    """Address of a running Ray cluster; slurm: one that is started for the run on the nodes of its Slurm job (`cuboid
    slurm --launcher ray`); null: a local one of this run's own."""
    max_failures: CountOrZero = 10
    """Restarts in all; the run also stops after three failures without a newer checkpoint."""
    timeout_seconds: Count = 300
    """After so long without a move of any rank it is a hang: told with every rank's stack, ended, and started again."""
    min_data: Count | None = None
    """Fewest data ranks with which the run goes on where the cluster has lost nodes; null: parallel.data. The global
    batch stays, with more microbatches a rank."""
    max_data: Count | None = None
    """Most data ranks to which the run grows where the cluster has gained nodes; null: parallel.data."""


class Recipe(Settings):
    """What a run trains, on which block of ranks, and what it leaves behind."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    """Name of the run and of its folder below `runs`."""
    seed: CountOrZero = 1234
    """Seed of initial weights and of the order of the data."""
    model: ModelSettings
    precision: PrecisionSettings = PrecisionSettings()
    data: DataSettings
    parallel: ParallelSettings = ParallelSettings()
    moe: MoeSettings | None = None
    """Balance of the experts; null: the defaults where the model has experts."""
    lora: LoraSettings | None = None
    """Low-rank adapters beside frozen weights; null: every weight is trained."""
    quantize: QuantizeSettings | None = None
    """Quantization-aware training; null: nothing is rounded."""
    distill: DistillSettings | None = None
    """Distillation from a teacher; null: from labels alone."""
    prune: PruneSettings | None = None
    """Pruning; null: none."""
    preference: PreferenceSettings | None = None
    """Tuning on pairs of answers; null: none."""
    optimizer: OptimizerSettings = OptimizerSettings()
    train: TrainSettings
    checkpoint: CheckpointSettings = CheckpointSettings()
    faults: FaultSettings = FaultSettings()
    track: TrackSettings = TrackSettings()
    runs: Text = "runs"
    """Root of the runs' folders."""
    launch: LaunchSettings = LaunchSettings()

    @property
    def layout(self) -> Layout:
        """The block of ranks; ``parallel.data: auto`` must have been resolved (`check.resolve_devices`)."""
        settings = self.parallel
        assert settings.data != "auto", "parallel.data is still auto"
        shard = settings.data if settings.shard in (True, False, 1) else settings.shard
        # sizes that do not divide are told by `check`
        replicas = settings.data // shard if settings.data % shard == 0 else 1
        expert = settings.expert if settings.data * settings.tensor % settings.expert == 0 else 1
        return Layout(
            pipeline=settings.pipeline,
            data=settings.data,
            tensor=settings.tensor,
            expert=expert,
            replicas=replicas,
        )

    @property
    def is_sharded(self) -> bool:
        """Whether any ranks share parameters over data."""
        return self.parallel.shard is True or self.parallel.shard > 1

    @property
    def batch_plan(self) -> BatchPlan:
        """How the global batch is cut; raises FieldError where it cannot be."""
        return BatchPlan(
            global_batch=self.train.global_batch, data=self.layout.data, microbatches=self.parallel.microbatches
        )


def validated(data: object) -> tuple[Recipe | None, list[ErrorDetails]]:
    """The recipe, or all that is wrong with its plain data (`recipe_errors` puts it into words)."""
    try:
        return Recipe.model_validate(data), []
    except ValidationError as error:
        return None, error.errors(include_url=False)
