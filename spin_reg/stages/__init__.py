"""The stages: each takes a spec and folders of inputs, and leaves files in its own folder."""
