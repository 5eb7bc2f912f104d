"""How the iterates of a run are loaded, what of them is trained, and by which tasks they are judged."""

from collections.abc import Mapping

from spin_reg.benchmarks import TaskFiles
from spin_reg.config import Config
from spin_reg.settings import Dtype, Lora, Precision, Pretrained, Quantize
from spin_reg.specs import BenchmarkSpec, Policy


def policy(config: Config) -> Policy:
    """How the run's iterates are loaded."""
    model = config.model
    if not isinstance(model, Pretrained):
        return Policy(model.dtype, model.attn_implementation, _layout(config))
    code, quantize = model.trust_remote_code, model.lora.quantize
    return Policy(model.dtype, model.attn_implementation, _layout(config), quantize, code)


def adapter(config: Config) -> Lora | None:
    """The adapter that is trained; None where all weights are."""
    lora = config.model.lora if isinstance(config.model, Pretrained) else None
    return lora if lora is not None and lora.rank > 0 else None


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
            local=tasks.get(benchmark.task, TaskFiles()).local,
            include_path=asked.include_path,
            batch_size=asked.benchmark_batch_size,
        )
        for benchmark in asked.benchmarks
    ]


def _layout(config: Config) -> tuple[int | None, ...] | None:
    """In bf16, and over a quantized base (its kernels choose their arithmetic by a batch's shape), a log-prob moves
    with its batch companions, so the batch sizes are part of what a stage is.
    """
    quantized = isinstance(config.model, Pretrained) and config.model.lora.quantize is not Quantize.none
    if config.hardware.precision is Precision.fp32 and config.model.dtype is Dtype.float32 and not quantized:
        return None
    hardware = config.hardware
    sizes = (hardware.batch_tokens, hardware.micro_batch_size, hardware.score_batch_size)
    return (*sizes, config.generation.batch_size)
