"""MT-Bench's questions, or their reference answers, as a file of the run."""

from pathlib import Path

from spin_reg import durable, questions
from spin_reg.context import Context
from spin_reg.errors import DataError
from spin_reg.mt_bench import Asked
from spin_reg.specs import QuestionsSpec


def run(spec: QuestionsSpec, inputs: dict[str, Path], out: Path, context: Context) -> None:
    """Write questions.jsonl: id, category and turns; or references.jsonl: id and references."""
    found = Asked(questions.read(spec.source), {})
    if spec.sha256 != (found.references_sha256 if spec.references else found.turns_sha256):
        raise DataError(
            "The questions have changed.",
            where=str(spec.source.questions),
            why="they are not what they were when this command began",
            todo="run it again",
        )
    rows = [
        {"question_id": question.question_id, "references": question.references}
        if spec.references
        else {"question_id": question.question_id, "category": question.category, "turns": question.turns}
        for question in found.questions[: spec.limit]
    ]
    durable.write_jsonl(out / ("references.jsonl" if spec.references else "questions.jsonl"), rows)
