"""What the loop costs, by counters and not by time: answers, log-probs and tokens of plans, and of real runs."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT, SMALL, Command
from hydra import compose, initialize_config_dir

from spin_reg import amounts, config, estimate, iterates, launch, outlook, overrides, rundir, tables
from spin_reg.plan import Sources, Stage, plan
from spin_reg.roles import answers_role
from spin_reg.specs import CHECKED, GenerateSpec, PrepareSpec, ScoreSpec, Split

N, ITERATIONS = 2000, 10
NAMES = [f"train-{i:05d}" for i in range(N)]
HELDOUT = (Split.heldout, Split.retained_heldout)
ALPHAS = ("0", "0.1", "0.25", "0.5", "1")
PRETRAINED = ("model=pretrained", "model.name_or_path=m", "dataset=jsonl", "dataset.path=x.jsonl")
Train = Callable[..., Path]


def settings(*words: str) -> config.Config:
    config.register()
    overrides.register_help(ROOT / "conf")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return config.load(compose("config", list(words)))


def stages(*words: str) -> list[Stage]:
    return plan(settings(*words), Sources(model="m", tokenizer="t", data="d"))


class Asked:
    """Which examples each stage of a plan is asked for, by its own draw."""

    def __init__(self, names: Mapping[Split, list[str]]) -> None:
        self.names, self.found = names, dict[str, list[str]]()

    def of(self, stage: Stage) -> list[str]:
        """An example as often as the stage has an answer to it."""
        if stage.name not in self.found:
            spec, names = stage.spec, self.names[stage.spec.split]
            if isinstance(spec, GenerateSpec):
                places = spec.asked(names)
            else:
                answered = {j: set(self.of(stage.needs[answers_role(j)])) for j in spec.window}
                places = [i for i, whose in spec.asked(names, answered).items() for _ in whose]
            self.found[stage.name] = [names[i] for i in places]
        return self.found[stage.name]


class Counts(NamedTuple):
    """Of the training split in one iteration: answers drawn, log-probs that come with them, and forward scorings."""

    answers: int
    free: int
    scorings: int


def by_iteration(*words: str, rows: int = N) -> list[Counts]:
    """What each iteration adds to those before: the answers and scores behind its pairs and its self-check."""
    made = stages("evaluation=none", f"schedule.iterations={ITERATIONS}", *words)
    asked = Asked({Split.train: NAMES[:rows]})
    seen: set[str] = set()
    found = []
    for t in range(ITERATIONS):
        users = [s for s in made if s.name in (f"iteration-{t:02d}/pairs", f"iteration-{t:02d}/train")]
        needs = {n.name: n for s in users for n in s.needs.values() if n.kind in ("generate", "score")}
        new = [(n.spec, len(asked.of(n))) for name, n in needs.items() if name not in seen]
        drawn = [(spec, count) for spec, count in new if isinstance(spec, GenerateSpec)]
        free = sum(count for spec, count in drawn if spec.scored)
        scorings = sum(count for spec, count in new if isinstance(spec, ScoreSpec))
        found.append(Counts(sum(count for _, count in drawn), free, scorings))
        seen |= set(needs)
    assert seen == {s.name for s in made if s.kind in ("generate", "score")}
    return found


def test_fresh_makes_n_answers_and_n_times_t_plus_2_log_probs() -> None:
    """Exactly: every prompt is answered anew by one iterate of the window and scored by all t + 1, one of which is the
    iterate that answers and has it for nothing; the real answers are new to the newest iterate alone.
    """
    for t, counts in enumerate(by_iteration("regularizer=fictitious_play")):
        assert (counts.answers, counts.free, counts.scorings) == (N, N, N * (t + 1))
        assert counts.free + counts.scorings == N * (t + 2)


@pytest.mark.slow
def test_reuse_makes_n_over_t_plus_1_answers_and_3n_less_that_log_probs() -> None:
    """The movers are a binomial draw, N of 1/(t + 1): within four standard deviations. Given them the rest is exact:
    the newest iterate scores N real answers and the N - movers that stay, the t older ones score the movers', and the
    movers' own log-probs come with their answers. So 3N - N/(t + 1) in expectation, N/(t + 1) of them for nothing.
    """
    for t, counts in enumerate(by_iteration("regularizer=fictitious_play", "regularizer.pairs=reuse")):
        share = 1 / (t + 1)
        slack = 4 * math.sqrt(N * share * (1 - share))
        assert abs(counts.answers - N * share) <= slack
        assert counts.free == counts.answers
        assert counts.scorings == N + (N - counts.answers) + t * counts.answers
        assert abs(counts.free + counts.scorings - (3 * N - N * share)) <= t * slack


@pytest.mark.slow
@pytest.mark.parametrize("pairs", ["fresh", "reuse"])
def test_away_from_the_iterates_own_law_no_log_prob_comes_with_an_answer(pairs: str) -> None:
    """At another temperature or top_p, and in bf16, every log-prob is a forward scoring; their number is the same."""
    words = ("regularizer=fictitious_play", f"regularizer.pairs={pairs}")
    plain = by_iteration(*words, rows=100)
    for word in ("generation.temperature=0.9", "generation.top_p=0.9", "model.dtype=bfloat16"):
        for counts, before in zip(by_iteration(*words, word, rows=100), plain, strict=True):
            assert (counts.answers, counts.free) == (before.answers, 0)
            assert counts.scorings == before.free + before.scorings


@pytest.mark.parametrize("words", [("none",), ("kl", "alpha=0.5"), ("kl", "alpha=0")])
def test_kl_and_none_score_each_real_answer_once_an_iterate(words: tuple[str, ...]) -> None:
    """Over the whole run, evaluation too; the last iterate has no iteration that would ask for the training answers."""
    made = stages(f"schedule.iterations={ITERATIONS}", *(f"regularizer={words[0]}", *words[1:]))
    real = [s.spec for s in made if isinstance(s.spec, ScoreSpec) and s.spec.real]
    assert all(spec.first is None for spec in real)
    found = sorted((spec.split, spec.k) for spec in real)
    train = [(Split.train, k) for k in range(ITERATIONS)]
    assert found == sorted(train + [(s, k) for s in HELDOUT for k in range(ITERATIONS + 1)])


def test_alpha_1_scores_the_training_answers_with_the_base_alone() -> None:
    """But for the few rows of each later iterate that its self-check reads: nothing else asks it for them."""
    made = stages(f"schedule.iterations={ITERATIONS}", "regularizer=kl", "alpha=1")
    real = {s.spec.k: s.spec for s in made if isinstance(s.spec, ScoreSpec) and s.spec.real and s.spec.split == "train"}
    answered = {k: set[str]() for k in range(ITERATIONS)}
    found = [len(real[k].asked(NAMES, answered)) for k in range(ITERATIONS)]
    assert found == [N] + [CHECKED] * (ITERATIONS - 1)


def tokens(some: Sequence[Stage], rows: dict[Split, int]) -> int:
    """The work of stages as tokens, of which a token that is trained on costs as much as three that are read."""
    dataset = next(stage.spec.dataset for stage in some if isinstance(stage.spec, PrepareSpec))
    work = estimate.work(some, amounts.limits(dataset, rows))
    return work.drawn + work.scored + 3 * work.trained


def sweep(rows: dict[Split, int], *words: str) -> float:
    """The work of five alphas over three iterations as a share of that of five runs apart."""
    runs = [stages("regularizer=kl", f"alpha={alpha}", "schedule.iterations=3", *words) for alpha in ALPHAS]
    once = {s.fingerprint: s for run in runs for s in run}
    return tokens(list(once.values()), rows) / sum(tokens(run, rows) for run in runs)


@pytest.mark.slow
def test_a_sweep_of_five_alphas_is_at_most_60_percent_of_five_runs() -> None:
    """The default toy: SFT and iteration 0 are made once, and iterate 1 answers and scores once."""
    rows = {Split.train: 1024, Split.retained_train: 1024, Split.heldout: 512, Split.retained_heldout: 512}
    assert sweep(rows) <= 0.6 and sweep(rows, "evaluation=none") <= 0.6


@pytest.mark.slow
def test_without_an_sft_stage_a_sweep_shares_less() -> None:
    """From iteration 1 on the five train apart, so no plan can train on less than 11 of 15 iterations; answers and
    scores are shared more than that. It takes a stage that all have in common, as SFT is, to come below 60 %.
    """
    rows = {Split.train: 1000, Split.heldout: 100}
    assert 0.65 < sweep(rows, *PRETRAINED, "schedule.epochs=1") < sweep(rows, *PRETRAINED) < 11 / 15


def planned(*words: str) -> outlook.Planned:
    found = launch.prepare(settings(*words))
    assert found.finished
    return found


def check_tables(run: outlook.Planned) -> int:
    """Every table of answers and of scores has just the rows that the plan asks for; returns of how many stages."""
    splits = (Split.train, *HELDOUT)
    asked = Asked({split: tables.column("example_id", run.root / f"data/{split}.parquet") for split in splits})
    looked_at = [s for s in run.stages if isinstance(s.spec, GenerateSpec | ScoreSpec)]
    for stage in looked_at:
        own = isinstance(stage.spec, GenerateSpec)
        files = ["answers.parquet"] * own + ["scores.parquet"] * (not own or stage.spec.scored)
        for file in files:
            assert tables.column("example_id", run.root / stage.folder / file) == asked.of(stage), stage.name
    return len(looked_at)


@pytest.mark.slow
@pytest.mark.parametrize("pairs", ["fresh", "reuse"])
def test_a_run_makes_just_the_rows_of_its_plan(pairs: str, train: Train) -> None:
    words = ["regularizer=fictitious_play", f"regularizer.pairs={pairs}", "schedule.iterations=4"]
    root = train(*words)
    assert check_tables(planned(*SMALL, *words, f"outputs={root.parent}", f"run_name={root.name}")) > 30


@pytest.mark.slow
def test_a_sweep_makes_each_stage_of_its_plans_once(command: Command, tmp_path: Path) -> None:
    """Five alphas over three iterations, by what their logs say was made: no fingerprint twice, none missing."""
    words = [*SMALL, "schedule.iterations=3", f"outputs={tmp_path}"]
    result = command("train", "-m", *words, f"alpha={','.join(ALPHAS)}")
    assert result.code == 0, result.err
    runs = [planned(*words, f"alpha={alpha}") for alpha in ALPHAS]
    assert all(check_tables(run) for run in runs)
    made: list[str] = []
    for run in runs:
        of = {s.name: s for s in run.stages}
        took = re.findall(r"(\S+): took ", (run.root / "run.log").read_text())
        made += [of[name].fingerprint for name in took]
        for stage in run.stages:
            found = rundir.manifest(run.root / stage.folder)
            assert found is not None and found["fingerprint"] == stage.fingerprint
    assert len(made) == len(set(made)) and set(made) == {s.fingerprint for run in runs for s in run.stages}


@pytest.mark.slow
def test_no_stage_that_is_made_loads_a_model_again(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two iterations more: the iterates before the newest answered and scored all that is asked of them."""
    words = ("regularizer=none", "evaluation=none")
    root = train(*words)
    loads: list[str] = []
    load = iterates.load

    def noted(folder: Path, *args: object, **kwargs: object) -> object:
        loads.append(folder.parent.name)
        return load(folder, *args, **kwargs)

    monkeypatch.setattr(iterates, "load", noted)
    assert train(*words) == root and not loads
    train(*words, "schedule.iterations=4")
    assert loads == ["iterate-02"] * 3 + ["iterate-03"] * 3  # its answers, its scores, its training
