"""What metrics are called on the page, their units, and where they should go."""

from dataclasses import dataclass

from spin_reg.metrics import HEALTHY, Healthy

SIDES = {Healthy.low: "lower is better", Healthy.high: "higher is better", Healthy.half: "toward ½ is better"}
NATS = "nats a sequence"


@dataclass(frozen=True)
class Name:
    """A metric for people. `rule`: a value to compare with, and what it is."""

    title: str
    unit: str = ""
    rule: tuple[float, str] | None = None


NAMES = {
    "eval/kl_data": Name("KL from the data", NATS),
    "eval/kl_data_reverse": Name("KL to the data", NATS),
    "eval/kl_off": Name("KL on the retained skill", NATS),
    "eval/heldout_nll": Name("Held-out NLL", "nats a token"),
    "eval/heldout_nll_change": Name("NLL change from the base", NATS, (0.0, "")),
    "eval/heldout_real_logprob": Name("Log-prob of real answers", NATS),
    "eval/heldout_generated_logprob": Name("Log-prob of generated answers", NATS),
    "eval/exact_match": Name("Exact match", "share of prompts"),
    "eval/exact_match_answered": Name("Answers with a result", "share of prompts"),
    "eval/exact_match_change": Name("Exact match against the base", "share of prompts", (0.0, "")),
    "eval/preferred_to_base": Name("Real answers likelier than by the base", "share", (0.5, "")),
    "eval/preferred_to_previous": Name("Likelier than by the iterate before", "share", (0.5, "")),
    "eval/kl_to_base_full": Name("KL to the base, whole vocabulary", NATS),
    "eval/kl_to_previous_full": Name("KL to the iterate before, whole vocabulary", NATS),
    "eval/self_bleu": Name("Self-BLEU", "1: all alike"),
    "eval/kl_to_base": Name("KL to the base", NATS),
    "eval/kl_to_previous": Name("KL to the iterate before", NATS),
    "eval/length_mean": Name("Mean length", "tokens"),
    "eval/length_p90": Name("90th percentile of length", "tokens"),
    "eval/length_auc": Name("Longer than a real answer", "share", (0.5, "")),
    "eval/stop_rate": Name("Ended by itself", "share"),
    "eval/cutoff_share": Name("Cut off", "share"),
    "eval/margin": Name("Margin", "beta nats", (0.0, "")),
    "eval/accuracy": Name("Real told from generated", "share of pairs", (0.5, "chance")),
    "eval/gap": Name("Gap to indistinguishable", "nats", (0.0, "")),
    "eval/misalignment": Name("Misaligned pairs", "share"),
    "eval/step_direction": Name("Step direction", "correlation", (0.0, "")),
    "eval/token_entropy": Name("Entropy", "nats a token"),
    "eval/distinct_1": Name("Distinct 1-grams", "share"),
    "eval/distinct_2": Name("Distinct 2-grams", "share"),
    "train/loss": Name("Loss", "nats"),
    "train/margin": Name("Margin", "beta nats", (0.0, "")),
    "train/accuracy": Name("Accuracy", "share of pairs", (0.5, "chance")),
    "train/grad_norm": Name("Gradient norm", "before clipping"),
}
QUALITY = (
    "eval/kl_data",
    "eval/kl_off",
    "eval/heldout_nll",
    "eval/heldout_nll_change",
    "eval/kl_data_reverse",
    "eval/exact_match",
    "eval/exact_match_change",
    "eval/preferred_to_base",
)
DRIFT = (
    "eval/kl_to_base",
    "eval/kl_to_previous",
    "eval/kl_to_base_full",
    "eval/kl_to_previous_full",
    "eval/length_mean",
    "eval/length_auc",
    "eval/cutoff_share",
    "eval/token_entropy",
    "eval/distinct_2",
    "eval/self_bleu",
)
GAME = (
    "eval/margin",
    "eval/accuracy",
    "eval/gap",
    "eval/misalignment",
    "eval/heldout_generated_logprob",
    "eval/step_direction",
)
REPEATED = ("eval/heldout_real_logprob", "eval/stop_rate", "eval/length_p90", "eval/distinct_1")  # in the table only
TRAINING = ("train/loss", "train/margin", "train/accuracy", "train/grad_norm")


def name(metric: str) -> Name:
    """A metric that has no row here goes by its own name."""
    return NAMES.get(metric) or Name(metric.partition("/")[2])


def plain(metric: str) -> str:
    """The key without its group, as the command's own table has it."""
    return metric.partition("/")[2]


def words(metric: str) -> str:
    """Key, unit and good side, for the line below a title."""
    side = SIDES[HEALTHY[metric]] if metric in HEALTHY else ""
    key = plain(metric) if metric in NAMES and metric.startswith("eval/") else ""
    return " · ".join(word for word in (key, name(metric).unit, side) if word)
