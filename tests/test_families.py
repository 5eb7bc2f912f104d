"""Families of models: what is sampled is what is scored, whatever the padding, the companions and the attention."""

import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import SMALL, Command, read_jsonl
from test_templates import CHATML, EMPTY_THOUGHT, NO_SYSTEM, chat, tokenizer
from torch import Tensor
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel

from spin_reg import answering, models, render, sampling, scorer, selfcheck, sizes
from spin_reg.corpora import Jsonl
from spin_reg.errors import ConfigError, DataError
from spin_reg.generation import Generation
from spin_reg.logprobs import collate, token_logprobs
from spin_reg.settings import Dtype, Hardware, Pretrained, Quantize
from spin_reg.specs import Policy
from spin_reg.stages import converse, generate

VOCABULARY, LONGEST, WINDOW = 40, 40, 6
ENDS = (39, 3, 17)  # so many that some rows end early and leave the batch
PROMPTS = [[1, 2], [4], list(range(4, 17)), [9, 1], [2] * 5, [7], [8, 9, 10], [5, 6] * 6]

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": 39, "initializer_range": 0.2,
}  # fmt: skip
WINDOWS: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
HEADS: dict[str, Any] = {"head_dim": 8, "query_pre_attn_scalar": 8}
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "qwen2": lambda: Qwen2Config(**SHAPE, use_sliding_window=True, **WINDOWS),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=8),
    "gemma": lambda: GemmaConfig(**SHAPE, head_dim=8),
    "gemma2": lambda: Gemma2Config(
        **SHAPE, **HEADS, **WINDOWS, attn_logit_softcapping=2.0, final_logit_softcapping=5.0
    ),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE, **HEADS, **WINDOWS),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=WINDOW),
    "phi3": lambda: Phi3Config(**SHAPE, sliding_window=WINDOW),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2, eos_token_id=39,
        bos_token_id=None,
    ),
}  # fmt: skip


def slow_but_mistral(name: str, *more: str) -> Any:
    return pytest.param(name, *more, marks=[] if name == "mistral" else [pytest.mark.slow])


every_family = pytest.mark.parametrize("name", [slow_but_mistral(name) for name in FAMILIES])
every_attention = pytest.mark.parametrize(  # sdpa knows no soft capping: Gemma 2 is refused with it, see below
    ("name", "attention"),
    [slow_but_mistral(n, a) for n in FAMILIES for a in ("eager", "sdpa") if (n, a) != ("gemma2", "sdpa")],
)


@cache
def model(name: str, attention: str = "eager", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same random weights whatever the attention."""
    config = FAMILIES[name]()
    config._attn_implementation = attention
    torch.manual_seed(0)
    made: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    return made.to(dtype).eval()


def points(rows: int) -> Tensor:
    return torch.stack([sampling.uniforms(1, 0, f"row {i}", "train", LONGEST) for i in range(rows)])


def sampled(
    policy: PreTrainedModel, patch: pytest.MonkeyPatch, batch_size: int | None = None
) -> tuple[list[list[int]], list[list[float]], list[int]]:
    """Answers, the log-prob that each token was drawn with, and every step's batch size."""
    sizes, pick = [], sampling.pick

    def listening(logits: Tensor, at: Tensor, **kwargs: float) -> tuple[Tensor, Tensor]:
        sizes.append(len(logits))
        return pick(logits, at, **kwargs)

    patch.setattr(sampling, "pick", listening)
    answers = sampling.sample(
        policy, PROMPTS, points(len(PROMPTS)), ends=ENDS, temperature=1.0, top_p=1.0, batch_size=batch_size
    )
    patch.undo()
    return [a.ids for a in answers], [a.logprobs for a in answers], sizes


@torch.no_grad()
def scored(policy: PreTrainedModel, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[list[float]]:
    tokens = token_logprobs(policy, collate(prompts, answers)).tolist()
    return [row[: len(answer)] for row, answer in zip(tokens, answers, strict=True)]


@torch.no_grad()
def plain(policy: PreTrainedModel, prompt: list[int], answer: list[int]) -> list[float]:
    """One row as it is: no padding, no mask, no positions, no cache."""
    logits = policy(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0].float()
    table = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return [float(row[token]) for row, token in zip(table, answer, strict=True)]


def gap(some: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> float:
    """The largest difference of a token's log-prob, nats."""
    return max(
        abs(a - b) for row, other in zip(some, others, strict=True) for a, b in zip(row, other, strict=True)
    )  # fmt: skip


@every_attention
def test_what_is_drawn_is_what_is_scored(name: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached = live, also after rows have left and past a sliding window; padding, companions and order do nothing."""
    policy = model(name, attention)
    answers, live, sizes = sampled(policy, monkeypatch)
    assert sizes[-1] < sizes[0] == len(PROMPTS), "no row left the batch"
    assert max(map(len, answers)) > 3 * WINDOW
    assert max(math.exp(v) for row in live for v in row) > 0.3 and min(v for row in live for v in row) < -3
    together = scored(policy, PROMPTS, answers)
    assert gap(live, together) < 1e-5
    few, live, sizes = sampled(policy, monkeypatch, batch_size=3)  # prompts come in where others have ended
    assert few == answers and gap(live, together) < 1e-5 and max(sizes) == 3
    alone = [scored(policy, [p], [a])[0] for p, a in zip(PROMPTS, answers, strict=True)]
    assert gap(alone, together) < 1e-5
    assert gap([plain(policy, p, a) for p, a in zip(PROMPTS, answers, strict=True)], together) < 1e-5
    assert gap(scored(policy, PROMPTS[::-1], answers[::-1])[::-1], together) < 1e-5
    long = [PROMPTS[2] * 3, [7]], [[1], [2] * 60]  # a longer prompt pads on the left, a longer answer on the right
    assert gap(scored(policy, [*PROMPTS, *long[0]], [*answers, *long[1]])[:-2], together) < 1e-5
    if name != "gemma2":
        assert gap(scored(model(name), PROMPTS, answers), together) < 1e-5  # eager


# Nats a token that bfloat16 moves with the batch: the largest of a token; of an answer's mean; the mean of all answers.
TOKEN, ANSWER, MEAN = 0.06, 0.01, 0.002


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_tried_out_before_it_draws(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "_tried", set())
    generate._try_out(model(name, dtype=dtype))


def test_answers_that_are_drawn_at_other_positions_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, told = model("llama", "sdpa"), scorer.slot_states
    monkeypatch.setattr(generate, "_tried", set())
    generate._try_out(policy)
    monkeypatch.setattr(generate, "_tried", set())
    monkeypatch.setattr(scorer, "slot_states", lambda m, ids, positions, *more: told(m, ids, 3 * positions, *more))
    with pytest.raises(ConfigError, match="does not write as it reads"):
        generate._try_out(policy)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
def test_bfloat16_moves_a_log_prob_within_bounds(name: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By batch companions, and from cached decoding to scoring; the self-check's tolerance has room beyond it."""
    dtype = torch.float32 if autocast else torch.bfloat16
    policy = model(name, "eager" if name == "gemma2" else "sdpa", dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        answers, live, _ = sampled(policy, monkeypatch)
        together = scored(policy, PROMPTS, answers)
    alone = [scored(policy, [p], [a])[0] for p, a in zip(PROMPTS, answers, strict=True)]
    for other in (alone, live):
        assert gap(other, together) < TOKEN
        off = [(sum(a) - sum(b)) / len(a) for a, b in zip(other, together, strict=True)]
        assert max(map(abs, off)) < ANSWER < selfcheck.BFLOAT16.largest
        assert abs(sum(off) / len(off)) < MEAN < selfcheck.BFLOAT16.mean


def test_gemma_2_is_refused_with_an_attention_that_would_leave_its_capping_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved("gemma2", CHATML, tmp_path / "m")
    for sdpa in (Gemma2PreTrainedModel._supports_sdpa, True):  # as in releases of transformers that do not refuse it
        monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", sdpa)
        with pytest.raises(ConfigError) as raised:
            models.start(Pretrained(name_or_path=str(folder), attn_implementation="sdpa"))
        assert "scaled_dot_product_attention" in raised.value.why
        assert models.start(Pretrained(name_or_path=str(folder))).model.config._attn_implementation == "eager"


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "rope_theta": 1e4}
STRETCHED: dict[str, Callable[[], PreTrainedConfig]] = {
    "longrope": lambda: Phi3Config(
        **SHAPE, original_max_position_embeddings=24,
        rope_parameters=LONGROPE | {"original_max_position_embeddings": 24},
    ),
    "dynamic": lambda: LlamaConfig(
        **SHAPE | {"max_position_embeddings": 24},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STRETCHED)
def test_a_rope_that_stretches_is_exact_up_to_the_positions_that_are_allowed(name: str, tmp_path: Path) -> None:
    """Beyond, a row's log-probs would depend on its companions: the reason for the limit."""
    config = STRETCHED[name]()
    torch.manual_seed(0)
    policy = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    room = sizes.positions(Pretrained(name_or_path=str(tmp_path)))
    assert room == sizes.positions_of(policy.config.to_dict()) == 24
    asked = SimpleNamespace(max_new_tokens=40), SimpleNamespace(model=policy)
    assert converse.room(*asked, "a question", 20) == 4  # type: ignore[arg-type]

    def moved(length: int) -> float:
        rows = [[1, 2], [3]], [[4, 5, 6], [7] * (length - 1)]
        alone = plain(policy, rows[0][0], rows[1][0])  # first: in transformers 5.0 what was stretched once stays so
        return gap(scored(policy, *rows)[:1], [alone])

    assert moved(room) < 1e-5 < 1e-3 < moved(room + 1)
    fits = Jsonl(path="x", max_prompt_tokens=12, max_response_tokens=12)
    sizes.check_positions(Pretrained(name_or_path=str(tmp_path)), fits, Generation())
    with pytest.raises(ConfigError, match="may not fit"):
        sizes.check_positions(Pretrained(name_or_path=str(tmp_path)), fits, Generation(max_new_tokens=13))


def test_a_prompt_is_not_asked_beyond_where_a_rope_stretches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`max_position_embeddings` says 128, but what is drawn past 24 would hang on what is drawn beside it."""
    tok = tokenizer(CHATML, None, "<|endoftext|>")
    config = STRETCHED["longrope"]()
    config.vocab_size = len(tok)
    loaded = models.Loaded(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval(), tok, (39,))
    monkeypatch.setattr(answering.iterates, "load", lambda folder, policy: loaded)
    drawing = answering.Drawing(0, 1.0, 1.0, 24, 1, False)
    policy = Policy(Dtype.float32, None, None, Quantize.none, False)
    with pytest.raises(DataError, match="the model reads 24"):
        answering.ask(tmp_path, policy, Hardware(), [chat("a")], drawing)


def saved(name: str, template: str | None, folder: Path) -> Path:
    """A tiny model of a family with a BPE tokenizer whose eos (and pad) is not the template's end of turn."""
    tok = tokenizer(CHATML, None, "<|endoftext|>")
    tok.chat_template = template
    config = FAMILIES[name]()
    config.vocab_size, config.eos_token_id, config.max_position_embeddings = len(tok), tok.eos_token_id, 1024
    torch.manual_seed(0)
    MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "qwen3", "gemma2"])
def test_a_run_from_end_to_end(name: str, command: Command, tmp_path: Path) -> None:
    """Gemma's template takes no system message; Qwen 3's is a file for a model without one, and does not think."""
    gemma = name.startswith("gemma")
    base = saved(name, NO_SYSTEM if gemma else None, tmp_path / "base")
    file, data = tmp_path / "t.jinja", tmp_path / "d.jsonl"
    file.write_text(EMPTY_THOUGHT)
    own = ["dataset.fold_system=true"]
    if not gemma:
        own = [f"model.chat_template={file}", "model.template_kwargs={enable_thinking: false}"]
    with data.open("w") as stream:
        for i in range(34):
            said = chat(f"{i} + {i}?", f"The answer is {2 * i}.", system="Be brief.")
            stream.write(json.dumps({"messages": said}) + "\n")
        stream.write(json.dumps({"messages": chat("What is <|im_end|>?", "A mark.")}) + "\n")
    words = [word for word in SMALL if not word.startswith("model.")]
    words += ["model=pretrained", f"model.name_or_path={base}", "dataset=jsonl", f"dataset.path={data}", "run_name=run"]
    words += [
        "generation.max_new_tokens=12",
        f"outputs={tmp_path}",
        "schedule.optimizer=adamw",
        "regularizer=none",
        *own,
    ]
    result = command("train", *words, "dataset.num_prompts=null")
    assert result.code == 0, result.err
    root = tmp_path / "run"
    dropped = json.loads((root / "data/summary.json").read_text())
    assert dropped["reasons"] == {"has the text of a control token": 1} and "row 35 " in dropped["dropped"][0]
    plain_tokenizer = AutoTokenizer.from_pretrained(root / "iterate-02/model")
    end = plain_tokenizer.convert_tokens_to_ids("<|im_end|>")
    for t in (0, 1):
        rows = pq.read_table(root / f"iteration-{t:02d}/pairs.parquet").to_pylist()
        for row in rows:
            said = chat(row["prompt"], system="Be brief.")
            said = render.fold_system(said) if gemma else said
            ids = plain_tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
            assert row["prompt_ids"] == ids and "Be brief." in plain_tokenizer.decode(ids)
            assert plain_tokenizer.decode(row["real_ids"]) == row["real"] + "<|im_end|>"
            ends = {end, plain_tokenizer.eos_token_id}
            stopped = row["finish_reason"] == "stop"
            assert sum(token in ends for token in row["generated_ids"]) == stopped == (row["generated_ids"][-1] in ends)
        found = json.loads((root / f"iteration-{t:02d}/../iterate-{t + 1:02d}/model/selfcheck.json").read_text())
        assert found["largest_gap"] < 1e-5
    losses = [r["train/loss"] for r in read_jsonl(root / "metrics.jsonl") if r.get("step") == 1 and "train/loss" in r]
    assert losses == pytest.approx([math.log(2)] * 2, abs=1e-5)
    if gemma:
        return
    record = json.loads((root / "iterate-00/base.json").read_text())
    assert record["chat_template"] == EMPTY_THOUGHT and record["template_kwargs"] == {"enable_thinking": False}
    file.write_text(EMPTY_THOUGHT + " ")
    result = command("train", *words, "dataset.num_prompts=null", "schedule.iterations=3")
    assert result.code == 2 and "tokenizer" in result.err
