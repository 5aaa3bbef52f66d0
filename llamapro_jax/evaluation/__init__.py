"""What a model knows: texts, tasks, lm-evaluation-harness, and models side by side."""
