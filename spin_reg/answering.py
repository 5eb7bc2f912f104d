"""Answers of an iterate to prompts that are no data of its run, drawn as the run draws."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from spin_reg import iterates, render, sampling, sizes
from spin_reg.errors import DataError
from spin_reg.fingerprint import digest
from spin_reg.render import Messages, Unusable
from spin_reg.sampling import Answer
from spin_reg.settings import Hardware
from spin_reg.specs import Policy


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn. `temperature` 0: the likeliest token each time. `fold_system`: see `render`."""

    seed: int
    temperature: float
    top_p: float
    max_new_tokens: int
    batch_size: int
    fold_system: bool


def ask(
    folder: Path, policy: Policy, hardware: Hardware, prompts: Sequence[Messages], drawing: Drawing
) -> list[tuple[Answer, str]]:
    """What an iterate answers to each prompt, and that as text.

    The draws depend on (seed, prompt, how often it was asked before) alone, so that iterates can be compared.

    Raises:
        DataError: the template cannot render a prompt, or there is no room for it and the longest answer.
    """
    accelerator = iterates.accelerator(hardware)
    loaded = iterates.load(folder, policy)
    model = loaded.model.to(accelerator.device)
    room = sizes.positions_of(model.config.to_dict())
    ids, names, asked = [], [], Counter[str]()
    for i, messages in enumerate(prompts, start=1):
        try:
            ids.append(
                render.asked_ids(loaded.tokenizer, render.fold_system(messages) if drawing.fold_system else messages)
            )
            if room is not None and len(ids[-1]) + drawing.max_new_tokens > room:
                raise Unusable(f"has {len(ids[-1])} tokens, and the model reads {room}, the longest answer among them")
        except Unusable as fault:
            todo = "change the prompt, or --system or --max-new-tokens"
            raise DataError("A prompt cannot be asked.", where=f"prompt {i}", why=f"it {fault}", todo=todo) from fault
        names.append(f"{digest(messages)[:16]}-{asked[digest(messages)]}")
        asked[digest(messages)] += 1
    points = [sampling.uniforms(drawing.seed, 0, name, "sample", drawing.max_new_tokens) for name in names]
    with accelerator.autocast():
        answers = sampling.sample(
            model,
            ids,
            torch.stack(points),
            ends=loaded.end_ids,
            temperature=drawing.temperature,
            top_p=drawing.top_p,
            batch_size=drawing.batch_size,
            names=names,
        )
    return [(answer, loaded.tokenizer.decode(answer.ids, skip_special_tokens=True)) for answer in answers]
