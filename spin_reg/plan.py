"""The plan: a pure function from settings to the list of stages, each after what it needs."""

from collections.abc import Mapping, Sequence, Set

from spin_reg import judges, opponents, policies
from spin_reg.config import Config
from spin_reg.corpora import Toy, published
from spin_reg.generation import Generation
from spin_reg.opponents import Draw, Opponent, Pairs
from spin_reg.roles import answers_role, generated_role, holds_scores, real_role, results_role
from spin_reg.schedules import at
from spin_reg.settings import KeepIterates, Pretrained
from spin_reg.specs import (
    CHECKED,
    AnswersSpec,
    BaseSpec,
    DivergenceSpec,
    EvaluateSpec,
    GenerateSpec,
    PairsSpec,
    PrepareSpec,
    PublishedSpec,
    ScoreSpec,
    SftSpec,
    Spec,
    Split,
)
from spin_reg.stage import Sources as Sources
from spin_reg.stage import Stage as Stage


def _brings(k: int, answers: Stage) -> bool:
    """Whether a stage holds iterate k's log-probs beside its answers."""
    return isinstance(answers.spec, GenerateSpec) and answers.spec.k == k and answers.spec.scored


def plan(config: Config, sources: Sources) -> list[Stage]:
    """All stages of a run in the order they are made.

    Benchmarks come last, so that nothing waits for them; or along the way, where weights go along the way.
    """
    builder, last = _Builder(config, sources), config.schedule.iterations
    late = config.keep_iterates is KeepIterates.all
    for t in range(last + 1):
        builder.evaluate(t)
        if not late:
            builder.benchmarks(t)
        if t < last:
            builder.iterate(t + 1)
    for k in range(last + 1 if late else 0):
        builder.benchmarks(k)
    return list(builder.stages.values())


class _Builder:
    """Makes each stage when it is first needed; `stages` keeps that order."""

    def __init__(self, config: Config, sources: Sources) -> None:
        self.config, self.sources = config, sources
        self.policy = policies.policy(config)
        self.stages: dict[str, Stage] = {}
        self.scores: dict[tuple[int, str], Stage] = {}  # what is read together, by iterate and what is scored
        self.opponents: dict[int, Opponent] = {}

    def _add(self, name: str, spec: Spec, needs: Mapping[str, Stage], folder: str | None = None) -> Stage:
        return self.stages.setdefault(name, Stage(name, folder or name, spec, needs))

    def _opponent(self, t: int) -> Opponent:
        if t not in self.opponents:
            assert self.config.regularizer is not None
            self.opponents[t] = self.config.regularizer.opponent(t)
        return self.opponents[t]

    def data(self) -> Stage:
        if "data" in self.stages:
            return self.stages["data"]
        c, s = self.config, self.sources
        return self._add("data", PrepareSpec(c.model, s.tokenizer, c.dataset, s.data), {})

    def iterate(self, k: int) -> Stage:
        """The stage whose folder holds the weights of iterate k (or base.json)."""
        c, data = self.config, self.data()
        if k > 0:
            return self._train(k - 1)
        if isinstance(c.model, Pretrained) and c.model.sft.epochs == 0:
            assert self.sources.model is not None
            base = BaseSpec(c.model, c.model.revision, self.sources.model, self.sources.tokenizer)
            return self._add("iterate-00/base", base, {}, folder="iterate-00")
        spec = SftSpec(c.model, self.sources.model, c.model.sft, c.seed, self.policy, c.hardware, c.schedule.save_every)
        return self._add("iterate-00/sft", spec, {"data": data}, folder="iterate-00/model")

    def _train(self, t: int) -> Stage:
        name = f"iteration-{t:02d}/train"
        if name in self.stages:
            return self.stages[name]
        spec = policies.training(self.config, t)
        if self.config.loss.plays:
            pairs = self.pairs(t)
            needs = {"pairs": pairs, "model": self.iterate(t)} | self._own_scores(t, pairs)
        else:
            needs = {"data": self.data(), "model": self.iterate(t)}
        return self._add(name, spec, needs, folder=f"iterate-{t + 1:02d}/model")

    def _own_scores(self, t: int, pairs: Stage) -> dict[str, Stage]:
        """The score tables behind iteration t's pairs, and iterate t's own, for the self-check at its start.

        Iterate t's are there where the reference is made of them; where it is not (a static base), those of a few rows.
        """
        needs = {role: need for role, need in pairs.needs.items() if holds_scores(role)}
        if real_role(t) not in needs:
            needs[real_role(t)] = self.real(t, Split.train, first=CHECKED)
        for j in self._opponent(t).window:
            if generated_role(t, j) not in needs:
                needs[generated_role(t, j)] = self.generated(t, self.answers(j, t), first=CHECKED)
        return needs

    def _draw(self, t: int) -> Draw | None:
        """How the training prompts of iteration t are dealt; None where every iterate of the window answers all."""
        opponent = self._opponent(t)
        if len(opponent.window) == 1 or opponent.pairs is Pairs.union:
            return None
        reuse = opponent.pairs is Pairs.reuse
        samplers = [self._opponent(i).sampler for i in (range(t + 1) if reuse else [t])]
        return Draw(self.config.seed, t, tuple(samplers), reuse)

    def _heldout_draw(self, t: int) -> Draw | None:
        opponent = self._opponent(t)
        one = len(opponent.window) == 1
        return None if one else Draw(self.config.seed, t, (opponent.sampler,), reuse=False)

    def answers(self, j: int, t: int) -> Stage:
        """The answers of iterate j that iteration t trains on.

        Under `fresh` they are new each iteration; otherwise, and where one iterate answers everything, an iterate
        answers once, in the iteration that carries its number.
        """
        opponent = self._opponent(t)
        fresh = opponent.pairs is Pairs.fresh and len(opponent.window) > 1
        round_ = t if fresh else j
        return self._generate(j, Split.train, round_, self._draw(round_))

    def _generate(
        self,
        k: int,
        split: Split,
        round_: int,
        draw: Draw | None,
        sampling: Generation | None = None,
        most: int | None = None,
    ) -> Stage:
        """Answers of iterate k, drawn as in the game but for what `sampling` and `most` (tokens) say."""
        c, sampling = self.config, sampling or self.config.generation
        longest = most or policies.longest(c)
        name = f"iterate-{k:02d}/answers/{split}" + (f"-{round_:02d}" if split is Split.train else "")
        name += policies.drawn_otherwise(c, sampling, longest)
        if name in self.stages:
            return self.stages[name]
        if (k, split, round_) == (0, Split.train, 0) and published(c.dataset):
            return self._add(name, PublishedSpec(k, split, longest, c.model), {"data": self.data()})
        spec = GenerateSpec(
            k=k,
            split=split,
            round=round_,
            draw=draw,
            generation=sampling,
            max_new_tokens=longest,
            seed=c.seed,
            policy=self.policy,
            hardware=c.hardware,
        )
        return self._add(name, spec, {"data": self.data(), "model": self.iterate(k)})

    def heldout_answers(self, k: int, *, plain: bool = False) -> Stage:
        """One answer of iterate k to every held-out prompt; `plain`: at temperature 1 and top_p 1 whatever is set."""
        return self._generate(k, Split.heldout, k, None, policies.sampling(self.config, 1.0) if plain else None)

    def results(self, k: int) -> Stage:
        """The held-out answers of iterate k whose results are compared with the real ones."""
        exact = self.config.evaluation.exact_match
        sampling = policies.sampling(self.config, exact.temperature)
        return self._generate(k, Split.heldout, k, None, sampling, exact.max_new_tokens)

    def divergence(self, k: int, other: int, own: Stage) -> Stage:
        """KL(pi_k || pi_other) over the whole vocabulary along iterate k's own answers."""
        spec = DivergenceSpec(k, other, self.config.evaluation.full_kl_prompts, self.policy, self.config.hardware)
        needs = {"data": self.data(), "model": self.iterate(k), "other": self.iterate(other), "own": own}
        return self._add(f"iterate-{k:02d}/divergence/from-{other:02d}-first-{spec.first}", spec, needs)

    def real(self, k: int, split: Split, first: int | None = None) -> Stage:
        """The stage that holds iterate k's log-probs of the real answers of a split."""
        return self.scores.get((k, split)) or self._score(k, split, [], real=True, first=first)

    def generated(self, k: int, answers: Stage, first: int | None = None) -> Stage:
        """The stage that holds iterate k's log-probs of the answers of another stage.

        An iterate has those of its own answers from drawing them, where they are the same (`GenerateSpec.scored`).
        """
        assert isinstance(answers.spec, AnswersSpec)
        return self._held(k, answers, first) or self._score(k, answers.spec.split, [answers], real=False, first=first)

    def _held(self, k: int, answers: Stage, first: int | None = None) -> Stage | None:
        """The stage that holds iterate k's log-probs of these answers, if the plan has one."""
        known = answers if _brings(k, answers) else self.scores.get((k, answers.name))
        return known or self.stages.get(policies.scores_name(k, [answers], first=first))

    def together(self, k: int, split: Split, answers: Sequence[Stage], *, real: bool) -> None:
        """Have iterate k read each prompt once with all these answers, and the real one, as training reads pairs."""
        left = [stage for stage in answers if not _brings(k, stage)]
        if left and real:
            stage = self._score(k, split, left, real=True)
            self.scores |= {(k, split): stage} | {(k, scored.name): stage for scored in left}

    def _score(self, k: int, split: Split, answers: Sequence[Stage], *, real: bool, first: int | None = None) -> Stage:
        """Under `reuse` older iterates' answers are scored only where the newer scorer k still trains on them."""
        c, made = self.config, {stage.spec.k: stage for stage in answers if isinstance(stage.spec, AnswersSpec)}
        window = tuple(sorted(made, reverse=True))
        reused = split is Split.train and self._opponent(k).pairs is Pairs.reuse and any(j < k for j in window)
        spec = ScoreSpec(
            k=k,
            split=split,
            real=real,
            window=window,
            draw=self._draw(k) if reused else None,
            first=first,
            policy=self.policy,
            hardware=c.hardware,
        )
        name = policies.scores_name(k, [made[j] for j in window], split if real else None, first)
        needs = {"data": self.data(), "model": self.iterate(k)}
        return self._add(name, spec, needs | {answers_role(j): made[j] for j in window})

    def _game(self, t: int, split: Split) -> tuple[PairsSpec, dict[str, Stage]]:
        """What iteration t plays on a split: the spec of its pairs, and the stages they are joined from."""
        opponent = self._opponent(t)
        heldout = split is Split.heldout
        answers = {j: self.heldout_answers(j) if heldout else self.answers(j, t) for j in reversed(opponent.window)}
        needs = {"data": self.data()} | {answers_role(j): stage for j, stage in answers.items()}
        iterates = opponents.support(opponent.reference)
        for k in sorted(iterates, reverse=True):  # the newest first: it is the one in memory
            needs[real_role(k)] = self.real(k, split)
            for j, stage in answers.items():
                if k in opponents.scorers(opponent.reference, j):
                    needs[generated_role(k, j)] = self.generated(k, stage)
        draw = self._heldout_draw(t) if heldout else self._draw(t)
        tree = opponents.to_json(opponent.reference)
        return PairsSpec(t=t, window=opponent.window, reference=tree, draw=draw), needs

    def pairs(self, t: int) -> Stage:
        """What iteration t trains on."""
        name = f"iteration-{t:02d}/pairs"
        if name in self.stages:
            return self.stages[name]
        reference, window = self._opponent(t).reference, self._opponent(t).window
        answers = [self.answers(j, t) for j in reversed(window) if t in opponents.scorers(reference, j)]
        self.together(t, Split.train, answers, real=t in opponents.support(reference))
        spec, needs = self._game(t, Split.train)
        return self._add(name, spec, needs, folder=f"iteration-{t:02d}")

    def evaluate(self, k: int) -> None:
        """What is reported of iterate k; its own work first, while it is in memory."""
        c = self.config
        if not c.evaluation.enabled:
            return
        own = self.heldout_answers(k, plain=True)
        exact = c.evaluation.exact_match if c.evaluation.exact_match.regex is not None else None
        results = {results_role(j): self.results(j) for j in (k, 0)} if exact is not None else {}
        last = self._opponent(k - 1) if k > 0 and c.loss.plays else None
        others = [] if last is None else [self.heldout_answers(j) for j in last.window]
        self.together(k, Split.heldout, [own, *others], real=True)
        needs = {"data": self.data(), "model": self.iterate(k), "own": own, "own_scores": self.generated(k, own)}
        needs |= results | {real_role(j): self.real(j, Split.heldout) for j in range(k + 1)}
        if isinstance(c.dataset, Toy):
            needs["retained"] = self.real(k, Split.retained_heldout)
        game = None
        if last is not None:
            for j in last.window:
                needs[generated_role(k, j)] = self.generated(k, self.heldout_answers(j))
            game, joined = self._game(k - 1, Split.heldout)
            needs |= joined
        if k > 0:
            needs["own_scores_previous"] = self.generated(k - 1, own)
            needs["own_scores_base"] = self.generated(0, own)
        if k > 0 and c.evaluation.full_kl:
            needs |= {f"full_kl_{name}": self.divergence(k, j, own) for name, j in (("previous", k - 1), ("base", 0))}
        matches = self._matches(k) if c.loss.plays else []
        spec = EvaluateSpec(
            k=k,
            game=game,
            matches=tuple(match for match, _ in matches),
            beta=None if last is None else at(c.schedule.beta, k - 1),
            length_norm=c.loss.length_norm,
            num_samples=c.evaluation.num_samples,
            exact_match=exact,
            model=c.model,
            dataset=c.dataset,
        )
        for _, more in matches:
            needs |= more
        self._add(f"iterate-{k:02d}/evaluate", spec, needs)

    def benchmarks(self, k: int) -> None:
        """Iterate k judged by each task of lm-eval that the settings name, and by MT-Bench."""
        for spec in policies.benchmarks(self.config, self.sources.tasks, k):
            self._add(f"iterate-{k:02d}/benchmarks/{spec.words}", spec, {"model": self.iterate(k)})
        judges.plan(self.config, self.sources.mt_bench, k, self._add, self.iterate)

    def _matches(self, k: int) -> list[tuple[PairsSpec, dict[str, Stage]]]:
        """The entries of the cross-play matrix that iterate k adds, and what each needs: with `evaluation.crossplay`
        its whole row and column, else those for which there are tables anyway.
        """
        found = []
        for i, j in [(k, j) for j in range(k + 1) if k > 0] + [(i, k) for i in range(1, k)]:
            there, whole = len(self.stages), self.config.evaluation.crossplay
            answers = self.heldout_answers(j)
            if whole or self._held(i, answers):  # of a hundred iterates few have read another's answers
                reference = self._opponent(i - 1).reference
                support, scorers = opponents.support(reference), opponents.scorers(reference, j)
                inside = scorers <= support  # else it has no value for these answers
                if inside and (whole or all(self._held(scorer, answers) for scorer in scorers)):
                    more = self._entry(i, answers, support, scorers)
                    if whole or len(self.stages) == there:
                        found.append((PairsSpec(i - 1, (j,), opponents.to_json(reference), draw=None), more))
                        continue
            while len(self.stages) > there:
                self.stages.popitem()
        return found

    def _entry(self, i: int, answers: Stage, support: Set[int], scorers: Set[int]) -> dict[str, Stage]:
        """What iterate i's game against another's held-out answers is worked out from, table by table."""
        assert isinstance(answers.spec, AnswersSpec)
        j = answers.spec.k
        needs = {"data": self.data(), answers_role(j): answers}
        needs |= {generated_role(scorer, j): self.generated(scorer, answers) for scorer in sorted({i} | scorers)}
        return needs | {real_role(scorer): self.real(scorer, Split.heldout) for scorer in sorted({i} | support)}
