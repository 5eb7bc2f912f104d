"""The names by which a stage finds what other stages made."""


def answers_role(j: int) -> str:
    """The input that holds answers of iterate j."""
    return f"answers/{j:02d}"


def results_role(k: int) -> str:
    """The input that holds answers of iterate k whose results are compared with the real ones."""
    return f"results/{k:02d}"


def real_role(k: int) -> str:
    """The input that holds iterate k's log-probs of real answers."""
    return f"real/{k:02d}"


def holds_scores(role: str) -> bool:
    """Whether an input is one of log-probs."""
    return role.startswith(("real/", "generated/"))


def generated_role(k: int, j: int) -> str:
    """The input that holds iterate k's log-probs of the answers of iterate j."""
    return f"generated/{k:02d}-{j:02d}"
