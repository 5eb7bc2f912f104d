"""vLLM in processes of its own, in an interpreter of its own: started, asked, and ended.

`vllm_child.py` is the other side, and says what is spoken. A process is started when prompts first come, since loading
takes longer than a small shard, and lives as long as the stage. What it prints goes to a file beside the shards.
"""

import json
import os
import select
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spin_reg import stopping, vllm_python
from spin_reg.child import LAUNCHED
from spin_reg.errors import SpinRegError
from spin_reg.redact import redacted

CHILD = Path(__file__).with_name("vllm_child.py")
EVERY = 0.2  # seconds between two looks at it
PATIENCE = 3.0  # seconds that it has to end when its input does; less than a stopped run has itself
SHOWN, TAIL = 4, 1 << 14  # lines, and bytes of its log that they are looked for in
ROOM = {"VLLM_CPU_KVCACHE_SPACE": "4"}  # GiB for its cache, on a CPU; what is set outside wins

Prompts = Sequence[Sequence[int]]
Drawn = tuple[list[int], str]  # token ids, and `stop` or `length`


@dataclass(frozen=True)
class Asked:
    """What vLLM is to load and how it is to draw.

    Attributes:
        python: the interpreter, None: this one. threads: of a process on a CPU, None: as many as it likes.
        model: a folder with safetensors. adapter: a PEFT folder and its rank, over the model.
        prompt: tokens of the longest prompt. answer: of the longest answer. ends: the token ids that end one.
        batch_size: how many are answered at a time. dtype: of weights and arithmetic.
    """

    python: str | None
    threads: int | None
    model: str
    adapter: tuple[str, int] | None
    dtype: str
    trust_remote_code: bool
    prompt: int
    answer: int
    batch_size: int
    temperature: float
    top_p: float
    ends: tuple[int, ...]

    def request(self, *, cpu: bool) -> dict[str, Any]:
        """The first line that a process is told."""
        engine = {
            "dtype": self.dtype,
            "max_num_seqs": self.batch_size,
            "max_model_len": self.prompt + self.answer,
            "trust_remote_code": self.trust_remote_code,
        }
        sampling = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,  # off
            "max_tokens": self.answer,
            "stop_token_ids": list(self.ends),
        }
        return {"model": self.model, "adapter": self.adapter, "engine": engine, "sampling": sampling, "cpu": cpu}


@dataclass
class Engine:
    """Draws answers; `versions` is told which vLLM does, once one is at work. One process a GPU, else one."""

    asked: Asked
    folder: Path
    poll: Callable[[], None]
    versions: Callable[[str], None]
    stack: ExitStack
    children: "list[_Child]" = field(default_factory=list)

    def draw(self, prompts: Prompts, seeds: Sequence[int], ended: Callable[[int], None]) -> list[Drawn]:
        """One answer a prompt, whose draws depend on its seed alone. Processes are dealt prompts in turn.

        Args:
            ended: told how many answers are whole.

        Raises:
            SpinRegError: a process ended, or said what is no answer. Whatever `poll` raises.
        """
        if not self.children:
            self._start()
        at_work = self.children[: len(prompts)]
        dealt = [range(i, len(prompts), len(at_work)) for i in range(len(at_work))]
        for child, places in zip(at_work, dealt, strict=True):
            child.tell({"prompts": [list(prompts[i]) for i in places], "seeds": [seeds[i] for i in places]})
        found: dict[int, Drawn] = {}
        counts = dict.fromkeys(range(len(at_work)), 0)
        for i, reply in self._replies(at_work, until="answers"):
            if "ended" in reply:
                counts[i] = int(reply["ended"])
                ended(sum(counts.values()))
            else:
                found |= dict(zip(dealt[i], self._answers(at_work[i], reply, len(dealt[i])), strict=True))
        return [found[i] for i in range(len(prompts))]

    def _start(self) -> None:
        """Start the processes, and wait until they have loaded the model."""
        python = vllm_python.path(self.asked.python)
        gpus = vllm_python.gpus(self.asked.python)
        for n, variables in enumerate(_environments(gpus, self.asked.threads)):
            child = self.stack.enter_context(_started(python, variables, self.folder / f"vllm-{n}.log"))
            child.tell(self.asked.request(cpu=not gpus))
            self.children.append(child)
        for _, reply in self._replies(self.children, until="ready"):
            self.versions(str(reply["ready"]))

    def _replies(self, children: Sequence["_Child"], until: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """What they say, each with who did, until each has said its last."""
        waiting = dict(enumerate(children))
        while waiting:
            self.poll()
            ready, _, _ = select.select([child.output for child in waiting.values()], [], [], EVERY)
            for i, child in list(waiting.items()):
                for reply in child.heard() if child.output in ready else ():
                    if until in reply:
                        del waiting[i]
                    elif set(reply) != {"ended"} or until == "ready":
                        raise child.nonsense(json.dumps(reply))
                    yield i, reply

    def _answers(self, child: "_Child", reply: Mapping[str, Any], count: int) -> list[Drawn]:
        """Answers that are what answers must be: ended by an end token, or as long as may be without one."""
        ends, longest = set(self.asked.ends), self.asked.answer
        try:
            answers = [([int(token) for token in ids], str(reason)) for ids, reason in reply["answers"]]
            for ids, reason in answers:
                stopped = ids[-1] in ends
                right = len(ids) <= longest and (stopped or len(ids) == longest) and not ends & set(ids[:-1])
                if not right or reason != ("stop" if stopped else "length"):
                    raise ValueError(f"{len(ids)} tokens, {reason}")
        except (ValueError, TypeError, IndexError) as error:
            raise child.nonsense(f"{error}: {json.dumps(reply)}") from error
        if len(answers) != count:
            raise child.nonsense(f"{len(answers)} answers to {count} prompts")
        return answers


@contextmanager
def opened(
    asked: Asked, folder: Path, *, poll: Callable[[], None], versions: Callable[[str], None]
) -> Iterator[Engine]:
    """vLLM for as long as the block runs.

    Args:
        folder: where what its processes print is kept. poll: called while they are waited for; may raise.
    """
    with ExitStack() as stack:
        yield Engine(asked, folder, poll, versions, stack)


def _environments(gpus: int, threads: int | None) -> list[dict[str, str]]:
    """The variables of each process: with several GPUs each sees one of those that we were given."""
    own = {name: value for name, value in os.environ.items() if not LAUNCHED.match(name)}
    variables = ROOM | own | vllm_python.QUIET
    if threads is not None:
        variables["OMP_NUM_THREADS"] = str(threads)
    if gpus < 2:
        return [variables]
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = given.split(",")[:gpus] if given else [str(n) for n in range(gpus)]
    return [variables | {"CUDA_VISIBLE_DEVICES": name.strip()} for name in names]


@dataclass
class _Child:
    """A process at work."""

    process: "subprocess.Popen[bytes]"
    output: int
    log: Path
    rest: bytes = b""

    def tell(self, request: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise self.crashed() from error

    def heard(self) -> list[dict[str, Any]]:
        """What it has said since; there must be something, or it has ended."""
        part = os.read(self.output, 1 << 16)
        if not part:
            raise self.crashed()
        *lines, self.rest = (self.rest + part).split(b"\n")
        return [self._read(line) for line in lines]

    def _read(self, line: bytes) -> dict[str, Any]:
        try:
            reply = json.loads(line)
        except ValueError as error:
            raise self.nonsense(line.decode(errors="replace")) from error
        if not isinstance(reply, dict):
            raise self.nonsense(line.decode(errors="replace"))
        return reply

    def crashed(self) -> SpinRegError:
        """The error for a process that has ended, or is about to."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)
        code = self.process.returncode
        how = "it closed its output" if code is None else f"exit code {code}"
        if code is not None and code < 0:
            how = f"ended by signal {-code} ({signal.Signals(-code).name})"
            how += ", which the system sends where memory runs out" if code == -signal.SIGKILL else ""
        return self._failed("vLLM ended before it had answered.", f"{how}; it said last: {self._last_lines()}")

    def nonsense(self, said: str) -> SpinRegError:
        """The error for a reply that is none."""
        shown = said if len(said) <= 200 else f"{said[:200]}..."
        return self._failed("vLLM replied with what is no answer.", f"{shown}; it said last: {self._last_lines()}")

    def _failed(self, what: str, why: str) -> SpinRegError:
        todo = "mend it, or use less memory (generation.batch_size), and run the same command again: it goes on"
        return SpinRegError(
            what, where=str(self.log), why=redacted(why)[:1200], todo=f"{todo} at the first shard missing"
        )

    def _last_lines(self) -> str:
        with self.log.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - TAIL))
            lines = stream.read().decode(errors="replace").splitlines()
        said = [line.strip() for line in lines if line.strip()]
        return " | ".join(said[-SHOWN:]) or "nothing"


@contextmanager
def _started(python: str, variables: Mapping[str, str], log: Path) -> Iterator[_Child]:
    """A process, until the block ends; with it end all that it has started."""
    with log.open("ab") as said:
        process = subprocess.Popen(
            [python, str(CHILD)],
            env=dict(variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,  # a terminal's Ctrl-C is ours to pass on
        )

    def kill() -> None:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)

    assert process.stdin is not None and process.stdout is not None
    with stopping.ending(kill), process.stdout:
        try:
            yield _Child(process, process.stdout.fileno(), log)
        finally:
            with suppress(OSError):
                process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            kill()  # whoever of its group is left
            process.wait()
