"""The verbs of the command as a table: what each does and takes. Help, completion and parsing read it.

A new verb is an entry of TABLE and a function in `cli.VERBS`.
"""

from pathlib import Path

from spin_reg.grammar import Kind, Verb, Word
from spin_reg.metrics import HEALTHY

METRICS = tuple(name.removeprefix("eval/") for name in HEALTHY)
NAMED = ("best", "last", "base")  # an iterate that is no number
RUN = Word("RUN", "the folder of a run, as outputs/NAME", kind=Kind.run)
BY = Word("--by", "the metric of `best` (default: eval/heldout_nll)", "METRIC", offers=METRICS)
SWEEP = Word("-m", "a sweep: a run for every combination of the values given with commas")
JOB = Word("--cfg", "print the composed settings and run nothing", "job", choices=("job", "hydra", "all"))
TABLES = "In a terminal tables are drawn (NO_COLOR=1: without colours); piped, a line a row with cells between tabs."
RUNNING = (0, 1, 2, 3, 4, 5, 6, 75)

TABLE: dict[str, Verb] = {
    "train": Verb(
        "generate, score, train and evaluate, iteration after iteration",
        "Settings name the run's folder, so the same command again goes on where it stopped, and does nothing where "
        "all is done. Ctrl-C keeps every finished step. The folder is printed at the end.",
        (SWEEP, JOB),
        settings=True,
        composed=True,
        examples=(
            ("spin-reg train regularizer=kl alpha=0.5", "three iterations on the embedded toy, no network"),
            ("spin-reg train -m alpha=0,0.25,0.5,1", "a sweep; what the points share is made once"),
            (
                "spin-reg train model=pretrained model.name_or_path=FOLDER dataset=jsonl dataset.path=FILE",
                "your own model and data",
            ),
            ("spin-reg train experiment=spin", "a preset of the field"),
        ),
        exits=RUNNING,
    ),
    "plan": Verb(
        "print what train would do, what is done, and what it may cost; runs nothing (--prepare: its data)",
        "A line a stage: done, reuse, todo or stale, its tokens and disk, and why; then what all may take. No data are "
        'read for it: until they are prepared, by train or by --prepare, tokens and disk are bounds ("at most").',
        (
            SWEEP,
            JOB,
            Word("--prepare", "make the data first, where they are not there, as train would and will find them"),
            Word("--json", "a JSON object for each run: stages, tokens, bytes, seconds"),
        ),
        settings=True,
        composed=True,
        examples=(
            ("spin-reg plan regularizer=kl alpha=0.5", "before a run, or between two of its calls"),
            ("spin-reg plan experiment=small_lora", "what a preset would need"),
            ("spin-reg plan --prepare alpha=0.5", "tokens and disk as estimates, not as bounds"),
            ("spin-reg plan alpha=0.5 --json", "for a script"),
        ),
        exits=(0, 1, 2, 3, 4, 6, 75),
    ),
    "resume": Verb(
        "go on with a run, with the settings it was made with",
        "Settings that change its results are refused; others, as schedule.iterations, may be given.",
        (RUN,),
        settings=True,
        examples=(
            ("spin-reg resume outputs/RUN", "what is missing"),
            ("spin-reg resume outputs/RUN schedule.iterations=5", "up to iterate 5"),
        ),
        exits=RUNNING,
    ),
    "evaluate": Verb(
        "judge the iterates of a run that were not yet, and print all that was measured",
        "Without RUN it takes the settings that name it, as train does.",
        (Word("RUN", RUN.what, kind=Kind.run, optional=True),),
        settings=True,
        composed=True,
        examples=(
            ("spin-reg evaluate outputs/RUN", "every metric by iterate, and the cross-play matrix"),
            ("spin-reg evaluate outputs/RUN evaluation=openllm", "benchmarks of lm-eval, only what is missing"),
        ),
        exits=RUNNING,
    ),
    "export": Verb(
        "an iterate as an ordinary Hugging Face folder with its model card, or an iteration's pairs for other tools",
        "hf: weights, tokenizer and README.md, an adapter merged into its base. trl: the pairs as prompt, chosen, "
        "rejected, their token ids, and the log-probs of the reference. spin: the pairs as real and generated "
        "conversations, as SPIN's authors published theirs. Nothing is overwritten.",
        (
            RUN,
            Word("--to", "a folder that is not there yet", "FOLDER", kind=Kind.folder, read=Path, needed=True),
            Word("--format", "hf, trl or spin (default: hf)", "NAME", choices=("hf", "trl", "spin")),
            Word("--iterate", "best, last, base or a number (default: last)", "NAME", offers=NAMED),
            BY,
            Word("--iteration", "whose pairs, for trl and spin (default: the last)", "T", read=int),
            Word("--license", "the identifier for the card (default: what the base's own card says)", "ID"),
            Word("--push-to-hub", "upload it too; HF_TOKEN or a login gives the token", "OWNER/NAME"),
            Word("--public", "with --push-to-hub: a new repository is public, not private"),
        ),
        examples=(
            ("spin-reg export outputs/RUN --to my-model", "the last iterate"),
            ("spin-reg export outputs/RUN --iterate best --by kl_data --to my-model", "the best by a metric"),
            ("spin-reg export outputs/RUN --to my-model --push-to-hub ME/my-model", "and upload it, private"),
            ("spin-reg export outputs/RUN --format trl --iteration 0 --to pairs", "for TRL's DPOTrainer"),
        ),
        exits=(0, 1, 2, 3, 6),
    ),
    "sample": Verb(
        "what an iterate answers to prompts of your own, or several of them side by side",
        "Rendered with the run's chat template and drawn with its temperature, top-p and length unless others are "
        "given; the same seed and prompt give the same answer, on one machine. Without --prompt and --prompts what is "
        "piped in is one prompt. One answer alone is printed as it is, so that it can be piped on.",
        (
            RUN,
            Word("--prompt", "what is asked, once or often; - reads it from standard input", "TEXT", many=True),
            Word("--prompts", "a file with a prompt a row (prompt, or messages)", "FILE.jsonl", kind=Kind.file),
            Word("--system", "a system message (default: the run's dataset.system_prompt, if any)", "TEXT"),
            Word(
                "--iterate",
                "best, last, base or a number, given twice for two side by side (default: last)",
                "NAME",
                offers=NAMED,
                many=True,
            ),
            BY,
            Word("--temperature", "0 takes the likeliest token each time (default: the run's)", "X", read=float),
            Word("--top-p", "the mass of likely tokens that is drawn from (default: the run's)", "X", read=float),
            Word("--max-new-tokens", "tokens of the longest answer (default: the run's)", "N", read=int),
            Word("--seed", "of the draws (default: 0)", "N", read=int),
            Word("--json", "a JSON object a line: iterate, prompt, answer, token ids, finish_reason"),
        ),
        examples=(
            ("spin-reg sample outputs/RUN --prompt A1", "the last iterate of a toy run"),
            ("spin-reg sample outputs/RUN --iterate base --iterate best --prompt Hello", "two side by side"),
            ("echo Hello | spin-reg sample outputs/RUN --temperature 0", "a prompt that is piped in"),
            ("spin-reg sample outputs/RUN --prompts mine.jsonl --json > answers.jsonl", "for a script"),
        ),
        exits=(0, 1, 2, 3, 5),
    ),
    "sync": Verb(
        "send the metrics of a run to its tracker, or to another",
        "No model is loaded. The same id is used, so what is there is not doubled. Only tracker settings are taken.",
        (RUN,),
        settings=True,
        examples=(
            ("spin-reg sync outputs/RUN", "after a run without a network"),
            ("spin-reg sync outputs/RUN tracker=tensorboard", "to another tracker"),
        ),
        exits=(0, 1, 2, 4),
    ),
    "status": Verb(
        "how far runs are; of one, the family tree of its iterates",
        "DIR is a folder of runs, which gives one line a run, or a run's own folder, which adds the family tree of its "
        "iterates: for each who gave the answers that it was trained on, against which reference (the formula of log "
        "r), and what was taken over from other runs. Only files are read, so it works while runs are made, and after. "
        f"{TABLES}",
        (
            Word("DIR", "a folder of runs, or a run (default: outputs)", kind=Kind.folder, optional=True),
            Word("--watch", "look again every two seconds, till Ctrl-C"),
            Word(
                "--json",
                'all of it for programs: {"folder", "runs": [...]}, every run with the same keys, null where something '
                'is not known; "tree" is null where DIR holds several runs; with --watch one object a line',
            ),
        ),
        shows=(
            ("run", "the folder's name"),
            (
                "state",
                "running; finished; prepared (its data alone, by plan --prepare); stopped (by a signal) or interrupted "
                "(killed): the same command goes on; failed: see error; damaged: run.json cannot be read",
            ),
            ("iterates, stages", "made, of those that the run will have"),
            ("at work, rate", "the stage, how far it is, and units a second"),
            (
                "left",
                "time that the whole run may still take, at the pace so far of each kind of stage; > where one was "
                "not timed yet",
            ),
            ("disk", 'of the folder; "shared" is what other runs hold too (hard links), and is on disk once'),
            ("heldout_nll", "of the newest iterate that was evaluated"),
            ("error", "why the last call ended early; all of it stands in run.log"),
        ),
        examples=(
            ("spin-reg status", "the runs in outputs"),
            ("spin-reg status outputs/RUN --watch", "one run, while it is made"),
            ("spin-reg status --json", "for a script"),
        ),
    ),
    "ls": Verb(
        "the runs of a folder, by what sets them apart",
        "Of the runs in DIR those whose settings are as said: a group's option, as in regularizer=kl, or any setting "
        f"that changes results, as in schedule.beta=0.1. {TABLES}",
        (
            Word("DIR", "a folder of runs (default: outputs)", kind=Kind.folder, optional=True),
            Word("key=value", "the runs that have this, once or often", many=True),
            Word(
                "--json",
                '{"folder", "runs": [{"run", "path", "settings", "metrics", "problem"}]}: all settings that change '
                "results, and all metrics by iterate",
            ),
        ),
        shows=(
            ("settings", "those that are not the same in all that are listed"),
            ("iterates", "how many were evaluated, the base included"),
            ("heldout_nll, best", "of the newest of them, and of the best, with its number"),
            ("problem", "why a run cannot be read; other runs are listed all the same"),
        ),
        examples=(
            ("spin-reg ls", "all runs in outputs"),
            ("spin-reg ls outputs regularizer=kl seed=0", "some of them"),
            ("spin-reg ls --json", "for a script"),
        ),
    ),
    "compare": Verb(
        "two runs, or two sets of seeds, beside each other",
        "A and B are each a run's folder, a folder of runs, or a pattern in quotes, with key=value behind it where "
        f"only some of them are meant; several runs on one side must differ in the seed alone. {TABLES}",
        (
            Word("A", "a run's folder, a folder of runs, or a pattern", kind=Kind.run),
            Word("B", "the other side", kind=Kind.run),
            Word("--metric", "this in place of the main ones, once or often", "NAME", offers=METRICS, many=True),
            Word("--all", "all metrics"),
            Word(
                "--iterate",
                "whose samples: best, last, base or a number (default: the newest of both)",
                "NAME",
                offers=NAMED,
            ),
            BY,
            Word("--samples", "so many prompts (default: 3; 0: none)", "N", read=int),
            Word("--json", 'all of it for programs: {"a", "b", "settings", "metrics", "samples"}'),
        ),
        shows=(
            ("settings", "those of config.yaml that differ"),
            (
                "metrics",
                "by iterate: mean and standard deviation over the seeds of each side (n - 1), and the difference B - "
                "A, seed by seed over the seeds that both have (n of them): the spread of the bases, which the seed "
                "changes too, cancels. * marks the side that is better by it (if they share no seed, by its mean); "
                "of some metrics neither is",
            ),
            ("samples", "answers of both to the same held-out prompts, of the first seed that both have"),
        ),
        examples=(
            ("spin-reg compare outputs/RUN1 outputs/RUN2", "two runs"),
            (
                "spin-reg compare 'outputs/tiny-toy-none-seed*' 'outputs/tiny-toy-kl-alpha0.5-seed*'",
                "two sets of seeds",
            ),
            ("spin-reg compare 'outputs schedule.beta=0.1' 'outputs schedule.beta=1'", "two arms of a sweep"),
            ("spin-reg compare A B --metric kl_data --metric kl_off --samples 0", "two metrics alone"),
        ),
    ),
    "report": Verb(
        "one HTML page and its figures about a run or a sweep",
        "The page goes to report.html in the folder, or in what holds them all; figures as SVG beside it. It needs no "
        "network.",
        (
            Word("DIR", "runs, or folders that hold runs", kind=Kind.folder, many=True),
            Word("--to", "the page", "FILE.html", kind=Kind.file),
            Word("--metric", "what iterates are judged by (default: KL from the data, else held-out NLL)", "NAME"),
            Word("--png", "the figures as PNG too (extra `figures`)"),
        ),
        examples=(
            ("spin-reg report outputs/RUN", "one run"),
            ("spin-reg report outputs", "all runs of a folder, mean and spread over seeds"),
        ),
    ),
    "gc": Verb(
        "what nothing needs any more, by name and size",
        "Shows it; removes it with --yes.",
        (
            Word("DIR", "a folder of runs, or a run (default: outputs)", kind=Kind.folder, optional=True),
            Word("keep_iterates=needed|last", "whose weights are to stay (default: as the run was made)"),
            Word("--yes", "remove what is shown"),
        ),
        examples=(
            ("spin-reg gc", "what could go from outputs"),
            ("spin-reg gc outputs/RUN keep_iterates=last --yes", "keep the last iterate's weights alone"),
        ),
        exits=(0, 1, 2),
    ),
}
