"""Prompts and answers: data sets, chat templates, the prompt stream, the grader."""
