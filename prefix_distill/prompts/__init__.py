"""Prompts and answers: datasets, chat templates, the prompt stream, the grader."""
