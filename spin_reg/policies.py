"""How the iterates of a run are loaded, and what of them is trained."""

from spin_reg.config import Config
from spin_reg.settings import Dtype, Lora, Precision, Pretrained, Quantize
from spin_reg.specs import Policy


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
