"""How the iterates of a run are loaded, trained and sampled from, and by which tasks they are judged."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from spin_reg import opponents
from spin_reg.benchmarks import TaskFiles
from spin_reg.config import Config
from spin_reg.generation import Generation
from spin_reg.schedules import at
from spin_reg.settings import Dtype, Lora, Precision, Pretrained, Quantize
from spin_reg.specs import AnswersSpec, BenchmarkSpec, Policy, Split, TrainSpec
from spin_reg.stage import Stage

READING = (
    2  # how packed rows are laid out and attended to: a new number where their log-probs move by more than in float32
)


def policy(config: Config) -> Policy:
    """How the run's iterates are loaded."""
    model = config.model
    if not isinstance(model, Pretrained):
        return Policy(model.dtype, model.attn_implementation, _layout(config))
    code, quantize = model.trust_remote_code, model.lora.quantize
    return Policy(model.dtype, model.attn_implementation, _layout(config), quantize, code, model.name_or_path)


def adapter(config: Config) -> Lora | None:
    """The adapter that is trained; None where all weights are."""
    lora = config.model.lora if isinstance(config.model, Pretrained) else None
    return lora if lora is not None and lora.rank > 0 else None


def training(config: Config, t: int) -> TrainSpec:
    """How iteration t trains."""
    rule, schedule = config.regularizer, config.schedule
    opponent = None if rule is None else rule.opponent(t)
    return TrainSpec(
        t=t,
        window=() if opponent is None else opponent.window,
        reference=None if opponent is None else opponents.to_json(opponent.reference),
        learning_rate=at(schedule.learning_rate, t),
        beta=None if opponent is None else at(schedule.beta, t),
        epochs=int(at(schedule.epochs, t)),
        batch_size=schedule.batch_size,
        optimizer=schedule.optimizer,
        lr_scheduler=schedule.lr_scheduler,
        warmup_ratio=schedule.warmup_ratio,
        weight_decay=schedule.weight_decay,
        max_grad_norm=schedule.max_grad_norm,
        loss=config.loss,
        lora=adapter(config),
        seed=config.seed,
        policy=policy(config),
        hardware=config.hardware,
        save_every=schedule.save_every,
    )


def sampling(config: Config, temperature: float) -> Generation:
    """Answers of the policy itself at a temperature, without a nucleus, whatever the game draws."""
    return replace(config.generation, temperature=temperature, top_p=1.0)


def longest(config: Config) -> int:
    """Tokens of the longest answer in the game."""
    return config.generation.max_new_tokens or config.dataset.max_response_tokens


def drawn_otherwise(config: Config, sampled: Generation, most: int) -> str:
    """What the name of a folder with answers adds where they are not drawn as in the game."""
    cut = "" if most == longest(config) else f"-upto{most}"
    if sampled == config.generation:
        return cut
    return (f"-temperature{sampled.temperature}".removesuffix(".0") if sampled.temperature else "-greedy") + cut


def scores_name(k: int, answers: Sequence[Stage], real: Split | None = None, first: int | None = None) -> str:
    """What the stage is called in which iterate k reads these answers, and a split's real ones; the `first` of them."""
    tails = [stage.name.partition("/answers/")[2] for stage in answers] or [str(real)]
    whose = "".join(f"-from-{stage.spec.k:02d}" for stage in answers if isinstance(stage.spec, AnswersSpec))
    only = "" if first is None else f"-first-{first}"
    return f"iterate-{k:02d}/scores/{tails[0]}{'-real' if real else ''}{whose}{only}"


def benchmarks(config: Config, tasks: Mapping[str, TaskFiles], k: int) -> list[BenchmarkSpec]:
    """What iterate k is judged by; a quantized base is judged as it came, as `export` writes it."""
    asked, loaded = config.evaluation, policy(config)
    return [
        BenchmarkSpec(
            k=k,
            task=benchmark.task,
            num_fewshot=benchmark.num_fewshot,
            apply_chat_template=asked.apply_chat_template,
            limit=asked.limit,
            files=tasks.get(benchmark.task, TaskFiles()).sha256,
            dtype=loaded.dtype,
            attn_implementation=loaded.attn_implementation,
            trust_remote_code=loaded.trust_remote_code,
            base=loaded.base,
            local=tasks.get(benchmark.task, TaskFiles()).local,
            include_path=asked.include_path,
            batch_size=asked.benchmark_batch_size,
        )
        for benchmark in asked.benchmarks
    ]


def _layout(config: Config) -> tuple[int | None, ...] | None:
    """In bf16, and over a quantized base (its kernels choose their arithmetic by a batch's shape), a log-prob moves
    with its batch companions, so the batch sizes are part of what a stage is, and so is how rows are read.
    """
    quantized = isinstance(config.model, Pretrained) and config.model.lora.quantize is not Quantize.none
    if config.hardware.precision is Precision.fp32 and config.model.dtype is Dtype.float32 and not quantized:
        return None
    hardware = config.hardware
    sizes = (hardware.batch_tokens, hardware.micro_batch_size, hardware.score_batch_size)
    shards = () if hardware.shard_size is None else (hardware.shard_size,)  # no batch crosses a shard's border
    return (READING, *sizes, config.generation.batch_size, *shards)
