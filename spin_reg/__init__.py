"""spin-reg: regularized self-play fine-tuning of language models, one command for the whole loop."""

__version__ = "0.1.0"
