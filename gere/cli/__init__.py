"""The command `gere`: replay files and anchors without a training, sequences of tasks, and the report of trainings."""
