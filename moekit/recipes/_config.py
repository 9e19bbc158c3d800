"""Settings that recipes share: where data comes from, how training goes, how it is evaluated."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from moekit.tasks import with_pair_tasks


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from and how it becomes batches.

    Attributes:
        source: kind of data: babel (generated languages, nothing to download), headlines (paragraphs of babel and their
            headlines, a summarisation task; directions as avl-avl), moses (train.en + train.de, plain or
            gz), jsonl ({"translation": {"en": ..., "de": ...}}), tsv, examples ({"input": ..., "target": ...}, or tsv
            with these columns; directions as en-en, the default), gettext (the translation catalogs of this machine)
            or text (one language per file). Several kinds joined by commas are read as one corpus.
        path: folder or file of the data; for several kinds as many, joined by commas. Not needed for babel and
            gettext.
        pivot: where text is parallel in more than two languages, keep the directions from and to this language.
            "auto" takes English where it is there; "none" keeps all pairs.
        directions: keep only these, as en-de,de-en.
        max_languages: of gettext: so many languages with the most text.
        vocab_size: pieces of the SentencePiece vocabulary that is trained on the data.
        tokenizer: folder of a tokenizer to take instead, which must know the data's languages.
        sentinel: tasks on pairs, as translation: the first sentinel ends the source and begins the target, as in span
            corruption.
        mask_shares: masked LM: shares of the chosen tokens that become the mask, become a random one, stay (BERT).
        span_ratio: span corruption: share of tokens that are cut out.
        mean_span: span corruption: mean length of what is cut out at once.
        packed: span corruption: lay sentences end to end and cut them into chunks that leave `max_length` positions,
            as T5 does; else every sentence is damaged by itself, and short ones lose one or two tokens at once.
        temperature: T of the sampling over directions and languages, p ~ n ** (1 / T); 1 = by size.
        heating: form in which the temperature rises: linear, square_root or step (one jump).
        heating_steps: raise the temperature from 1 to `temperature` over so many steps; 0 = constant.
        max_length: longer sentences are left out of training, in pieces.
        cache: folder for tokenizers and tokenized text, shared by runs.
        num_workers: processes that prepare batches; 0 = the training process itself; auto = none on a CPU, up to four
            beside each GPU, so that it does not wait for its batches.
        babel_languages: how many languages babel makes.
        babel_sentences: its training sentences, each in every language; of headlines: paragraphs.
        babel_sizes: fewer (or more) training sentences of single languages, as kmb=2000,shl=500.
        seed: of the babel corpus and of the order of examples.
        order_seed: of the order of examples and of their noise, where it is not `seed`.
    """

    source: str = "babel"
    path: str | None = None
    pivot: str = "auto"
    directions: str | None = None
    max_languages: int = 10
    vocab_size: int = 1024
    tokenizer: str | None = None
    sentinel: bool = False
    mask_shares: tuple[float, float, float] = (0.8, 0.1, 0.1)
    span_ratio: float = 0.15
    mean_span: float = 3.0
    packed: bool = False
    temperature: float = 1.0
    heating: Literal["linear", "square_root", "step"] = "linear"
    heating_steps: int = 0
    max_length: int = 128
    cache: str = ".cache/moekit"
    num_workers: int | Literal["auto"] = "auto"
    babel_languages: int = 4
    babel_sentences: int = 30_000
    babel_sizes: str | None = None
    seed: int = 1
    order_seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One training task of a multitask run.

    Attributes:
        weight: of its loss in the sum.
        tokens: tokens of this task in a step, on each device; 0 = leave the task out.
    """

    weight: float = 1.0
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class LanguageModelTasks:
    """The task of a language model.

    Attributes:
        causal_lm: the next token.
    """

    causal_lm: TaskConfig = field(default_factory=lambda: TaskConfig(tokens=2048))


@with_pair_tasks(TaskConfig)
@dataclass(frozen=True, kw_only=True)
class SpanCorruptionTasks:
    """The task of a T5-like model.

    Attributes:
        span_corruption: the spans that were cut out of a text.
    """

    span_corruption: TaskConfig = field(default_factory=lambda: TaskConfig(tokens=2048))


@with_pair_tasks(TaskConfig)
@dataclass(frozen=True, kw_only=True)
class TranslationTasks:
    """The task of a translation model.

    Attributes:
        translation: parallel text.
    """

    translation: TaskConfig = field(default_factory=lambda: TaskConfig(tokens=2048))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How training goes.

    Attributes:
        max_steps: optimizer steps; 0 = no limit.
        max_minutes: minutes of training; 0 = no limit. The first limit that is reached ends training; the learning
            rate follows the steps where max_steps is given, else the minutes.
        optimizer: adamw, or adafactor (T5's, whose steps are relative to the size of the weights).
        learning_rate: its peak. T5's adafactor has 0.01 at the end of a warm-up of 10,000 steps.
        warmup_steps: linear warm-up.
        schedule: what follows the warm-up: cosine, inverse_square_root or constant.
        weight_decay: on matrices only.
        betas: of adamw.
        clip: largest gradient norm; 0 = no clipping.
        clip_update: of adafactor: largest root mean square of an update; 0 = no clipping.
        label_smoothing: of the sequence-to-sequence tasks.
        accumulate: batches per optimizer step.
        precision: "32-true", "bf16-mixed", "bf16-true", or "auto": bf16-mixed on a GPU that has bf16, float32 on
            other GPUs (with TF32 where they have it) and on CPUs. A run keeps what it was when it began.
        expert_lr_multiplier: learning rate of the experts as a multiple of the others'.
        scale_expert_gradients: multiply gradients of experts by the square root of their number (arXiv:2112.10684),
            before clipping. Under adamw only the clipping feels it.
        validate_every: steps between validations; 0 = only at the end.
        checkpoint_minutes: minutes between checkpoints; they are also written on SIGTERM and at the end.
        checkpoint_steps: steps between checkpoints; 0 = by minutes only.
        log_every: steps between rows of metrics.csv.
        seed: of weights, dropout, noise and routing.
        devices: processes on each node (--devices for short).
        num_nodes: machines (--nodes for short).
        accelerator: auto, cpu or gpu; auto = a GPU of CUDA or ROCm where there is one, never Apple's MPS.
    """

    max_steps: int = 1000
    max_minutes: float = 0.0
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    schedule: Literal["cosine", "inverse_square_root", "constant"] = "cosine"
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    clip_update: float = 1.0
    label_smoothing: float = 0.1
    accumulate: int = 1
    precision: Literal["auto", "32-true", "bf16-mixed", "bf16-true"] = "auto"
    expert_lr_multiplier: float = 1.0
    scale_expert_gradients: bool = False
    validate_every: int = 0
    checkpoint_minutes: float = 5.0
    checkpoint_steps: int = 0
    log_every: int = 10
    seed: int = 1
    devices: int = 1
    num_nodes: int = 1
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How the trained model is evaluated.

    Attributes:
        beam_size: of the search; 1 = greedy.
        length_penalty: alpha of ((5 + length) / 6) ** alpha.
        max_sentences: translate at most so many test sentences of each direction; 0 = all.
        valid_sentences: use at most so many sentences of each direction or language in validation; 0 = all.
        batch_tokens: source tokens in a batch.
        samples: translations kept for the report, of each direction.
    """

    beam_size: int = 4
    length_penalty: float = 0.6
    max_sentences: int = 0
    valid_sentences: int = 100
    batch_tokens: int = 4096
    samples: int = 5


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """How a model is spread over processes (see --train.devices).

    Nothing given: every process holds the whole model (distributed data parallel). Anything given: the experts, and
    more, are divided; what is left open is then as in `moekit.ExpertParallelStrategy`.

    Attributes:
        expert_parallel_size: processes that divide the experts of every layer; "auto" = as many as fit.
        tensor_parallel_size: processes that divide heads, hidden channels and vocabulary; they read the same batch.
        replicas: copies of the model within which ZeRO divides.
        zero_stage: what the others divide: 0 nothing, 1 optimizer state, 2 and gradients, 3 and weights.
        offload: kept in host memory: none, the optimizer, or all parameters.
        nonfinite_gradients: end the run, or skip the step, when the gradient norm is not a number.
        asynchronous_save: whether training goes on while a checkpoint is written.
        empty_init: build the model without memory and draw its weights block by block, for a model that no process
            could hold; its weights then begin with other draws than those of a run without.
    """

    expert_parallel_size: int | Literal["auto"] | None = None
    tensor_parallel_size: int | None = None
    replicas: int | None = None
    zero_stage: Literal[0, 1, 2, 3] | None = None
    offload: Literal["none", "optimizer", "parameters"] | None = None
    nonfinite_gradients: Literal["raise", "skip"] | None = None
    asynchronous_save: bool | None = None
    empty_init: bool | None = None


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """What the configuration of every recipe holds beside its network and its tasks.

    Attributes:
        data: where text comes from.
        train: how training goes.
        evaluate: how the result is evaluated.
        strategy: how the model is spread over processes.
    """

    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)


def active_tasks(tasks: Any) -> dict[str, TaskConfig]:
    """The tasks that take part, from a dataclass whose fields are the tasks."""
    named = {f.name: getattr(tasks, f.name) for f in fields(tasks)}
    return {name: task for name, task in named.items() if task.tokens > 0}
