"""What `plan` prints: the stages of a run and how each stands, and what is left may cost; for people or programs."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from spin_reg import asking, estimate, machine, outlook, processes, space, stored
from spin_reg.fingerprint import plain
from spin_reg.outlook import Planned
from spin_reg.plan import Stage
from spin_reg.runner import State, Status
from spin_reg.sheet import short

BOUNDS = "; bounds: with --prepare the data are made first, for estimates"
GPUS = Path("/proc/driver/nvidia/gpus")  # where the driver lists them


def show(planned: Planned, before: Sequence[Planned] = ()) -> None:
    """A line a stage with its tokens and disk, then tokens, memory, time and disk of all; once."""
    again = planned.root in {other.root for other in before}
    print(f"run {short(planned.root)}" + (": as above" if again else ""))
    if again:
        return
    lines = [(state.status.value, stage.name, *_costs(planned, stage, state)) for stage, state in _each(planned)]
    first, second, third, fourth = (max(map(len, column)) for column in zip(*lines, strict=True))
    for (status, name, cost, disk), (_, state) in zip(lines, _each(planned), strict=True):
        print(f"  {status:{first}}  {name:{second}}  {cost:>{third}}  {disk:>{fourth}}  {state.reason}")
    needed, room = outlook.disk(planned), space.human(space.free(planned.outputs))
    counts = Counter(state.status for state in planned.states)
    print("  " + ", ".join(f"{n} {status}" for status, n in sorted(counts.items())))
    if planned.stop is not None:
        print(f"  stopped {planned.stop.words()}")
    tokens, memory, helps, asked = outlook.estimates(planned)
    unread = tokens.tokens and not tokens.measured and planned.states[0].status is Status.todo
    print(f"  tokens: {tokens.words()}{BOUNDS if unread else ''}")
    if asked.calls or asked.cached:
        print(f"  judge: {asking.words(planned.config.evaluation.judge, asked)}")
    if how := processes.words(planned.config.hardware):
        print(f"  processes: {how}")
    gpu = "; the memory of the GPU here was not looked at" if memory.by_kind and GPUS.is_dir() else ""
    print(f"  memory: {memory.words(machine.memory(), helps)}{gpu}")
    print(f"  time: {outlook.time_left(planned).words()}")
    print(f"  disk: {needed.words()}; {room} free")


def total(points: Sequence[Planned]) -> None:
    """What all points of a sweep take together: points may be equal, and what they share is made once."""
    runs = {planned.root: planned for planned in points}
    made, tokens, disk = set[str](), estimate.Work(0, 0, 0, 0, measured=True), 0
    for planned in runs.values():
        todo = [stage for stage in planned.todo if stage.fingerprint not in made]
        made |= {stage.fingerprint for stage in todo}
        tokens += estimate.work(todo, planned.have)
        disk += sum(stored.of(stage, planned.iterate, planned.have) for stage in todo)
    equal = f" ({len(points)} points, some of them equal)" if len(runs) < len(points) else ""
    print(f"all {len(runs)} runs{equal}: {len(made)} stages to make, those that they share once")
    print(f"  tokens: {tokens.words()}")
    print(f"  disk: about {space.human(disk)} when all is made")


def show_json(planned: Planned) -> None:
    """The same as one JSON object on a line: bytes, tokens and seconds as numbers."""
    tokens, memory, helps, asked = outlook.estimates(planned)
    stages = [
        {"name": stage.name, "status": state.status, "reason": state.reason} | outlook.of_stage(planned, stage, state)
        for stage, state in _each(planned)
    ]
    found = {"run": planned.root, "finished": planned.finished, "stages": stages, "tokens": tokens}
    found |= {"stopped": None if planned.stop is None else planned.stop.words(), "judge": asked}
    found |= {
        "memory": dict(memory.by_kind),
        "room": machine.memory(),
        "memory_help": helps,
        "time": outlook.time_left(planned),
    }
    hardware = planned.config.hardware
    found |= {"processes": processes.count(hardware), "threads": processes.threads(hardware)}
    found |= {"disk": outlook.disk(planned), "free": space.free(planned.outputs)}
    print(json.dumps(plain(found), ensure_ascii=False, allow_nan=False))


def _each(planned: Planned) -> list[tuple[Stage, State]]:
    return list(zip(planned.stages, planned.states, strict=True))


def _costs(planned: Planned, stage: Stage, state: State) -> tuple[str, str]:
    """Tokens and bytes of a stage, for people; empty where there is nothing left to make."""
    found = outlook.of_stage(planned, stage, state)
    tokens, disk = found["tokens"], found["disk"]
    return f"{estimate.count(tokens)} tokens" if tokens else "", space.human(disk) if disk else ""
